"""Which tokens an LLM serving engine computes next. Pure Python and numpy; runs without a device.

`Scheduler` turns requests into `Batch` after `Batch` and takes an `IterationResult` for each. It
asks whoever owns the KV pages through the `PageBudget` protocol, and does not care who runs the
model.
"""

from nf_scheduler.batch import Batch
from nf_scheduler.config import SchedulerConfig
from nf_scheduler.ledger import Ledger
from nf_scheduler.page_budget import PageBudget, PrefixMatch
from nf_scheduler.request import FinishReason, Request, RequestState
from nf_scheduler.result import IterationResult, TokenEvent
from nf_scheduler.scheduler import Scheduler

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "FinishReason",
    "IterationResult",
    "Ledger",
    "PageBudget",
    "PrefixMatch",
    "Request",
    "RequestState",
    "Scheduler",
    "SchedulerConfig",
    "TokenEvent",
    "__version__",
]

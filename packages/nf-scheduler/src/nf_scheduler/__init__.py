"""Which tokens an LLM serving engine computes next. Pure Python and numpy; runs without a device.

`Scheduler` turns requests into `Batch` after `Batch` and takes an `IterationResult` for each. It
asks whoever owns the KV pages through the `PageBudget` protocol, and does not care who runs the
model.
"""

from nf_scheduler.admission import Admission, PredictedPeak, ReservingAdmission
from nf_scheduler.batch import Batch
from nf_scheduler.config import SchedulerConfig, TokenBudget
from nf_scheduler.errors import QueueFull
from nf_scheduler.ledger import Ledger
from nf_scheduler.output_lengths import OutputLengths
from nf_scheduler.page_budget import PageBudget, PrefixMatch
from nf_scheduler.policy import (
    POLICIES,
    Policy,
    PolicyFacts,
    PrefixAffinity,
    Priority,
    ServiceLevel,
    ShortestFirst,
    SloAware,
)
from nf_scheduler.request import FinishReason, Request, RequestState
from nf_scheduler.result import IterationResult, Progress, RequestEnd, TokenEvent
from nf_scheduler.scheduler import Scheduler
from nf_scheduler.stats import SchedulerStats

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "Admission",
    "Batch",
    "FinishReason",
    "IterationResult",
    "Ledger",
    "OutputLengths",
    "PageBudget",
    "Policy",
    "PolicyFacts",
    "PredictedPeak",
    "PrefixAffinity",
    "PrefixMatch",
    "Priority",
    "Progress",
    "QueueFull",
    "Request",
    "RequestEnd",
    "RequestState",
    "ReservingAdmission",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "ServiceLevel",
    "ShortestFirst",
    "SloAware",
    "TokenBudget",
    "TokenEvent",
    "__version__",
]

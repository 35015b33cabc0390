"""What comes back from an iteration, and what the scheduler makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nf_scheduler.ledger import Ledger
from nf_scheduler.request import FinishReason


@dataclass(slots=True, eq=False)
class IterationResult:
    """The sampled ids of one iteration.

    Attributes:
        iteration: number of the batch that this answers.
        token_ids: int32 [n], in the order of the batch's requests. Entries of requests that did not
            sample are ignored.
    """

    iteration: int
    token_ids: np.ndarray


@dataclass(slots=True)
class TokenEvent:
    """One token that a request keeps, or the end of an aborted request.

    Attributes:
        request_id: whose.
        token_id: the token; None for an abort.
        finish_reason: set on the last event of a request.
        stop_token: the stop id that ended the request, which is `token_id` then.
        ledger: the request's account, on the last event.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    ledger: Ledger | None = None

"""What comes back from an iteration, and what the scheduler makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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
class RequestEnd:
    """How a request ended.

    Attributes:
        reason: why.
        stop_token: the stop id that ended it, which is its last token then.
        ledger: its account.
    """

    reason: FinishReason
    stop_token: int | None
    ledger: Ledger


@dataclass(slots=True)
class TokenEvent:
    """One token that a request keeps, or the end of a request that got no token with it.

    Attributes:
        request_id: whose.
        token_id: the token; None for an abort or a missed deadline.
        end: on the last event of a request.
    """

    request_id: str
    token_id: int | None
    end: RequestEnd | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended, on its last event."""
        return None if self.end is None else self.end.reason

    @property
    def stop_token(self) -> int | None:
        """The stop id that ended the request, on its last event."""
        return None if self.end is None else self.end.stop_token

    @property
    def ledger(self) -> Ledger | None:
        """The account of the request, on its last event."""
        return None if self.end is None else self.end.ledger


@dataclass(slots=True)
class Progress:
    """What requests gained since the last time it was asked for. Iterating gives events.

    Attributes:
        request_ids: n names, in the order of the batch.
        token_ids: n tokens that they keep.
        ends: by request, those that ended. Some of them are not among `request_ids`: they ended
            without a token.
    """

    request_ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ends: dict[str, RequestEnd] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.request_ids or self.ends)

    def __iter__(self) -> Iterator[TokenEvent]:
        """One event for each token, then one for each request that ended without."""
        ends = dict(self.ends)
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            yield TokenEvent(request_id, token_id, ends.pop(request_id, None))
        for request_id, end in ends.items():
            yield TokenEvent(request_id, None, end)

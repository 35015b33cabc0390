"""The scheduler's own record of a request."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np

from nf_scheduler.ledger import Ledger
from nf_scheduler.request import FinishReason, Request, RequestState
from nf_scheduler.result import RequestEnd


class Sequence:
    """A request from `add` until it is forgotten: its state, what it generated, its account.

    What changes with every token of a running request is not here but in `RunningSet`.
    """

    __slots__ = (
        "arrival",
        "ending",
        "ledger",
        "output",
        "rank",
        "request",
        "restore_began",
        "slot",
        "state",
    )

    def __init__(self, request: Request, arrival: int, now: float) -> None:
        self.request = request
        self.arrival = arrival
        self.state = RequestState.WAITING
        self.slot = -1
        self.rank = now  # as its policy decides
        # Why it was ended, while iterations in flight contain it and nobody has been told.
        self.ending: FinishReason | None = None
        self.output = array("i")
        self.restore_began: float | None = None  # while it waits for a restore
        self.ledger = Ledger(arrival=now, prompt_tokens=request.prompt_len)

    @property
    def request_id(self) -> str:
        """The name of the request, which is also that of its pages."""
        return self.request.request_id

    @property
    def place(self) -> tuple[float, int]:
        """What requests are ordered by: rank, then arrival."""
        return self.rank, self.arrival

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids are known: prompt and output."""
        return self.request.prompt_len + len(self.output)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids of tokens `start` to `stop` of prompt and output, int32."""
        prompt_len = self.request.prompt_len
        if stop <= prompt_len:
            return self.request.prompt_token_ids[start:stop]
        # A slice of an array is a copy, so that the array itself can go on growing.
        output = self.output[max(start - prompt_len, 0) : stop - prompt_len]
        ids = np.frombuffer(output, dtype=np.int32)
        return (
            ids
            if start >= prompt_len
            else np.concatenate((self.request.prompt_token_ids[start:], ids))
        )

    def end_restore(self, now: float) -> None:
        """Add the restore that it waits for to the account, if it waits for one."""
        if self.restore_began is not None:
            self.ledger.restore_seconds += now - self.restore_began
            self.restore_began = None

    def count_reuse(self, num_tokens: int, tokens_by_tier: Mapping[str, int]) -> None:
        """Add KV that need not be computed to the account."""
        if self.ledger.prefill_chunks:  # some of it was computed before: it was preempted
            self.ledger.restored_tokens += num_tokens
        else:
            self.ledger.cached_tokens = num_tokens
            self.ledger.cached_tokens_by_tier = dict(tokens_by_tier)

    def end(self, now: float, reason: FinishReason, stop_token: int | None = None) -> RequestEnd:
        """Close the account."""
        self.ledger.finished = now
        self.ledger.output_tokens = len(self.output)
        return RequestEnd(reason, stop_token, self.ledger)

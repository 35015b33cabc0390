"""What is known about one request: from it come its log line and its metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

logger = logging.getLogger("nf_server.request")


class Outcome(StrEnum):
    """How a request ended; the values of the `outcome` label."""

    STOP = "stop"
    LENGTH = "length"
    TIMEOUT = "timeout"
    ABORT_CLIENT = "abort_client"
    ABORT_SERVER = "abort_server"
    REJECTED = "rejected"
    QUEUE_FULL = "queue_full"
    ERROR = "error"


class LedgerLike(Protocol):
    """The part of the engine's ledger of a sequence that is used here; seconds of one clock."""

    arrival: float
    first_scheduled: float | None
    finished: float | None
    preemptions: int


@dataclass(slots=True)
class RequestRecord:
    """One request from arrival to end.

    Times are `time.monotonic()` seconds of this process; `queue_seconds` is an interval of the
    engine's clock, and None until the engine has reported it.
    """

    request_id: str
    completion_id: str
    model: str
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    ended: float | None = None
    outcome: Outcome | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    longest_output: int = 0
    queue_seconds: float | None = None
    preemptions: int = 0

    def read_ledgers(self, ledgers: Sequence[LedgerLike]) -> None:
        """Take queueing time (the longest) and preemptions (all) from the request's ledgers.

        Who ran out of time in the queue has spent all of it there. Without these, the times would
        look best when the server is overloaded most.
        """
        waits = []
        for ledger in ledgers:
            left = ledger.finished if ledger.first_scheduled is None else ledger.first_scheduled
            if left is not None:
                waits.append(left - ledger.arrival)
        self.queue_seconds = max(waits, default=None)
        self.preemptions = sum(ledger.preemptions for ledger in ledgers)

    def end(self, outcome: Outcome) -> None:
        """Note how and when the request ended."""
        self.outcome = outcome
        self.ended = time.monotonic()

    @property
    def total_seconds(self) -> float:
        """From arrival to the end, or until now."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def ttft_seconds(self) -> float | None:
        """From arrival to the first token; None when there was none."""
        return None if self.first_token is None else self.first_token - self.started

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time between tokens of the longest choice; None below two tokens."""
        if self.first_token is None or self.ended is None or self.longest_output < 2:
            return None
        return (self.ended - self.first_token) / (self.longest_output - 1)

    def log(self) -> None:
        """Write the one line of this request."""
        logger.info(
            "finished id=%s request=%s model=%s outcome=%s prompt=%d cached=%d output=%d "
            "queue=%s ttft=%s total=%s preemptions=%d",
            self.completion_id,
            self.request_id,
            self.model,
            self.outcome,
            self.prompt_tokens,
            self.cached_tokens,
            self.output_tokens,
            _seconds(self.queue_seconds),
            _seconds(self.ttft_seconds),
            _seconds(self.total_seconds),
            self.preemptions,
        )


def log_rejected(request_id: str, path: str, status: int, code: str, message: str) -> None:
    """Write the one line of a request that never reached the engine."""
    logger.info(
        "rejected request=%s path=%s status=%d code=%s message=%r",
        request_id,
        path,
        status,
        code,
        message,
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

"""What a caller asks for."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np


class RequestState(enum.IntEnum):
    """Where a request stands."""

    WAITING = 0
    """Queued; has no pages."""
    WAITING_FOR_RESTORE = 1
    """Has pages and a slot, but does not run; KV is on its way up from a lower tier."""
    RUNNING = 2
    """Has pages and a slot, and takes part in iterations."""
    PREEMPTED = 3
    """Queued again after its pages were taken; keeps what it has generated."""
    FINISHED = 4
    """Gets no more tokens; iterations in flight may still contain it."""


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """It sampled one of its stop ids."""
    LENGTH = "length"
    """It reached `max_tokens`."""
    ABORT = "abort"
    """`Scheduler.abort` was called."""
    TIMEOUT = "timeout"
    """Its deadline passed."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate. The scheduler reads it and never changes it.

    Attributes:
        request_id: unique among the requests alive in a scheduler.
        prompt_token_ids: int32 [n], n >= 1; other integers are converted.
        max_tokens: most tokens to generate, >= 1. The caller has capped it such that prompt and
            output fit into the model's context.
        min_tokens: while fewer than this many tokens have been generated (the one just sampled
            counts), a stop id does not end the request. `max_tokens` does, always.
        stop_token_ids: ids that end the request. The end-of-sequence ids are among them unless the
            caller ignores them.
        reuse_prefix: False computes every position anew, even those whose KV is cached; `fork_of`
            has no effect then.
        cache_salt: KV is reused only among requests with the same salt.
        priority: for policies that look at it: lower goes first.
        tenant: who asks. Tenants that wait get equal shares of what is computed.
        request_class: for policies that look at it, such as the name of a service level.
        deadline: time of the scheduler's clock at which it ends, whatever it has by then.
        fork_of: id of a request with the same prompt, added before. While that one lives, this one
            waits until the prompt is computed, and then begins with its pages, the partly filled
            last one copied. It needs nothing else of the other, which may end at any time.

    Raises:
        ValueError: for an empty id or prompt, a prompt that is not one dimension of integers,
            counts out of range, or a deadline that is not a number.
    """

    request_id: str
    prompt_token_ids: np.ndarray
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    reuse_prefix: bool = True
    cache_salt: str = ""
    priority: int = 0
    tenant: str = ""
    request_class: str = ""
    deadline: float | None = None
    fork_of: str | None = None

    def __post_init__(self) -> None:
        if not self.request_id:
            raise ValueError("request_id is empty; give every request a name of its own.")
        ids = np.asarray(self.prompt_token_ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"prompt_token_ids of {self.request_id!r} is {ids.dtype} of shape {ids.shape}; "
                "expected one dimension of integers, at least one."
            )
        self.prompt_token_ids = np.ascontiguousarray(ids, dtype=np.int32)
        if self.max_tokens < 1:
            raise ValueError(
                f"max_tokens of {self.request_id!r} is {self.max_tokens}; expected at least 1."
            )
        if self.min_tokens < 0:
            raise ValueError(
                f"min_tokens of {self.request_id!r} is {self.min_tokens}; expected 0 or more."
            )
        if self.deadline is not None and math.isnan(self.deadline):
            raise ValueError(f"deadline of {self.request_id!r} is NaN; expected a time, or None.")

    @property
    def prompt_len(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt_token_ids)

    def can_fork(self, parent: Request) -> bool:
        """Whether the KV of the prompt of `parent` is what this one would compute, and may be."""
        return (
            self.reuse_prefix
            and self.cache_salt == parent.cache_salt
            and np.array_equal(self.prompt_token_ids, parent.prompt_token_ids)
        )

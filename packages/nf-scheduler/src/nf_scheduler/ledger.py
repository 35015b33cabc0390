"""What a request went through."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Ledger:
    """The account of one request, from which log lines, usage and traces are written.

    Times are seconds of the scheduler's clock; None means that it did not come to that.

    Attributes:
        arrival: when it was added.
        first_scheduled: when it first got pages and a slot.
        first_token: when its first token was committed.
        finished: when it finished or was aborted.
        prompt_tokens: tokens of the prompt.
        cached_tokens: prompt tokens that were not computed, because their KV was found before it
            first ran.
        cached_tokens_by_tier: the same by where they were, such as {"device": 32, "host": 16}.
        restored_tokens: tokens that were not computed again after a preemption, because their KV
            was still there or was brought back, over all preemptions.
        restore_seconds: time for which it had pages and a slot, but waited for KV on its way up
            from a lower tier.
        output_tokens: tokens generated, including a stop id at the end.
        prefill_chunks: chunks in which the prompt was computed, those after a preemption included.
        preemptions: how often its pages were taken.
    """

    arrival: float
    prompt_tokens: int
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0
    cached_tokens_by_tier: dict[str, int] = field(default_factory=dict)
    restored_tokens: int = 0
    restore_seconds: float = 0.0
    output_tokens: int = 0
    prefill_chunks: int = 0
    preemptions: int = 0

"""What a request went through."""

from __future__ import annotations

from dataclasses import dataclass


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
        cached_tokens: prompt tokens that were not computed, because their KV was found when it was
            first scheduled.
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
    output_tokens: int = 0
    prefill_chunks: int = 0
    preemptions: int = 0

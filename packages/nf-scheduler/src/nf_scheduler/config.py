"""Limits of a scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True, kw_only=True)
class SchedulerConfig:
    """What one iteration and one request may hold.

    Attributes:
        max_model_len: most tokens of a request, prompt and output together.
        max_num_batched_tokens: most new tokens in one iteration, over all requests.
        max_num_seqs: most requests running at once; also the number of slots.
        max_prefill_chunk: most prompt tokens of one request in one iteration; None means
            `max_num_batched_tokens`.

    Raises:
        ValueError: for a limit below 1.
    """

    max_model_len: int
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 256
    max_prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_batched_tokens",
            "max_num_seqs",
            "max_prefill_chunk",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")

    @property
    def prefill_chunk(self) -> int:
        """Most prompt tokens of one request in one iteration, resolved."""
        return self.max_prefill_chunk or self.max_num_batched_tokens

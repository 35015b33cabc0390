"""Limits of a scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class TokenBudget:
    """How large a batch is worth being, for batches with up to so many decodes.

    Attributes:
        up_to_decodes: the largest number of decodes that this is for.
        num_tokens: most new tokens of the iteration, decodes included.
        prefill_chunk: most prompt tokens of one request in it.

    Raises:
        ValueError: for a number below 1, or a budget that the decodes alone exceed.
    """

    up_to_decodes: int
    num_tokens: int
    prefill_chunk: int

    def __post_init__(self) -> None:
        for name in ("up_to_decodes", "num_tokens", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.num_tokens < self.up_to_decodes:
            raise ValueError(
                f"num_tokens is {self.num_tokens}, for up to {self.up_to_decodes} decodes, which "
                "take a token each; expected at least as many."
            )


@dataclass(slots=True, frozen=True, kw_only=True)
class SchedulerConfig:
    """What one iteration, one request and the queue may hold.

    Attributes:
        max_model_len: most tokens of a request, prompt and output together.
        max_num_batched_tokens: most new tokens in one iteration, over all requests.
        max_num_seqs: most requests running at once; also the number of slots.
        max_prefill_chunk: most prompt tokens of one request in one iteration; None means
            `max_num_batched_tokens`.
        budgets: by number of decodes, in ascending order, where a smaller batch than
            `max_num_batched_tokens` is worth more; beyond the last one that limit holds. A batch is
            never padded up to its budget.
        max_queued_requests: most requests that wait for their first iteration; None is no bound.
        max_queued_tokens: most prompt tokens of these, together; None is no bound. A request that
            finds the queue empty is always taken.

    Raises:
        ValueError: for a limit below 1, or budgets out of order or above the limit.
    """

    max_model_len: int
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 256
    max_prefill_chunk: int | None = None
    budgets: tuple[TokenBudget, ...] = ()
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_batched_tokens",
            "max_num_seqs",
            "max_prefill_chunk",
            "max_queued_requests",
            "max_queued_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        bounds = [budget.up_to_decodes for budget in self.budgets]
        if bounds != sorted(set(bounds)):
            raise ValueError(f"up_to_decodes of budgets is {bounds}; expected ascending numbers.")
        for budget in self.budgets:
            if budget.num_tokens > self.max_num_batched_tokens:
                raise ValueError(
                    f"num_tokens of a budget is {budget.num_tokens}; expected at most "
                    f"max_num_batched_tokens={self.max_num_batched_tokens}."
                )

    def budget_for(self, num_decodes: int) -> TokenBudget:
        """What a batch with `num_decodes` decodes may hold."""
        for budget in self.budgets:
            if num_decodes <= budget.up_to_decodes:
                return budget
        limit = self.max_num_batched_tokens
        return TokenBudget(limit, limit, self.max_prefill_chunk or limit)

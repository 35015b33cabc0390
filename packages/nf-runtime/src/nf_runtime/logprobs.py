"""Log-probabilities as they travel and as a user sees them. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-probabilities at one position.

    Attributes:
        token_id: The token that stands there.
        logprob: Its natural log-probability, before temperature, penalties and filters.
        rank: 1 for the most likely token.
        top_ids: The most likely tokens.
        top_logprobs: Theirs.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability, by vLLM's names.

    Attributes:
        logprob: Natural log-probability.
        rank: 1 for the most likely token.
        decoded_token: Its text.
    """

    logprob: float
    rank: int
    decoded_token: str

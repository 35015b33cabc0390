"""Results of the offline API, by vLLM's names."""

from dataclasses import dataclass, field

from nf_runtime.logprobs import Logprob
from nf_scheduler import Ledger


@dataclass(slots=True)
class CompletionOutput:
    """One answer.

    Attributes:
        index: Which of the request's `n` answers.
        text: Its text.
        token_ids: Its tokens, a stop token included.
        cumulative_logprob: Sum over its tokens, when logprobs were wanted.
        logprobs: One dict per token, when wanted: the chosen token first, then the likeliest.
        finish_reason: `stop`, `length`, or `abort` after a failed iteration.
        stop_reason: The stop string or stop token id that ended it, if one did.
        ledger: What it went through.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    ledger: Ledger | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers.

    Attributes:
        request_id: Of the request.
        prompt: Its text, when it was given as text.
        prompt_token_ids: Its tokens.
        prompt_logprobs: When wanted, one dict per prompt token; None for the first.
        outputs: `n` answers.
        finished: Always true here; there for vLLM's users.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True

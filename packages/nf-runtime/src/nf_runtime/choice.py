"""One answer of a request, built from the engine's outputs."""

from dataclasses import dataclass

from nf_runtime.engine_types import TokenOutput
from nf_runtime.logprobs import Logprob, RowLogprobs
from nf_runtime.sampling_params import SamplingParams
from nf_runtime.text_stream import TextStream
from nf_runtime.tokenizer import Tokenizer
from nf_scheduler import FinishReason, Ledger


@dataclass(slots=True)
class ChoiceDelta:
    """What an answer gained.

    Attributes:
        index: Which of the request's `n` answers.
        text: New text.
        token_ids: New tokens, a stop token included.
        logprobs: One per new token, when wanted.
        finish_reason: `stop`, `length`, `abort` or `timeout`, once.
        stop_reason: The stop string or stop token id that ended it, if one did and it is no
            end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def join(self, later: "ChoiceDelta") -> None:
        """Add what followed."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class Choice:
    """One answer in the making.

    Attributes:
        index: Which of the request's `n` answers.
        finished: No token follows.
        num_tokens: Tokens so far.
        ledger: Once the engine has finished.
    """

    def __init__(
        self,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index = index
        self.finished = False
        self.num_tokens = 0
        self.ledger: Ledger | None = None
        self._params = params
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._text = (
            None
            if tokenizer is None
            else TextStream(
                tokenizer,
                prompt_token_ids,
                stop=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            )
        )

    def accept(self, output: TokenOutput) -> ChoiceDelta | None:
        """Take an output of the engine; None when the answer had ended already.

        When a stop string ends the answer, the engine does not know: the caller aborts it there.
        """
        if output.ledger is not None:
            self.ledger = output.ledger
        if self.finished:
            return None
        delta = ChoiceDelta(self.index, "", [], None if self._params.logprobs is None else [])
        if output.token_id is not None:
            self._take_token(output.token_id, output, delta)
        if not self.finished and output.finish_reason is not None:
            self.finished = True
            delta.finish_reason = str(output.finish_reason)
            if output.stop_token in self._stop_ids:
                delta.stop_reason = output.stop_token
            if self._text:
                delta.text += self._text.finish()
        return delta

    def _take_token(self, token_id: int, output: TokenOutput, delta: ChoiceDelta) -> None:
        self.num_tokens += 1
        delta.token_ids.append(token_id)
        if delta.logprobs is not None and output.logprobs is not None:
            delta.logprobs.append(describe_logprobs(output.logprobs, self._tokenizer))
        hidden = output.stop_token is not None and not self._params.include_stop_str_in_output
        if self._text is None or hidden:
            return
        delta.text = self._text.push(token_id, check_stop=self.num_tokens > self._params.min_tokens)
        if self._text.stopped_by is not None:
            self.finished = True
            delta.finish_reason = str(FinishReason.STOP)
            delta.stop_reason = self._text.stopped_by


def describe_logprobs(row: RowLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Log-probabilities of one position by token id: the token there first, then the likeliest."""
    ranked = [(row.token_id, row.logprob, row.rank)]
    ranked += [
        (token, logprob, rank)
        for rank, (token, logprob) in enumerate(
            zip(row.top_ids, row.top_logprobs, strict=True), start=1
        )
        if token != row.token_id
    ]
    return {
        token: Logprob(logprob, rank, tokenizer.token_text(token) if tokenizer else "")
        for token, logprob, rank in ranked
    }

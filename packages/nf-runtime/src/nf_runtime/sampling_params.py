"""How the tokens of a request are chosen, by vLLM's names."""

from dataclasses import dataclass, field

from nf_runtime.errors import InvalidRequestError

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    Attributes:
        temperature: 0 takes the most likely token; larger is more random.
        top_p: Keep the fewest most likely tokens whose probability reaches this, in (0, 1].
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        min_p: Drop tokens below this share of the most likely token's probability, in [0, 1].
        max_tokens: Tokens to generate at most; None means up to the end of the context.
        min_tokens: No end-of-sequence or stop token before this many tokens; a stop string ends the
            request only if a later token completes it.
        ignore_eos: Go on after an end-of-sequence token.
        stop: Text that ends the request.
        stop_token_ids: Tokens that end the request.
        seed: The same seed, prompt and parameters give the same tokens, whatever else runs.
        n: How many answers.
        logprobs: Report this many most likely tokens at each position, and the chosen one.
        prompt_logprobs: The same for the prompt.
        repetition_penalty: Above 1 makes tokens of the prompt and the answer less likely.
        presence_penalty: Subtracted once from the logit of a token that the answer has.
        frequency_penalty: Subtracted for every time the answer has the token.
        logit_bias: Added to logits, by token id, in [-100, 100].
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop text or token in the answer's text.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = field(default=None)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidRequestError: A field is out of its range; the message names it.
        """
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0, above=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, 100.0, above=True)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._integer("top_k", -1, None)
        self._integer("min_tokens", 0, None)
        self._integer("n", 1, MAX_N)
        for name, low in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            if getattr(self, name) is not None:
                self._integer(name, low, None if name == "max_tokens" else MAX_LOGPROBS)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}; expected at most max_tokens, "
                f"which is {self.max_tokens}",
                param="min_tokens",
            )
        self._check_stop()
        self._check_logit_bias()

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if _is_number(value, low, high) and not (above and value == low):
            return
        raise InvalidRequestError(
            f"{name} is {value!r}; expected a number "
            f"{'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}",
            param=name,
        )

    def _integer(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if is_integer and value >= low and (high is None or value <= high):
            return
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequestError(
            f"{name} is {value!r}; expected an integer {expected}", param=name
        )

    def _check_stop(self) -> None:
        strings = self.stop_strings
        if not isinstance(strings, list | tuple):
            raise InvalidRequestError(
                f"stop is {strings!r:.200}; expected a string or a list of strings", param="stop"
            )
        if len(strings) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in strings):
            raise InvalidRequestError(
                f"stop has {len(strings)} strings; expected at most {MAX_STOP_STRINGS} strings, "
                f"none of them empty",
                param="stop",
            )
        ids = [] if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, list | tuple) or not all(
            isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids
        ):
            raise InvalidRequestError(
                f"stop_token_ids is {ids!r:.200}; expected token ids, integers from 0",
                param="stop_token_ids",
            )

    def _check_logit_bias(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, dict):
            raise InvalidRequestError(
                f"logit_bias is {bias!r:.200}; expected numbers by token id", param="logit_bias"
            )
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias has {len(bias)} entries; expected at most {MAX_LOGIT_BIAS}",
                param="logit_bias",
            )
        for token, value in bias.items():
            if not isinstance(token, int) or not _is_number(value, -100, 100):
                raise InvalidRequestError(
                    f"logit_bias has {token!r}: {value!r}; expected token ids with numbers "
                    f"from -100 to 100",
                    param="logit_bias",
                )


def _is_number(value: object, low: float, high: float) -> bool:
    """Whether a value is a number in a range; NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high

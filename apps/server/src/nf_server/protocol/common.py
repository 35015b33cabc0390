"""What completion and chat requests have in common: model, streaming and sampling fields."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from nf_server.errors import validation_error

MAX_CHOICES = 16
MAX_LOGPROBS = 20

Model = TypeVar("Model", bound=BaseModel)


def _stop_strings(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None or (isinstance(stops, list) and all(isinstance(s, str) for s in stops)):
        return stops
    raise ValueError("expected a string or an array of strings")


def _bias(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("expected an object that maps token ids to numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError(f"expected token ids as keys, got {str(key)[:40]!r}")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise ValueError(f"expected a number for token {key}")
        biases[int(key)] = bias
    return biases


StopStrings = Annotated[list[str] | None, BeforeValidator(_stop_strings)]
LogitBias = Annotated[dict[int, float] | None, BeforeValidator(_bias)]


class StreamOptions(BaseModel):
    """`stream_options`: usage in the stream."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(BaseModel):
    """Fields shared by `/v1/completions` and `/v1/chat/completions`; None means "not sent".

    Types are checked here, with the limits that are the API's own. `nf_runtime.SamplingParams`
    checks the ranges of sampling parameters.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias = None
    stop: StopStrings = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_class: str | None = None
    timeout_seconds: float | None = None

    @property
    def num_choices(self) -> int:
        """`n`, or 1 when it was not sent."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk carries the usage so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    @field_validator("stream_options")
    @classmethod
    def _only_in_streams(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed together with 'stream': true")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_in_streams(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise ValueError("cannot be streamed; send 'stream': false")
        return value


def parse_request(model: type[Model], body: dict[str, Any]) -> Model:
    """`body` as a request `model`.

    Raises:
        ApiError: 400 with a bounded message that names the fields.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise validation_error(error) from None

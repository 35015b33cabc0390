"""From a request, and the model's defaults, to `nf_runtime.SamplingParams`."""

from __future__ import annotations

from typing import Any

from nf_runtime import InvalidRequestError, SamplingParams
from nf_server.errors import ApiError, bad_request, context_length_exceeded
from nf_server.protocol.common import GenerationRequest

DEFAULTABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling parameters whose default may come from the model's generation_config.json."""

_PASSED_ON = (
    *DEFAULTABLE,
    "n",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "seed",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def effective_defaults(generation_config: dict[str, Any], use_it: bool) -> dict[str, Any]:
    """The sampling defaults that differ from the API's own, by parameter name."""
    if not use_it:
        return {}
    return {name: generation_config[name] for name in DEFAULTABLE if name in generation_config}


def sampling_params(
    request: GenerationRequest,
    defaults: dict[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The engine's parameters for `request`; what was not sent comes from `defaults`.

    Raises:
        ApiError: 400, naming the parameter that the engine does not take.
    """
    values = dict(defaults)
    for name in _PASSED_ON:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    try:
        return SamplingParams(
            **values, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs
        )
    except InvalidRequestError as error:
        raise from_invalid_request(error) from None


def token_budget(
    prompt_tokens: int,
    max_model_len: int,
    *,
    asked: int | None,
    default: int | None,
    prompt_field: str,
    limit_field: str,
) -> int:
    """How many tokens may be generated after a prompt of `prompt_tokens`.

    Args:
        prompt_tokens: Length of the prompt.
        max_model_len: Tokens that prompt and output may have together.
        asked: What the client asked for; None when it did not.
        default: What it gets then, as far as there is room; None means all the room.
        prompt_field: Request field of the prompt, for the error.
        limit_field: Request field of `asked`, for the error.

    Raises:
        ApiError: 400 `context_length_exceeded` when it does not fit.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise context_length_exceeded(max_model_len, prompt_tokens, asked, prompt_field)
    if asked is None:
        return room if default is None else min(room, default)
    if asked > room:
        raise context_length_exceeded(max_model_len, prompt_tokens, asked, limit_field)
    return asked


def from_invalid_request(error: InvalidRequestError) -> ApiError:
    """HTTP 400 for what the engine says about a request."""
    return bad_request(str(error), param=error.param, code=error.code or "invalid_value")

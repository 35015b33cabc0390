"""The request of `POST /v1/completions`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from nf_server.errors import ApiError, bad_request
from nf_server.protocol.common import MAX_LOGPROBS, GenerationRequest

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024
"""Most sequences (prompts times `n`) that one request may ask for."""


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`; `prompt` is checked by `parse_prompts`."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request: either text or token ids; the other is None."""

    text: str | None
    token_ids: list[int] | None


def parse_prompts(value: Any, num_choices: int) -> list[Prompt]:
    """The prompts in `value`: a string, strings, token ids, or lists of token ids.

    Raises:
        ApiError: 400 when it is none of these, empty, or asks for too many sequences.
    """
    if isinstance(value, str):
        prompts = [Prompt(value, None)]
    elif not isinstance(value, list):
        raise _wrong_type()
    elif not value:
        raise _empty()
    elif _all_ints(value):
        prompts = [Prompt(None, value)]
    else:
        _check_count(len(value), num_choices)
        prompts = [_one(item) for item in value]
        if len({prompt.text is None for prompt in prompts}) > 1:
            raise _wrong_type()
    if any(not prompt.text and not prompt.token_ids for prompt in prompts):
        raise _empty()
    return prompts


def _one(item: Any) -> Prompt:
    if isinstance(item, str):
        return Prompt(item, None)
    if isinstance(item, list) and _all_ints(item):
        return Prompt(None, item)
    raise _wrong_type()


def _all_ints(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


def _check_count(prompts: int, num_choices: int) -> None:
    if prompts * num_choices > MAX_SEQUENCES:
        raise bad_request(
            f"{prompts} prompts with n={num_choices} are {prompts * num_choices} sequences; "
            f"send at most {MAX_SEQUENCES} in one request.",
            param="prompt",
        )


def _wrong_type() -> ApiError:
    return bad_request(
        "'prompt' must be a string, an array of strings, an array of token ids, or an array of "
        "arrays of token ids.",
        param="prompt",
    )


def _empty() -> ApiError:
    return bad_request("'prompt' is empty: there is nothing to continue.", param="prompt")

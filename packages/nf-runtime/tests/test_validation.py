"""A request is checked against the model before any engine sees it."""

from typing import Any

import pytest

from nf_runtime import ContextLengthExceededError, InvalidRequestError, SamplingParams
from nf_runtime.engine_types import EngineInfo
from nf_runtime.validation import validate_request

INFO = EngineInfo(
    model="m",
    dtype="float32",
    device="cpu",
    vocab_size=100,
    max_model_len=32,
    num_pages=4,
    page_size=16,
    eos_token_ids=(0,),
    weight_bytes=0,
    startup_seconds={},
)


@pytest.mark.parametrize("prompt", [[0], [99], list(range(31))])
def test_a_prompt_that_leaves_room_is_taken(prompt: list[int]) -> None:
    validate_request(prompt, SamplingParams(stop_token_ids=[0, 99], logit_bias={99: 1}), INFO)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty") as caught:
        validate_request([], SamplingParams(), INFO)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("length", [32, 33, 1000])
def test_a_prompt_without_room_for_an_answer_is_refused(length: int) -> None:
    message = rf"maximum context length is 32 tokens, but the prompt has {length}"
    with pytest.raises(ContextLengthExceededError, match=message) as caught:
        validate_request([1] * length, SamplingParams(), INFO)
    assert caught.value.param == "prompt"
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("name", "prompt", "fields"),
    [
        ("prompt", [1, 100], {}),
        ("prompt", [-1], {}),
        ("prompt", ["a"], {}),
        ("prompt", [1.0], {}),
        ("prompt", [None], {}),
        ("prompt", "text", {}),
        ("stop_token_ids", [1], {"stop_token_ids": [100]}),
        ("logit_bias", [1], {"logit_bias": {100: 1.0}}),
        ("logit_bias", [1], {"logit_bias": {-1: 1.0}}),
    ],
)
def test_a_token_that_the_model_does_not_have_is_refused(
    name: str, prompt: Any, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} has token id .*expected 0 to 99") as e:
        validate_request(prompt, SamplingParams(**fields), INFO)
    assert e.value.param == name

"""Every value that no request can run with is refused by the name of its parameter."""

import math
from typing import Any

import pytest

from nf_runtime import EngineConfig, InvalidRequestError, NanoFlowError, SamplingParams
from nf_runtime.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_STRINGS

NAN, INF = math.nan, math.inf
HUGE = 10**400  # does not fit into a float

NUMBERS = {
    "temperature": (-0.1, 100.5),
    "top_p": (0.0, -0.5, 1.01),
    "min_p": (-0.01, 1.5),
    "repetition_penalty": (0.0, -1.0, 101.0),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
}
INTEGERS = {
    "top_k": (-2,),
    "max_tokens": (0, -1),
    "min_tokens": (-1, 17),  # max_tokens is 16
    "n": (0, -1, 17),
    "seed": (-(2**63) - 1, 2**64),
    "logprobs": (-1, 21),
    "prompt_logprobs": (-1, 21),
}
NOT_NUMBERS: tuple[Any, ...] = (NAN, INF, -INF, True, False, "1", [1], {}, HUGE, -HUGE)
NOT_INTEGERS: tuple[Any, ...] = (1.0, NAN, True, "1", [1], {})
OTHERS: dict[str, tuple[Any, ...]] = {
    "stop": ("", ["a", ""], ["x"] * (MAX_STOP_STRINGS + 1), [1], 5, {"a": 1}, b"a", [None]),
    "stop_token_ids": ([-1], [1.0], ["1"], [True], 5, "12", {1: 2}, 0),
    "logit_bias": (
        {1: 100.1},
        {1: -101},
        {1: NAN},
        {1: INF},
        {1: True},
        {1: "1"},
        {1: None},
        {1: HUGE},
        {"1": 1.0},
        {1.0: 1.0},
        [1, 2],
        0,
        dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0),
    ),
}
BAD = [
    *((name, value) for name, values in NUMBERS.items() for value in (*values, *NOT_NUMBERS)),
    *((name, value) for name, values in INTEGERS.items() for value in (*values, *NOT_INTEGERS)),
    *((name, value) for name, values in OTHERS.items() for value in values),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda v: repr(v)[:24])
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert "expected" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_tokens", "n"])
def test_none_is_no_number(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        SamplingParams(**{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0},
        {"temperature": 100, "top_p": 1, "min_p": 1, "top_k": -1},
        {"top_k": 10**30},
        {"max_tokens": None, "min_tokens": 10**30},
        {"max_tokens": 5, "min_tokens": 5},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"n": 16, "logprobs": 0, "prompt_logprobs": 20},
        {"stop": "a"},
        {"stop": []},
        {"stop": ["a"] * MAX_STOP_STRINGS, "stop_token_ids": [0, 5]},
        {"logit_bias": {0: 100, 3: -100.0}},
        {"logit_bias": {}},
        {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": 2},
    ],
)
def test_the_edges_of_every_range_are_taken(fields: dict[str, Any]) -> None:
    SamplingParams(**fields)


def test_stop_strings_is_a_list_in_every_spelling() -> None:
    assert SamplingParams().stop_strings == []
    assert SamplingParams(stop="ab").stop_strings == ["ab"]
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ["ab", "c"]


def test_fields_are_named_not_counted() -> None:
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temperatur"):
        SamplingParams(temperatur=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float64"),
        ("device", "tpu"),
        ("load_format", "pickle"),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", -1),
        ("max_prefill_chunk", 0),
        ("kv_cache_tokens", 0),
        ("kv_device_bytes", 0),
        ("page_size", 0),
    ],
)
def test_a_bad_engine_option_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(NanoFlowError, match=f"{name} is .*expected"):
        EngineConfig(model="m", **{name: value})


def test_engine_options_survive_json() -> None:
    config = EngineConfig(model="m", device="cuda:1", kv_cache_tokens=64)
    assert EngineConfig(**config.to_dict()) == config

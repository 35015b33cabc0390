"""The offline API: prompts in every form, answers complete, and an LLM that survives its user."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_runtime import (
    LLM,
    ContextLengthExceededError,
    InvalidRequestError,
    NanoFlowError,
    SamplingParams,
)

MakeCheckpoint = Callable[..., Path]
DEMO = Path(__file__).parents[3] / "models" / "nanoflow-demo"
VOCAB_SIZE = json.loads((DEMO / "config.json").read_text())["vocab_size"]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def load(tiny_checkpoint: MakeCheckpoint, **options: Any) -> LLM:
    """A random model with the vocabulary of the demo model's tokenizer."""
    path = str(tiny_checkpoint("llama3", vocab_size=VOCAB_SIZE))
    options |= {"kv_cache_tokens": 2048, "max_num_batched_tokens": 64}
    return LLM(path, tokenizer=str(DEMO), **options)


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: MakeCheckpoint) -> LLM:
    return load(tiny_checkpoint)


@pytest.fixture(scope="module")
def uncached(tiny_checkpoint: MakeCheckpoint) -> LLM:
    return load(tiny_checkpoint, enable_prefix_caching=False)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared model, found clean after every test."""
    yield shared
    assert_clean(shared)


def assert_clean(llm: LLM) -> None:
    engine = llm.engine
    engine.scheduler.check_integrity()
    engine.kv_cache.check_integrity()
    assert not engine.has_work
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.kv_pages_used) == (0, 0, 0)


def tokens_of(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def test_a_prompt_in_every_form(llm: LLM) -> None:
    text = "def f(x):"
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(text)
    forms: list[Any] = [
        text,
        {"prompt": text},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": tuple(ids)},
        {"prompt_token_ids": np.array(ids)},
        {"prompt_token_ids": ids, "prompt": text},
    ]
    together = llm.generate(forms, GREEDY)
    for form, output in zip(forms, together, strict=True):
        (alone,) = llm.generate(form, GREEDY)
        assert alone.prompt_token_ids == output.prompt_token_ids == ids
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert output.prompt == (text if "prompt" in form or form is text else None)
        assert output.finished
    (tokens,) = {tuple(output.outputs[0].token_ids) for output in together}
    answer = together[0].outputs[0]
    assert answer.text == llm.tokenizer.decode([*ids, *tokens])[len(text) :].rstrip("\ufffd")
    assert answer.finish_reason == "length"
    assert answer.stop_reason is None
    assert answer.logprobs is None
    assert answer.cumulative_logprob is None
    assert answer.ledger is not None
    assert answer.ledger.output_tokens == len(tokens) == 8


def test_parameters_for_all_or_one_each(llm: LLM) -> None:
    prompts = ["a", "b", "c"]
    each = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 5, 3)]
    outputs = llm.generate(prompts, each)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    assert [len(tokens) for tokens in tokens_of(llm, prompts, None)] == [16] * 3
    assert llm.generate([]) == []
    with pytest.raises(InvalidRequestError, match="sampling_params has 2 entries for 3 prompts"):
        llm.generate(prompts, each[:2])


def test_answers_in_a_batch_are_those_alone(llm: LLM) -> None:
    generator = np.random.default_rng(0)
    prompts = [
        {"prompt_token_ids": generator.integers(0, VOCAB_SIZE, n).tolist()}
        for n in (1, 150, 7, 64, 16, 17, 40, 3)
    ]
    params = SamplingParams(temperature=0, max_tokens=40)
    together = tokens_of(llm, prompts, params)
    assert together == [tokens_of(llm, prompt, params)[0] for prompt in prompts]


def test_several_answers(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=12)
    (output,) = llm.generate("x = ", params)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    (again,) = llm.generate("x = ", params)
    assert [a.token_ids for a in again.outputs] == [a.token_ids for a in output.outputs]
    (other,) = llm.generate("x = ", SamplingParams(n=3, seed=6, max_tokens=12))
    assert other.outputs[0].token_ids != output.outputs[0].token_ids


def test_the_whole_context(tiny_checkpoint: MakeCheckpoint) -> None:
    path = str(tiny_checkpoint("llama3"))
    llm = LLM(path, skip_tokenizer_init=True, max_model_len=48, kv_cache_tokens=96)

    def answer(length: int, **fields: Any) -> Any:
        params = SamplingParams(temperature=0, **fields)
        return llm.generate({"prompt_token_ids": [1] * length}, params)[0].outputs[0]

    for length in (1, 10, 47):
        for limit in (None, 48, 10**6):
            whole = answer(length, max_tokens=limit)
            assert (len(whole.token_ids), whole.finish_reason) == (48 - length, "length")
    assert len(answer(10, max_tokens=1).token_ids) == 1
    for length in (48, 49, 1000):
        with pytest.raises(ContextLengthExceededError, match="maximum context length is 48"):
            answer(length)
    assert_clean(llm)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({}, "expected a string or prompt_token_ids"),
        ({"prompt": 3}, "expected a string or prompt_token_ids"),
        ([3], "expected a string or prompt_token_ids"),
        ([[1, 2]], "expected a string or prompt_token_ids"),
        ([None], "expected a string or prompt_token_ids"),
        ({"prompt_token_ids": 3}, "expected a list of integers"),
        ({"prompt_token_ids": "abc"}, "expected a list of integers"),
        ({"prompt_token_ids": [1.5]}, "expected a list of integers"),
        ({"prompt_token_ids": [[1]]}, "expected a list of integers"),
        ({"prompt_token_ids": [VOCAB_SIZE]}, "expected 0 to"),
        ({"prompt_token_ids": [1, -1]}, "expected 0 to"),
        ({"prompt_token_ids": [1] * 256}, "maximum context length is 256"),
    ],
)
def test_a_bad_prompt_is_refused(llm: LLM, prompt: Any, message: str) -> None:
    prompts = ["a", prompt] if isinstance(prompt, str | dict) else ["a", *prompt]
    iterations = llm.engine.stats.iterations
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(prompts, GREEDY)
    assert caught.value.param == "prompt"
    assert llm.engine.stats.iterations == iterations  # nor was the good one run


@pytest.mark.parametrize(
    "fields", [{"stop_token_ids": [VOCAB_SIZE]}, {"logit_bias": {VOCAB_SIZE: 1.0}}]
)
def test_token_ids_of_parameters_are_checked(llm: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"token id {VOCAB_SIZE}; expected 0 to") as e:
        llm.generate("a", SamplingParams(**fields))
    assert e.value.param in fields


def test_values_as_large_as_they_come(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1e-45,
        top_k=10**30,
        min_p=1.0,
        min_tokens=10**30,
        max_tokens=None,
        seed=2**64 - 1,
    )
    (answer,) = llm.generate("a", params)[0].outputs
    assert answer.finish_reason == "length"
    (hot,) = llm.generate("a", SamplingParams(temperature=100, top_p=1e-45, seed=-(2**63)))
    assert len(hot.outputs[0].token_ids) == 16


def test_chat(llm: LLM) -> None:
    assert llm.tokenizer is not None
    one = [{"role": "user", "content": "def f(x):"}]
    two = [*one, {"role": "assistant", "content": "    return x"}, *one]
    outputs = llm.chat([one, two], GREEDY)
    assert outputs[0].prompt_token_ids == llm.tokenizer.apply_chat_template(one)
    assert outputs[1].prompt_token_ids == llm.tokenizer.apply_chat_template(two)
    (alone,) = llm.chat(one, GREEDY)
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert alone.outputs[0].text == outputs[0].outputs[0].text


@pytest.mark.parametrize("messages", [[{"role": "nobody", "content": "x"}], [{"role": 3}], [{}]])
def test_messages_that_the_template_refuses(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.chat(messages)
    assert caught.value.param in ("messages", "prompt")


def test_without_a_tokenizer(tiny_checkpoint: MakeCheckpoint) -> None:
    llm = LLM(str(tiny_checkpoint("llama3")), skip_tokenizer_init=True, kv_cache_tokens=512)
    (output,) = llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(logprobs=2))
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 16
    with pytest.raises(InvalidRequestError, match="there is no tokenizer; give prompt_token_ids"):
        llm.generate("text")
    with pytest.raises(InvalidRequestError, match="stop needs a tokenizer; use stop_token_ids"):
        llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(stop="x"))
    with pytest.raises(InvalidRequestError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "x"}])
    assert_clean(llm)


def test_shutdown(tiny_checkpoint: MakeCheckpoint) -> None:
    with LLM(str(tiny_checkpoint("llama3")), skip_tokenizer_init=True, kv_cache_tokens=512) as llm:
        llm.generate({"prompt_token_ids": [1]})
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(NanoFlowError, match="was shut down; make a new one"):
        llm.generate({"prompt_token_ids": [1]})


def test_options_are_those_of_the_engine(tiny_checkpoint: MakeCheckpoint) -> None:
    path = str(tiny_checkpoint("llama3"))
    with pytest.raises(TypeError, match="tensor_parallel"):
        LLM(path, skip_tokenizer_init=True, tensor_parallel=2)
    with pytest.raises(NanoFlowError, match="max_model_len is 257; the model was made for"):
        LLM(path, skip_tokenizer_init=True, max_model_len=257)
    with pytest.raises(NanoFlowError, match=r"has 2 pages of 16 tokens.*sequence of 64"):
        LLM(path, skip_tokenizer_init=True, max_model_len=64, kv_cache_tokens=32)
    with pytest.raises(NanoFlowError, match="has 0 pages of 16 tokens"):
        LLM(path, skip_tokenizer_init=True, kv_cache_tokens=15)
    with pytest.raises(NanoFlowError, match=r"kv_cache_tokens is 64 and .* both size the KV cache"):
        LLM(path, skip_tokenizer_init=True, kv_cache_tokens=64, kv_device_bytes=1 << 20)
    with pytest.raises(NanoFlowError, match=r"do not fit; set kv_device_bytes to \d+ .* or less"):
        LLM(path, skip_tokenizer_init=True, kv_device_bytes=1 << 50)
    small = LLM(path, skip_tokenizer_init=True, kv_cache_tokens=40)  # with a warning
    assert small.engine.info.max_model_len == 32
    page_bytes = 3 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, head_dim, float32
    small = LLM(path, skip_tokenizer_init=True, kv_device_bytes=5 * page_bytes - 1)
    assert small.engine.info.num_pages == 4


class StopHere(BaseException):
    """Stands for the Ctrl-C of a user."""


ERRORS = [KeyboardInterrupt, StopHere, RuntimeError]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("iteration", [0, 1, 2, 9])
def test_an_interrupted_call_leaves_nothing_behind(
    llm: LLM, uncached: LLM, error: type[BaseException], iteration: int
) -> None:
    """In the first chunk, in a later one while others wait, or while others decode."""
    generator = np.random.default_rng([iteration, ERRORS.index(error)])  # no prompt is cached yet
    numbers = generator.integers(0, VOCAB_SIZE, (5, 100)).tolist()
    prompts = [{"prompt_token_ids": prompt} for prompt in numbers]
    calls = 0

    def interrupt(layer: int, edges: object) -> None:
        nonlocal calls
        calls += layer == 1
        if calls > iteration:
            raise error

    hooks = llm.engine.executor.before_layer
    hooks.append(interrupt)
    try:
        with pytest.raises(error):
            llm.generate(prompts, GREEDY)
    finally:
        hooks.remove(interrupt)
    assert_clean(llm)
    assert tokens_of(llm, prompts) == tokens_of(uncached, prompts)


def test_the_default_cache_holds_every_sequence_in_whole_pages(
    tiny_checkpoint: MakeCheckpoint,
) -> None:
    path = str(tiny_checkpoint("llama3"))
    llm = LLM(path, skip_tokenizer_init=True, max_model_len=100, max_num_seqs=1)
    assert (llm.engine.info.max_model_len, llm.engine.info.num_pages) == (100, 7)
    assert llm.engine.stats.iterations == 0  # the warm-up does not count


@pytest.mark.parametrize(
    "option",
    [{"device": "auto:1"}, {"device": "cpu:x"}, {"max_num_seqs": "4"}, {"page_size": 2.5}],
    ids=str,
)
def test_an_option_of_the_wrong_kind_is_named(option: dict[str, object]) -> None:
    with pytest.raises(NanoFlowError, match=next(iter(option))):
        LLM("anywhere", skip_tokenizer_init=True, **option)

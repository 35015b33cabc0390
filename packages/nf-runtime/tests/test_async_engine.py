"""The engine in its own process: the tokens of the offline API, streamed to many at once."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from nf_runtime import (
    LLM,
    AsyncEngine,
    ContextLengthExceededError,
    EngineConfig,
    InvalidRequestError,
    OverloadedError,
    RequestOutput,
    RequestStream,
    SamplingParams,
)
from nf_runtime.engine_types import EngineStats

pytestmark = pytest.mark.asyncio(loop_scope="module")

MakeCheckpoint = Callable[..., Path]
DEMO = Path(__file__).parents[3] / "models" / "nanoflow-demo"
VOCAB_SIZE = json.loads((DEMO / "config.json").read_text())["vocab_size"]
OPTIONS: dict[str, Any] = {
    "tokenizer": str(DEMO),
    "kv_cache_tokens": 32768,
    "max_num_batched_tokens": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: MakeCheckpoint) -> Path:
    """A random model with the demo model's vocabulary, which can talk for long."""
    return tiny_checkpoint("llama3", vocab_size=VOCAB_SIZE, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), **OPTIONS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(checkpoint: Path) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(EngineConfig(model=str(checkpoint), **OPTIONS))
    yield engine
    await engine.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    """The shared engine, idle after every test."""
    yield shared
    # An iteration that was started ahead may still run.
    await until(lambda: shared.stats.kv_pages_used == 0)
    assert shared.stats.num_running == shared.stats.num_waiting == 0
    assert shared.is_alive


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def read(stream: RequestStream) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    async for deltas in stream:
        assert deltas
        for delta in deltas:
            choice = choices.setdefault(delta.index, {"text": "", "token_ids": [], "logprobs": []})
            assert "finish_reason" not in choice
            choice["text"] += delta.text
            choice["token_ids"] += delta.token_ids
            choice["logprobs"] += delta.logprobs or []
            if delta.finish_reason is not None:
                choice["finish_reason"] = delta.finish_reason
                choice["stop_reason"] = delta.stop_reason
    return [choices[index] for index in sorted(choices)]


def assert_equal(choices: list[dict[str, Any]], output: RequestOutput) -> None:
    for choice, answer in zip(choices, output.outputs, strict=True):
        assert choice["token_ids"] == answer.token_ids
        assert choice["text"] == answer.text
        assert choice["finish_reason"] == answer.finish_reason
        assert choice["stop_reason"] == answer.stop_reason
        assert [list(row) for row in choice["logprobs"]] == [
            list(row) for row in answer.logprobs or []
        ]


async def test_what_it_says_of_itself(engine: AsyncEngine, checkpoint: Path, llm: LLM) -> None:
    theirs = llm.engine.info
    assert engine.info.model == str(checkpoint)
    assert engine.info.vocab_size == VOCAB_SIZE
    assert engine.info.max_model_len == theirs.max_model_len == 4096
    assert engine.info.num_pages == theirs.num_pages == 2048
    assert engine.info.dtype == theirs.dtype == "float32"
    assert engine.info.weight_bytes == theirs.weight_bytes
    assert set(engine.info.startup_seconds) == {
        *("import", "weights", "kv_cache", "compile", "warm_up"),
    }
    assert all(seconds >= 0 for seconds in engine.info.startup_seconds.values())
    assert engine.dead_reason is None
    assert engine.tokenizer.has_chat_template


async def test_many_streams_at_once(engine: AsyncEngine, llm: LLM) -> None:
    generator = np.random.default_rng(0)
    lengths = (1, 100, 7, 16, 33, 64, 5, 17) * 2
    prompts = [generator.integers(0, VOCAB_SIZE, n).tolist() for n in lengths]
    params = [SamplingParams(temperature=0, max_tokens=10 + 2 * i) for i in range(16)]
    expected = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    streams = [engine.submit(p, s) for p, s in zip(prompts, params, strict=True)]
    assert len({stream.request_id for stream in streams}) == 16
    for stream, choices, output in zip(
        streams, await asyncio.gather(*map(read, streams)), expected, strict=True
    ):
        assert_equal(choices, output)
        assert stream.usage.prompt_tokens == len(output.prompt_token_ids)
        assert stream.usage.completion_tokens == len(output.outputs[0].token_ids)
        (ledger,) = stream.ledger
        assert ledger.output_tokens == stream.usage.completion_tokens
    assert engine.stats.iterations > 10


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "seed": 4},
        {"temperature": 0, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0, "logit_bias": {7: 100.0}, "stop_token_ids": [7], "min_tokens": 2},
        {"seed": 1, "repetition_penalty": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"temperature": 1e-45, "top_k": 10**30, "seed": 2**64 - 1, "min_tokens": 12},
    ],
    ids=lambda fields: ",".join(fields),
)
async def test_every_parameter_arrives(
    engine: AsyncEngine, llm: LLM, fields: dict[str, Any]
) -> None:
    params = SamplingParams(**({"max_tokens": 12} | fields))
    prompt = engine.tokenizer.encode("def f(x):\n")
    (output,) = llm.generate({"prompt_token_ids": prompt}, params)
    stream = engine.submit(prompt, params)
    assert_equal(await read(stream), output)
    assert (stream.prompt_logprobs is None) == (output.prompt_logprobs is None)
    for mine, theirs in zip(
        stream.prompt_logprobs or [], output.prompt_logprobs or [], strict=True
    ):
        assert (mine and list(mine.items())) == (theirs and list(theirs.items()))


async def test_tokens_come_one_by_one(engine: AsyncEngine) -> None:
    """Whoever reads at once gets many small deltas, not one at the end."""
    stream = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=200))
    sizes = [len(delta.token_ids) async for deltas in stream for delta in deltas]
    assert sum(sizes) == 200
    assert len(sizes) > 10


async def test_a_slow_reader_gets_joined_deltas(engine: AsyncEngine, llm: LLM) -> None:
    """It holds up nobody: the engine has finished before the first read."""
    params = SamplingParams(n=2, seed=9, max_tokens=40, logprobs=0)
    stream = engine.submit([1, 2, 3], params, "slow")
    await until(lambda: stream.usage.completion_tokens == 80)
    deltas = await anext(stream)
    assert sorted(delta.index for delta in deltas) == [0, 1]
    assert all(len(delta.token_ids) == len(delta.logprobs or []) == 40 for delta in deltas)
    assert {delta.finish_reason for delta in deltas} == {"length"}
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    (output,) = llm.generate({"prompt_token_ids": [1, 2, 3]}, params)
    by_index = sorted(deltas, key=lambda delta: delta.index)
    assert [delta.token_ids for delta in by_index] == [a.token_ids for a in output.outputs]


@pytest.mark.parametrize("how", ["aclose", "abort"])
async def test_an_abort_frees_the_engine(engine: AsyncEngine, how: str) -> None:
    """The stream ends with what there was; every choice says that it was aborted."""
    params = SamplingParams(temperature=0, max_tokens=4000, n=2)
    streams = [engine.submit([1, 2, 3], params) for _ in range(4)]
    for stream in streams:
        await anext(stream)
    await until(lambda: engine.stats.num_running == 8)
    for stream in streams:
        if how == "aclose":
            await stream.aclose()
        else:
            engine.abort(stream.request_id)
    await until(lambda: engine.stats.num_running == 0, 5)
    for stream in streams:
        choices = await read(stream)
        assert [choice["finish_reason"] for choice in choices] == ["abort", "abort"]
        assert 0 < stream.usage.completion_tokens < 8000
        assert len(stream.ledger) == 2
        await stream.aclose()
    engine.abort("never heard of")


async def test_an_abort_within_the_prompt(engine: AsyncEngine) -> None:
    prompt = np.random.default_rng(1).integers(0, VOCAB_SIZE, 4000).tolist()  # in 63 chunks
    stream = engine.submit(prompt, SamplingParams(max_tokens=50))
    await stream.aclose()
    (choice,) = await read(stream)
    assert (choice["finish_reason"], choice["token_ids"], choice["text"]) == ("abort", [], "")


async def test_a_reader_that_is_cancelled_can_be_followed_by_another(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=1000))
    reader = asyncio.create_task(read(stream))
    await until(lambda: stream.usage.completion_tokens > 5)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    (choice,) = await read(stream)
    assert choice["finish_reason"] == "length"


async def test_a_request_id_is_used_once_at_a_time(engine: AsyncEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=30)
    first = engine.submit([1, 2], params, "mine")
    with pytest.raises(InvalidRequestError, match="request_id 'mine' is in use") as caught:
        engine.submit([1, 2], params, "mine")
    assert caught.value.param == "request_id"
    (expected,) = await read(first)
    for _ in range(3):
        again = engine.submit([1, 2], params, "mine")
        assert await read(again) == [expected]
    aborted = engine.submit([1, 2], params, "mine")
    await aborted.aclose()
    with pytest.raises(InvalidRequestError, match="in use"):  # until the engine has let go
        engine.submit([1, 2], params, "mine")
    await read(aborted)
    assert await read(engine.submit([1, 2], params, "mine")) == [expected]


async def test_a_stop_string_ends_the_request_in_the_engine(engine: AsyncEngine, llm: LLM) -> None:
    """Only the parent sees it, and the engine goes on for a moment; none of that is given out."""
    params = SamplingParams(temperature=0, max_tokens=150)
    prompt = [5] * 40
    text = llm.generate({"prompt_token_ids": prompt}, params)[0].outputs[0].text
    stop = next(text[i : i + 3] for i in range(20, len(text)) if text[i : i + 3].isascii())
    stopping = SamplingParams(temperature=0, max_tokens=150, stop=stop)
    (output,) = llm.generate({"prompt_token_ids": prompt}, stopping)
    for _ in range(2):
        stream = engine.submit(prompt, stopping)
        choices = await read(stream)
        assert_equal(choices, output)
        assert choices[0]["stop_reason"] == stop
        # The account is complete when the stream has ended.
        assert len(stream.ledger) == 1
        assert stream.usage.completion_tokens == len(output.outputs[0].token_ids) < 150
    assert stream.usage.cached_tokens == 32  # found in the cache the second time
    await until(lambda: engine.stats.num_running == 0, 5)


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        (["a"], {}, "prompt"),
        ([np.int32(1)], {}, "prompt"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1}}, "logit_bias"),
    ],
)
async def test_a_bad_request_is_refused_at_once(
    engine: AsyncEngine, prompt: Any, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine.submit(prompt, SamplingParams(**fields), "bad")
    assert caught.value.param == param
    (choice,) = await read(engine.submit([1], SamplingParams(max_tokens=1), "bad"))
    assert choice["finish_reason"] == "length"


async def test_a_prompt_that_is_too_long(engine: AsyncEngine) -> None:
    with pytest.raises(ContextLengthExceededError, match="4096 tokens, but the prompt has 4096"):
        engine.submit([1] * 4096, SamplingParams())
    (choice,) = await read(engine.submit([1] * 4095, SamplingParams()))
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (1, "length")


async def test_what_there_is_no_room_for_is_refused_at_once(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it is known here; who waits for KV is not in the queue."""
    config = dataclasses.replace(engine.config, max_num_queued_reqs=2, max_num_queued_tokens=50)
    monkeypatch.setattr(engine, "config", config)
    params = SamplingParams(max_tokens=1)

    def waits(num_waiting: int, num_restoring: int, queued_prompt_tokens: int) -> None:
        engine.stats = EngineStats(
            num_waiting=num_waiting,
            num_restoring=num_restoring,
            queued_prompt_tokens=queued_prompt_tokens,
        )

    waits(2, 0, 20)
    with pytest.raises(OverloadedError, match="0 are open, and max_num_queued_reqs is 2"):
        engine.submit([1], params)
    waits(1, 0, 20)
    with pytest.raises(OverloadedError, match="20 tokens are queued, this one has 31, and"):
        engine.submit([1] * 31, params)
    for prompt, waiting in (([1] * 30, (1, 0, 20)), ([1] * 51, (0, 0, 0)), ([1], (2, 1, 20))):
        waits(*waiting)
        (choice,) = await read(engine.submit(prompt, params))
        assert choice["finish_reason"] == "length"

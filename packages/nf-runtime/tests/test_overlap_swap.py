"""Plans are swapped while requests run: the same tokens, and none lost."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from nf_runtime import AsyncEngine, EngineConfig, RequestStream, SamplingParams
from nf_runtime.pipeline.plan import PlanError

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEMO = Path(__file__).parents[3] / "models" / "nanoflow-demo"
PROMPTS = [[5 + i, 7, 11 * i + 1] * (i + 1) for i in range(6)]
WORDS = ("nanoflow", "co-resident", "off", "nanoflow-4", "pd-multiplex")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_checkpoint: Callable[..., Path]) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(
        EngineConfig(
            model=str(tiny_checkpoint("llama3", vocab_size=4096, max_position_embeddings=1024)),
            tokenizer=str(DEMO),
            dtype="float32",
            device="cpu",
            overlap="off",
            timeline_every=1,
            kv_cache_tokens=8192,
            max_num_batched_tokens=32,
            enable_prefix_caching=False,
        )
    )
    yield engine
    await engine.shutdown()


async def read(stream: RequestStream) -> list[int]:
    return [token async for deltas in stream for delta in deltas for token in delta.token_ids]


def start(engine: AsyncEngine, max_tokens: int) -> list[RequestStream]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [engine.submit(prompt, params) for prompt in PROMPTS]


async def test_swaps_during_requests_change_and_lose_no_token(engine: AsyncEngine) -> None:
    wanted = await asyncio.gather(*map(read, start(engine, 200)))
    readers = [asyncio.create_task(read(stream)) for stream in start(engine, 200)]
    swaps = 0
    while not all(reader.done() for reader in readers):
        await engine.set_overlap(WORDS[swaps % len(WORDS)])
        swaps += 1
        await asyncio.sleep(0.02)
    assert swaps > len(WORDS)
    assert await asyncio.gather(*readers) == wanted
    assert [len(tokens) for tokens in wanted] == [200] * len(PROMPTS)


async def test_what_ran_by_which_plan_is_counted(engine: AsyncEngine) -> None:
    await engine.set_overlap("nanoflow")
    before = engine.stats
    await asyncio.gather(*map(read, start(engine, 20)))
    steps, old = engine.stats.overlap_steps, before.overlap_steps
    assert steps["nanoflow"]["planned"] > old["nanoflow"]["planned"]
    assert steps["sequential"]["reference"] > old["sequential"].get("reference", 0)
    total = sum(sum(reasons.values()) for reasons in steps.values())
    assert total >= engine.stats.iterations
    assert engine.stats.overlap_gain["nanoflow"] > 0


async def test_the_timeline_has_the_iterations_of_the_plans(engine: AsyncEngine) -> None:
    await asyncio.gather(*map(read, start(engine, 20)))
    trace = await engine.timeline()
    iterations = [event["args"] for event in trace["traceEvents"] if event["ph"] == "i"]
    assert {iteration["plan"] for iteration in iterations} >= {"nanoflow", "sequential"}
    for iteration in iterations:
        assert iteration["reason"]
        assert iteration["concurrency"] > 0
        assert min(iteration["idle_ms"].values()) >= 0
        assert iteration["flops_per_second"] > 0
        assert iteration["bytes_per_second"] > 0
    gains = [iteration["gain"] for iteration in iterations if iteration["plan"] == "nanoflow"]
    assert any(gain is not None and gain > 0 for gain in gains)
    assert any(event["ph"] == "X" for event in trace["traceEvents"])


async def test_a_word_that_is_no_plan_changes_nothing(engine: AsyncEngine) -> None:
    with pytest.raises(PlanError, match="overlap is 'nothing'"):
        await engine.set_overlap("nothing")
    for word in ("~no-such-user/plan.json", "x" * 5000):  # which no path can be
        with pytest.raises(PlanError, match="which is no file"):
            await engine.set_overlap(word)
    with pytest.raises(PlanError, match="two-batch"):
        await engine.set_overlap("two-batch")
    before = engine.stats.overlap_steps["nanoflow"]["planned"]
    await asyncio.gather(*map(read, start(engine, 5)))
    assert engine.stats.overlap_steps["nanoflow"]["planned"] > before


async def test_the_engine_says_which_plans_it_started_with(engine: AsyncEngine) -> None:
    assert engine.info.overlap == "off: sequential"
    assert list(engine.info.startup_seconds) == [
        *("import", "weights", "kv_cache", "compile", "warm_up"),
    ]

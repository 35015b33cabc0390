"""Several ranks give the tokens of one, and the end of one of them ends the engine."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_runtime import LLM, AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from nf_runtime.errors import EngineDeadError, ModelLoadError
from nf_runtime.ranks.frames import pack_iteration, unpack_iteration
from nf_runtime.replay import Replay
from nf_scheduler import Batch

MakeCheckpoint = Callable[..., Path]
VOCAB_SIZE = 201  # which no number of ranks divides


def ranks_of(pid: int) -> dict[str, int]:
    """Processes of other ranks that a process has started and that have not ended, by name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = stat.read_text().rpartition(")")
        except OSError:
            continue
        number, _, name = head.partition(" (")
        state, parent = tail.split()[:2]
        if int(parent) == pid and state != "Z" and name.startswith("nanoflow-rank"):
            found[name] = int(number)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not ranks_of(os.getpid())


def load(path: Path, size: int, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_tokens": 192}
    defaults |= {"max_model_len": 128, "max_num_batched_tokens": 48, "max_prefill_chunk": 13}
    return LLM(
        str(path),
        skip_tokenizer_init=True,
        admission="greedy",
        tensor_parallel_size=size,
        **defaults | options,
    )


# Tokens

_random = np.random.default_rng(0)
SHARED = _random.integers(0, VOCAB_SIZE, 32).tolist()
PROMPTS = [
    SHARED[: 16 * (i % 3)] + _random.integers(0, VOCAB_SIZE, length).tolist()
    for i, length in enumerate((1, 15, 16, 17, 40, 7))
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=5, max_tokens=24, n=2, ignore_eos=True),
    SamplingParams(
        temperature=0.7,
        seed=9,
        top_k=20,
        max_tokens=20,
        repetition_penalty=1.2,
        logprobs=2,
        prompt_logprobs=1,
        ignore_eos=True,
    ),
]


def run(llm: LLM) -> list[RequestOutput]:
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        [PARAMS[i % 3] for i in range(len(PROMPTS))],
    )


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    return [
        logprob.logprob
        for output in outputs
        for row in [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
        for logprob in (row or {}).values()
    ]


CASES: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
    ("llama-biased", {}, 2, {}),
    ("llama-biased", {}, 2, {"tensor_parallel_output": "all_gather", "async_scheduling": False}),
    ("qwen3", {}, 4, {"tensor_parallel_output": "all_gather"}),  # two ranks to a KV head
    ("mixtral", {}, 2, {"native_kernels": False}),
    ("mixtral", {}, 4, {"expert_parallel": True, "async_scheduling": False}),
    ("qwen3-moe-sparse", {}, 2, {"expert_parallel": True}),
]


@pytest.mark.parametrize(
    ("family", "shape", "size", "options"),
    CASES,
    ids=[f"{family}-{size}-{'-'.join(options)}" for family, _, size, options in CASES],
)
def test_several_ranks_give_the_tokens_of_one(
    family: str,
    shape: dict[str, Any],
    size: int,
    options: dict[str, Any],
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    """With shared prefixes, forks, chunked prompts and preemptions, one iteration ahead or not."""
    path = tiny_checkpoint(family, vocab_size=VOCAB_SIZE, **shape)
    plain = {"native_kernels"} & options.keys()
    with load(path, 1, **{name: options[name] for name in plain}) as llm:
        expected = run(llm)
    with load(path, size, replay_log_dir=str(tmp_path), **options) as llm:
        engine = llm.engine
        assert sorted(ranks_of(os.getpid())) == [f"nanoflow-rank-{i}" for i in range(1, size)]
        for _ in range(2):  # the second time with a cache that is full
            outputs = run(llm)
            assert tokens(outputs) == tokens(expected)
            np.testing.assert_allclose(logprobs(outputs), logprobs(expected), atol=1e-3)
        stats = engine.stats
        assert stats.preemptions > 0
        assert stats.prefix_hit_tokens > 0
        assert (stats.iterations_ahead > 20) == options.get("async_scheduling", True)
        engine.kv_cache.check_integrity()
    (log,) = tmp_path.iterdir()
    replay = Replay(str(log))
    assert sum(1 for _ in replay.steps()) > 20
    assert replay.report.divergence is None


def test_an_iteration_travels() -> None:
    batch = Batch(
        iteration=7,
        request_ids=["a", "größer"],
        slots=np.array([3, 1], dtype=np.int32),
        num_decodes=1,
        query_start=np.array([0, 1, 4], dtype=np.int32),
        context_lens=np.array([9, 0], dtype=np.int32),
        token_ids=np.array([-1, 5, 6, 7], dtype=np.int32),
        samples=np.array([True, False]),
    )
    tables = np.array([[4, 2, 0], [1, 0, 0]], dtype=np.int32)
    rows = np.array([2, 3])
    got = unpack_iteration(pack_iteration(batch, tables, rows))
    assert got[0] == batch
    assert np.array_equal(got[1], tables)
    assert np.array_equal(got[2], rows)


def test_more_than_two_ranks_are_not_deterministic(tiny_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ModelLoadError, match="sums over more than 2 ranks depend on what else"):
        load(tiny_checkpoint("llama3"), 4, deterministic=True)


def test_a_model_that_cannot_be_divided_starts_nothing(tiny_checkpoint: MakeCheckpoint) -> None:
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match="must divide the model's 4 attention heads"):
        load(tiny_checkpoint("llama3"), 3)
    assert time.monotonic() - started < 2


# Faults

FAILING = """
import os, sys
if "nf_runtime.ranks.process" in sys.orig_argv:
    import nf_runtime.loaded_model as loaded_model

    def fail(*arguments, **options):
        raise MemoryError("no room for the test")

    where = os.environ["FAIL_AT"]
    if where == "load":
        loaded_model.load_weights = fail
    else:
        loaded_model.Executor.launch = fail
"""


@pytest.mark.parametrize("where", ["load", "launch"])
def test_a_rank_that_fails_to_start_is_named(
    where: str, tiny_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAIL_AT", where)
    expected = "^rank 1 of 2 failed: MemoryError: no room for the test$"
    with pytest.raises(ModelLoadError, match=expected):
        load(tiny_checkpoint("llama3"), 2)


def test_a_rank_that_is_killed_while_it_loads_is_named(tiny_checkpoint: MakeCheckpoint) -> None:
    path = tiny_checkpoint("llama3")
    killer = threading.Thread(
        target=lambda: os.kill(
            wait_for(lambda: ranks_of(os.getpid()))["nanoflow-rank-1"], signal.SIGKILL
        )
    )
    killer.start()
    with pytest.raises(ModelLoadError, match=r"^rank 1 of 2 was killed by signal 9$"):
        load(path, 2)
    killer.join()


def test_a_rank_that_is_killed_in_the_middle_is_named(tiny_checkpoint: MakeCheckpoint) -> None:
    params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
    path = tiny_checkpoint("llama3", max_position_embeddings=8192)
    size = {"max_model_len": 8192, "kv_cache_tokens": 8192}
    with load(path, 4, **size) as llm:
        victim = ranks_of(os.getpid())["nanoflow-rank-2"]
        timer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
        timer.start()
        with pytest.raises(EngineDeadError, match=r"^rank 2 of 4 was killed by signal 9$"):
            llm.generate({"prompt_token_ids": [1, 2, 3]}, params)
        ended = time.monotonic()
        timer.join()
        wait_for(lambda: not ranks_of(os.getpid()), 5)
        with pytest.raises(EngineDeadError, match="rank 2 of 4 was killed"):
            llm.generate({"prompt_token_ids": [1, 2, 3]}, params)
        assert time.monotonic() - ended < 5


async def test_an_engine_ends_with_its_ranks_and_they_with_it(
    tiny_checkpoint: MakeCheckpoint,
) -> None:
    path = tiny_checkpoint("llama3")
    config = EngineConfig(
        model=str(path), tensor_parallel_size=2, kv_cache_tokens=512, max_model_len=128
    )
    demo = Path(__file__).parents[3] / "models" / "nanoflow-demo"
    config = EngineConfig(**config.to_dict() | {"tokenizer": str(demo)})

    async def start() -> tuple[AsyncEngine, int]:
        engine = await AsyncEngine.start(config)
        return engine, ranks_of(engine.pid)["nanoflow-rank-1"]

    def is_there(pid: int) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and ") Z " not in stat.read_text()

    (idle, rank_of_idle), (killed, rank_of_killed) = await asyncio.gather(start(), start())
    stream = idle.submit([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    assert sum([len(d.token_ids) async for deltas in stream for d in deltas]) == 3
    os.kill(rank_of_idle, signal.SIGKILL)
    reason = await asyncio.wait_for(idle.wait_dead(), 10)
    assert reason == "the engine failed: rank 1 of 2 was killed by signal 9"
    os.kill(killed.pid, signal.SIGKILL)
    await asyncio.wait_for(killed.wait_dead(), 10)
    await asyncio.to_thread(wait_for, lambda: not is_there(rank_of_killed), 5)
    for engine in (idle, killed):
        await engine.shutdown()

"""Several ranks give the tokens of one, and the end of one of them ends the engine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed

from nf_kernels.collectives import connect
from nf_runtime import LLM, AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from nf_runtime.errors import EngineDeadError, ModelLoadError
from nf_runtime.loaded_model import load_model
from nf_runtime.measured import Load
from nf_runtime.parallelism import OUTPUTS
from nf_runtime.pipeline.plan import PlanError, for_all_batches
from nf_runtime.pipeline.policy import OverlapPolicy
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.probe import Probe
from nf_runtime.ranks.following_sampler import FollowingSampler
from nf_runtime.ranks.frames import pack_iteration, unpack_iteration
from nf_runtime.replay import Replay
from nf_runtime.sampler import RequestSampling, Sampler
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
    SamplingParams(temperature=0, max_tokens=18, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=5, max_tokens=14, n=2, ignore_eos=True),
    SamplingParams(
        temperature=0.7,
        seed=9,
        top_k=20,
        max_tokens=10,
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


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama-biased", 2, {}),
    (
        "llama-biased",
        2,
        {
            "tensor_parallel_output": "all_gather",
            "async_scheduling": False,
            "native_kernels": False,
        },
    ),
    ("mixtral", 2, {"native_programs": False}),
    ("qwen3-moe-sparse", 2, {"expert_parallel": True, "async_scheduling": False}),
]


@pytest.mark.parametrize(
    ("family", "size", "options"),
    CASES,
    ids=[f"{family}-{size}-{'-'.join(options)}" for family, size, options in CASES],
)
def test_several_ranks_give_the_tokens_of_one(
    family: str,
    size: int,
    options: dict[str, Any],
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    check_tokens(tiny_checkpoint(family, vocab_size=VOCAB_SIZE), size, options, tmp_path).shutdown()


def check_tokens(path: Path, size: int, options: dict[str, Any], logs: Path) -> LLM:
    """With shared prefixes, forks, chunked prompts and preemptions, one iteration ahead or not."""
    plain = {"native_kernels"} & options.keys()
    with load(path, 1, **{name: options[name] for name in plain}) as llm:
        expected = run(llm)
    llm = load(path, size, replay_log_dir=str(logs), **options)
    engine = llm.engine
    assert sorted(ranks_of(os.getpid())) == [f"nanoflow-rank-{i}" for i in range(1, size)]
    for _ in range(2 if size == 2 else 1):  # the second time with a cache that is full
        outputs = run(llm)
        assert tokens(outputs) == tokens(expected)
        np.testing.assert_allclose(logprobs(outputs), logprobs(expected), atol=1e-3)
    stats = engine.stats
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert (stats.iterations_ahead > 20) == options.get("async_scheduling", True)
    engine.kv_cache.check_integrity()
    (log,) = logs.iterdir()
    replay = Replay(str(log))
    assert sum(1 for _ in replay.steps()) > 20
    assert replay.report.divergence is None
    return llm


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
    got = unpack_iteration(pack_iteration(batch, tables, rows, 5))
    assert got[0] == batch
    assert np.array_equal(got[1], tables)
    assert np.array_equal(got[2], rows)
    assert got[3] == 5


def test_more_than_two_ranks_are_not_deterministic(tiny_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(ModelLoadError, match="sums over more than 2 ranks depend on what else"):
        load(tiny_checkpoint("llama3"), 4, deterministic=True)


def test_a_model_that_cannot_be_divided_starts_nothing(tiny_checkpoint: MakeCheckpoint) -> None:
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match="must divide the model's 4 attention heads"):
        load(tiny_checkpoint("llama3"), 3)
    assert time.monotonic() - started < 2


def test_collectives_of_nano_batches(tiny_checkpoint: MakeCheckpoint) -> None:
    """On a lane of their own, on ranges of rows: both ranks, here as threads, get the same."""
    path = tiny_checkpoint("qwen3-moe-sparse", vocab_size=VOCAB_SIZE)
    lengths = [3, 9, 14, 6]
    starts = np.cumsum([0, *lengths])
    batch = Batch(
        iteration=0,
        request_ids=[str(i) for i in range(4)],
        slots=np.arange(4, dtype=np.int32),
        num_decodes=0,
        query_start=starts.astype(np.int32),
        context_lens=np.zeros(4, dtype=np.int32),
        token_ids=np.random.default_rng(1).integers(0, VOCAB_SIZE, starts[-1]).astype(np.int32),
        samples=np.ones(4, dtype=bool),
    )
    page_tables = np.arange(4, dtype=np.int32).reshape(4, 1)
    stores = {output: torch.distributed.HashStore() for output in OUTPUTS}

    def run_rank(rank: int, output: str) -> list[list[int]]:
        config = EngineConfig(
            model=str(path),
            tensor_parallel_size=2,
            tensor_parallel_output=output,
            max_num_batched_tokens=64,
        )
        loaded = load_model(config, rank)
        with connect(
            device="cpu", rank=rank, world_size=2, address=stores[output], timeout=30
        ) as communicator:
            kv_cache = loaded.make_kv_cache(4)
            sampler: Any = FollowingSampler(loaded.device)
            if rank == 0:
                size = {"vocab_size": VOCAB_SIZE, "max_requests": 8}
                sampler = Sampler(loaded.operations, device=loaded.device, **size)
                for name in batch.request_ids:
                    greedy = RequestSampling(
                        SamplingParams(temperature=0), 0, batch.token_ids[:1], frozenset()
                    )
                    sampler.add(name, greedy)
            executor = loaded.make_executor(kv_cache.layers, sampler, 64, communicator=communicator)
            sampled = []
            for name in ("sequential", "two-batch", "nanoflow"):
                plans = for_all_batches(TEMPLATES[name](loaded.graph))
                executor.set_policy(OverlapPolicy(loaded.graph, plans))
                executor.launch(batch, page_tables)
                sampled.append(executor.poll().result.token_ids.tolist())
            plans = for_all_batches(TEMPLATES["co-resident"](loaded.graph))
            with pytest.raises(PlanError, match="collectives on the lanes first, second"):
                executor.set_policy(OverlapPolicy(loaded.graph, plans))
            executor.close()
        return sampled

    with ThreadPoolExecutor(4) as pool:
        both = [pool.submit(run_rank, rank, output) for output in OUTPUTS for rank in (0, 1)]
        first, *others = [result.result() for result in both]
    assert first[0] == first[1] == first[2]
    assert len(set(first[0])) > 1
    assert all(other == first for other in others)


def test_swapped_plans_and_their_lanes_are_given_up_on_all_ranks(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    llm = load(
        tiny_checkpoint("mixtral", vocab_size=VOCAB_SIZE), 2, overlap="off", kv_cache_tokens=2048
    )
    with llm:
        group: Any = llm.engine._group
        own, other = (
            Path(f"/proc/{pid}/task") for pid in (os.getpid(), *ranks_of(os.getpid()).values())
        )
        expected = tokens(run(llm))
        without, plans = len(list(other.iterdir())), [len(group._plans)]
        threads = []
        for turn in range(6):
            plan = TEMPLATES["nanoflow"](llm.engine.graph)
            lanes = tuple(
                lane.model_copy(update={"share": 0.2 + turn / 10 * (i % 2)})
                for i, lane in enumerate(plan.lanes)
            )
            path = tmp_path / f"{turn}.json"
            path.write_text(plan.model_copy(update={"lanes": lanes}).model_dump_json())
            llm.engine.set_overlap(str(path))
            assert tokens(run(llm)) == expected
            threads.append(tuple(len(list(tasks.iterdir())) for tasks in (own, other)))
            plans.append(len(group._plans))
        assert all(many[0] <= threads[0][0] and many[1] == threads[0][1] for many in threads)
        assert threads[0][1] > without
        assert max(plans) <= 2
        with pytest.raises(PlanError, match="collectives on the lanes first, second"):
            llm.engine.set_overlap("co-resident")
        llm.engine.set_overlap("off")
        assert tokens(run(llm)) == expected
        assert len(list(other.iterdir())) == without


def test_the_network_between_ranks_is_measured(tiny_checkpoint: MakeCheckpoint) -> None:
    path = tiny_checkpoint("llama-biased", vocab_size=VOCAB_SIZE)
    with load(path, 2, overlap="off", kv_cache_tokens=2048) as llm:
        expected = tokens(run(llm))  # of which the last iterations may still be waited for
        probe = Probe(llm.engine)
        assert probe.peaks.sent_per_second > 0
        plan = TEMPLATES["two-batch"](llm.engine.graph)
        sequential, measured = probe.measure([plan], Load(6, 20, 12), rounds=6)
        with pytest.raises(PlanError, match="collectives on the lanes first, second"):
            probe.measure([TEMPLATES["co-resident"](llm.engine.graph)], Load(6, 20, 12), rounds=1)
        probe.close()
        for one in (sequential, measured):
            assert one.network is not None
            assert one.network > 0
        assert sequential.overlaps == 0
        assert measured.overlaps > 0
        used = measured.traces[0].summary(probe.utilisation)
        assert used["network"] * probe.peaks.sent_per_second == pytest.approx(
            used["sent_per_second"]
        )
        assert tokens(run(llm)) == expected


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
        setattr(loaded_model.Executor, where, fail)
"""


STAYING = """
import sys, time
if "nf_runtime.ranks.process" in sys.orig_argv:
    import nf_runtime.loaded_model as loaded_model

    loaded_model.Executor.close = lambda executor: time.sleep(60)
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


def test_a_rank_that_is_killed_in_the_middle_is_named(
    tiny_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Of four, of which the others fail because of it; before, they give the tokens of one.

    There are two ranks to a KV head.
    """
    options = {"expert_parallel": True, "tensor_parallel_output": "all_gather"}
    llm = check_tokens(tiny_checkpoint("mixtral", vocab_size=VOCAB_SIZE), 4, options, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    prompts = [{"prompt_token_ids": [1, 2, 3]}] * 100
    with llm:
        victim = ranks_of(os.getpid())["nanoflow-rank-2"]
        timer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
        timer.start()
        with pytest.raises(EngineDeadError, match=r"^rank 2 of 4 was killed by signal 9$"):
            llm.generate(prompts, params)
        ended = time.monotonic()
        timer.join()
        wait_for(lambda: not ranks_of(os.getpid()), 5)
        with pytest.raises(EngineDeadError, match="rank 2 of 4 was killed"):
            llm.generate(prompts, params)
        assert time.monotonic() - ended < 5


async def test_an_idle_engine_ends_with_a_rank(tiny_checkpoint: MakeCheckpoint) -> None:
    engine = await AsyncEngine.start(
        EngineConfig(
            model=str(tiny_checkpoint("llama3")),
            tokenizer=str(Path(__file__).parents[3] / "models" / "nanoflow-demo"),
            tensor_parallel_size=2,
            kv_cache_tokens=512,
            max_model_len=128,
        )
    )
    stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    assert sum([len(d.token_ids) async for deltas in stream for d in deltas]) == 3
    os.kill(ranks_of(engine.pid)["nanoflow-rank-1"], signal.SIGKILL)
    reason = await asyncio.wait_for(engine.wait_dead(), 10)
    assert reason == "the engine failed: rank 1 of 2 was killed by signal 9"
    await engine.shutdown()


async def test_ranks_end_with_an_engine_that_is_killed(tiny_checkpoint: MakeCheckpoint) -> None:
    engine = await AsyncEngine.start(
        EngineConfig(
            model=str(tiny_checkpoint("llama3")),
            tokenizer=str(Path(__file__).parents[3] / "models" / "nanoflow-demo"),
            tensor_parallel_size=2,
            kv_cache_tokens=512,
            max_model_len=128,
        )
    )
    rank = Path(f"/proc/{ranks_of(engine.pid)['nanoflow-rank-1']}")
    engine.submit([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))
    os.kill(engine.pid, signal.SIGKILL)
    wait_for(lambda: not rank.exists(), 5)
    await engine.shutdown()


def said_by_the_group(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "nf_runtime.ranks.group" and record.levelno >= logging.WARNING
    ]


def test_ranks_end_in_order(
    tiny_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    llm = load(tiny_checkpoint("llama3", vocab_size=VOCAB_SIZE), 2)
    group: Any = llm.engine._group
    ranks = [member.process for member in group._members]
    run(llm)
    started = time.monotonic()
    llm.shutdown()
    assert time.monotonic() - started < 8  # none had to be killed
    assert [rank.returncode for rank in ranks] == [0]
    assert not said_by_the_group(caplog)


def test_ranks_that_have_not_started_end_at_once(tiny_checkpoint: MakeCheckpoint) -> None:
    """There is no room for what was asked for, which shows before they are told to start."""
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match="of KV do not fit"):
        load(tiny_checkpoint("llama3"), 2, kv_cache_tokens=1 << 40)
    assert time.monotonic() - started < 8


def test_a_rank_that_fails_at_its_end_says_why(
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAIL_AT", "close")
    with load(tiny_checkpoint("llama3", vocab_size=VOCAB_SIZE), 2) as llm:
        run(llm)
    assert "rank 1 of 2 failed: MemoryError: no room for the test" in caplog.text


def test_an_interrupted_measurement_of_the_network_ends_the_ranks(
    tiny_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(tiny_checkpoint("llama3", vocab_size=VOCAB_SIZE), 2)
    (rank,) = ranks_of(os.getpid()).values()
    measure = llm.engine.executor.measure

    def interrupted(measurement: Any) -> Any:
        if isinstance(measurement, partial):  # of the network, in which the other rank is now
            raise KeyboardInterrupt
        return measure(measurement)

    monkeypatch.setattr(llm.engine.executor, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.engine.measure_peaks()
    started = time.monotonic()
    llm.shutdown()
    assert time.monotonic() - started < 5
    assert not Path(f"/proc/{rank}").exists()


def test_a_rank_that_does_not_end_is_killed(
    tiny_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("nf_runtime.ranks.group._STOP_SECONDS", 1.0)
    (tmp_path / "sitecustomize.py").write_text(STAYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    llm = load(tiny_checkpoint("llama3"), 2)
    llm.shutdown()
    assert said_by_the_group(caplog) == ["rank 1 of 2 was killed by signal 9"]


def test_a_rank_ends_with_rank_0() -> None:
    """However that has ended, and whatever the rank is waiting for."""
    ours, theirs = socket.socketpair()
    with theirs:
        rank = subprocess.Popen(
            [sys.executable, "-m", "nf_runtime.ranks.process", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
        )
    ours.close()
    assert rank.wait(20) == 1

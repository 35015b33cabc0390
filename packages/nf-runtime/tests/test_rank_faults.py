"""The end of a rank ends the engine, which says which one it was and why."""

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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranked_llm import VOCAB_SIZE, check_tokens, load, ranks_of, run, wait_for

from nf_runtime import AsyncEngine, EngineConfig, SamplingParams
from nf_runtime.errors import EngineDeadError, ModelLoadError

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not ranks_of(os.getpid())


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


async def start_on_two_ranks(path: Path) -> AsyncEngine:
    return await AsyncEngine.start(
        EngineConfig(
            model=str(path),
            tokenizer=str(Path(__file__).parents[3] / "models" / "nanoflow-demo"),
            tensor_parallel_size=2,
            kv_cache_tokens=512,
            max_model_len=128,
        )
    )


async def test_an_idle_engine_ends_with_a_rank(tiny_checkpoint: MakeCheckpoint) -> None:
    engine = await start_on_two_ranks(tiny_checkpoint("llama3"))
    stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    assert sum([len(d.token_ids) async for deltas in stream for d in deltas]) == 3
    os.kill(ranks_of(engine.pid)["nanoflow-rank-1"], signal.SIGKILL)
    reason = await asyncio.wait_for(engine.wait_dead(), 10)
    assert reason == "the engine failed: rank 1 of 2 was killed by signal 9"
    await engine.shutdown()


async def test_ranks_end_with_an_engine_that_is_killed(tiny_checkpoint: MakeCheckpoint) -> None:
    engine = await start_on_two_ranks(tiny_checkpoint("llama3"))
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

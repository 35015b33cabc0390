"""What scheduling costs, what running ahead of the device saves, what prediction is worth."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nf_kvcache import KVCache, KVLayout
from nf_runtime import LLM, EngineConfig, SamplingParams
from nf_runtime.engine_types import EngineRequest
from nf_runtime.iteration_output import IterationOutput
from nf_runtime.loop import IterationLoop
from nf_runtime.replay import Replay
from nf_runtime.replay.recorded_loop import RecordedLoop
from nf_runtime.replay.recorder import Recorder
from nf_runtime.scheduling import make_scheduler
from nf_scheduler import Batch, IterationResult, Request, Scheduler, SchedulerConfig
from nf_scheduler.sim import Simulation, SimulationConfig, load_cost, read_trace

PROMPT_TOKENS, STOPS = 512, frozenset({100_001, 100_002})


def busy_scheduler(running: int, queued: int) -> tuple[Scheduler, KVCache]:
    """`running` requests that decode beyond 512 tokens, and `queued` behind them."""
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float32)
    cache = KVCache(layout, running * (PROMPT_TOKENS // 16 + 40))
    config = SchedulerConfig(max_model_len=4096, max_num_batched_tokens=8192, max_num_seqs=running)
    scheduler = Scheduler(cache, config)
    rng = np.random.default_rng(0)
    for number in range(running + queued):
        prompt = rng.integers(0, 30_000, rng.integers(PROMPT_TOKENS - 64, PROMPT_TOKENS))
        scheduler.add(Request(f"request-{number}.0", prompt, 560, stop_token_ids=STOPS))
    while scheduler.num_running < running:
        finish(scheduler, scheduler.schedule())
    return scheduler, cache


def finish(scheduler: Scheduler, batch: Batch | None, token: int = 5) -> None:
    assert batch is not None
    scheduler.commit(IterationResult(batch.iteration, np.full(len(batch), token, dtype=np.int32)))


class PlainRequest:
    """What a scheduler keeps, as an object with a list of tokens and a list of pages."""

    def __init__(self, prompt_len: int) -> None:
        self.tokens = list(range(prompt_len))
        self.pages = list(range(-(-prompt_len // 16)))
        self.published = prompt_len // 16
        self.limit = prompt_len + 560


class PlainScheduler:
    """The same work for decodes alone, one request after the other: the twin to compare with."""

    def __init__(self, running: int) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.integers(PROMPT_TOKENS - 64, PROMPT_TOKENS, running)
        self.requests = [PlainRequest(int(length)) for length in lengths]
        self.free = list(range(10**6))
        self.index: dict[tuple[int, ...], int] = {}

    def iteration(self, token: int) -> int:
        rows = []
        for request in self.requests:
            if len(request.tokens) > len(request.pages) * 16:
                request.pages.append(self.free.pop())
            rows.append((request.tokens[-1], len(request.tokens) - 1))
        width = max(len(request.pages) for request in self.requests)
        table = np.array(
            [r.pages + [0] * (width - len(r.pages)) for r in self.requests], dtype=np.int32
        )
        ended = 0
        for request in self.requests:
            full = (len(request.tokens) - 1) // 16
            for page in range(request.published, full):
                key = tuple(request.tokens[page * 16 : (page + 1) * 16])
                self.index[key] = request.pages[page]
            request.published = max(request.published, full)
            request.tokens.append(token)
            if token in STOPS or len(request.tokens) == request.limit:
                ended += 1
        return ended + len(rows) + len(table)


@pytest.mark.parametrize(("running", "queued", "bar_ms"), [(256, 0, 0.3), (1024, 10_000, 1.0)])
def test_schedule_and_commit(benchmark: Any, running: int, queued: int, bar_ms: float) -> None:
    """CPU time of an iteration of decodes, one iteration ahead, with pages and page tables.

    Interleaved with the same work done by plain objects. The bar is for the mean over 200
    iterations, in the better half of nine rounds.
    """
    scheduler, cache = busy_scheduler(running, queued)
    plain = PlainScheduler(running)
    seconds: list[float] = []
    plain_seconds: list[float] = []

    def rounds() -> None:
        previous = scheduler.schedule()
        began = time.process_time()
        for _ in range(50):
            batch = scheduler.schedule()
            assert batch is not None
            cache.page_tables(batch.request_ids)
            finish(scheduler, previous)
            previous = batch
        seconds.append((time.process_time() - began) / 50)
        finish(scheduler, previous)
        began = time.process_time()
        for token in range(50):
            plain.iteration(token)
        plain_seconds.append((time.process_time() - began) / 50)

    benchmark.pedantic(rounds, rounds=9)
    mine, theirs = (float(np.median(values)) * 1e3 for values in (seconds, plain_seconds))
    benchmark.extra_info |= {
        "running": running,
        "queued": queued,
        "ms_per_iteration": mine,
        "ms_of_plain_objects": theirs,
        "ratio": theirs / mine,
        "us_per_request": mine * 1e3 / running,
    }
    assert len(scheduler.schedule() or []) == running
    assert mine <= bar_ms


class TimedDevice:
    """Takes 10 ms an iteration and no CPU; runs one after the other, as a stream does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.total = 0.0
        self._free = 0.0
        self._launched: deque[tuple[Batch, float]] = deque()

    def launch(self, batch: Batch, page_tables: np.ndarray, offload: Any = None) -> None:
        self._free = max(time.perf_counter(), self._free) + self.seconds
        self.total += self.seconds
        self._launched.append((batch, self._free))

    def poll(self) -> IterationOutput:
        batch, end = self._launched.popleft()
        threading.Event().wait(max(0.0, end - time.perf_counter() - 0.0005))
        while time.perf_counter() < end:
            pass
        token_ids = np.full(len(batch), 5, dtype=np.int32)
        return IterationOutput(IterationResult(batch.iteration, token_ids), {}, {})

    def drain(self) -> None:
        self._launched.clear()


def test_the_device_does_not_wait_for_the_cpu(benchmark: Any) -> None:
    """Wall time beside device time, 256 running: one iteration ahead, and none."""
    ratios: dict[int, list[float]] = {0: [], 1: []}

    def run(lag: int) -> None:
        scheduler, cache = busy_scheduler(256, 0)
        device = TimedDevice(0.010)
        loop = IterationLoop(scheduler, cache, device, lag=lag)
        began = time.perf_counter()
        for _ in range(200):
            loop.step()
        while loop.num_in_flight:
            loop.settle()
        ratios[lag].append((time.perf_counter() - began) / device.total)

    benchmark.pedantic(lambda: (run(1), run(0)), rounds=3)
    ahead, behind = (float(np.median(ratios[lag])) for lag in (1, 0))
    benchmark.extra_info |= {"wall_by_device_async": ahead, "wall_by_device_sync": behind}
    assert ahead <= 1.02
    assert ahead < behind


@pytest.mark.parametrize(
    ("model", "requests"), [("demo", 1), ("demo", 8), ("demo", 32), ("300m", 4), ("300m", 32)]
)
def test_running_ahead_where_the_device_is_the_cpu(
    benchmark: Any, demo_model_dir: Path, llama_300m_dir: Path, model: str, requests: int
) -> None:
    """Iterations of the asynchronous loop beside those of the synchronous one, in turn.

    Both engines decode all the time; a few iterations of one follow a few of the other, so that
    what else the machine does comes to both. Each goes on ahead before its time is taken.
    """
    models = [
        LLM(
            str(demo_model_dir if model == "demo" else llama_300m_dir),
            load_format="auto" if model == "demo" else "dummy",
            kv_cache_tokens=32768,
            enable_prefix_caching=False,
            async_scheduling=asynchronous,
        )
        for asynchronous in (False, True)
    ]
    engines = {bool(number): llm.engine for number, llm in enumerate(models)}
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    for engine in engines.values():
        for number in range(requests):
            engine.add(EngineRequest(f"r{number}", [number + 1] * 16, params, seed=0))
        while engine.stats.num_running < requests:
            engine.step()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    steps, rounds = (6, 110) if model == "demo" else (5, 50)

    def both() -> None:
        order = (False, True) if len(seconds[True]) % 2 else (True, False)
        for asynchronous in order:
            engine = engines[asynchronous]
            engine.step()
            engine.step()
            began = time.perf_counter()
            for _ in range(steps):
                engine.step()
            seconds[asynchronous].append((time.perf_counter() - began) / steps)
            while engine.loop.num_in_flight:
                engine.loop.settle()

    benchmark.pedantic(both, rounds=rounds, warmup_rounds=1)
    ratios = np.array(seconds[False]) / np.array(seconds[True])
    benchmark.extra_info |= {
        "model": model,
        "requests": requests,
        "async_by_sync": float(np.median(ratios)),
        "quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
        "async_ms_per_iteration": float(np.median(seconds[True])) * 1e3,
    }
    assert engines[True].stats.iterations_ahead > rounds * steps
    assert engines[False].stats.iterations_ahead == 0
    assert float(np.median(ratios)) >= 0.99


@pytest.mark.parametrize("running", [32, 256])
def test_a_replay_log(benchmark: Any, tmp_path: Path, running: int) -> None:
    """CPU time that a log costs an iteration of decodes, and how long the log gets."""
    engine = EngineConfig(
        model="none",
        max_num_batched_tokens=8192,
        max_num_seqs=running,
        replay_log_dir=str(tmp_path),
    )
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float32)
    seconds: dict[bool, list[float]] = {False: [], True: []}

    def run(recorded: bool) -> None:
        cache = KVCache(layout, running * 80)
        device = TimedDevice(0.0)
        recorder = Recorder(engine) if recorded else None
        clock = time.monotonic if recorder is None else recorder.clock
        scheduler = make_scheduler(engine, cache, 4096, clock)
        loop: IterationLoop
        if recorder is None:
            loop = IterationLoop(scheduler, cache, device, lag=1)
        else:
            recorder.begin(engine, cache, 4096)
            loop = RecordedLoop(recorder, scheduler, cache, device, lag=1)
        for number in range(running):
            loop.add(Request(f"request-{number}.0", np.arange(30 + number % 16), 1000))
        while scheduler.num_running < running:
            loop.step()
        began = time.process_time()
        for _ in range(400):
            loop.step()
        seconds[recorded].append((time.process_time() - began) / 400)

    benchmark.pedantic(lambda: (run(False), run(True)), rounds=5)
    log = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    report = Replay(log).run()
    assert report.divergence is None
    plain, recorded = (float(np.median(seconds[kind])) * 1e6 for kind in (False, True))
    benchmark.extra_info |= {
        "running": running,
        "us_per_iteration_more": recorded - plain,
        "us_per_iteration_without": plain,
        "bytes_per_iteration": log.stat().st_size / report.iterations,
    }


@pytest.mark.parametrize("cost", ["qwen3-30b-a3b-h200", "llama-3-8b-h200"])
def test_admission_by_predicted_peak(benchmark: Any, cost: str) -> None:
    """Beside reserving max_tokens, and beside an oracle that knows the lengths.

    The trace is that of NANOFLOW_SHAREGPT: a CSV file with TIMESTAMP, ContextTokens and
    GeneratedTokens.
    """
    path = os.environ.get("NANOFLOW_SHAREGPT")
    if path is None:
        pytest.skip("NANOFLOW_SHAREGPT names no trace")
    count = int(os.environ.get("NANOFLOW_SHAREGPT_REQUESTS", "20000"))
    trace = read_trace(path, num_requests=count, max_prompt_len=8192)
    reports: dict[str, Any] = {}

    def run() -> None:
        for admission in ("reserve", "predict", "oracle"):
            config = SimulationConfig(admission=admission)
            reports[admission] = Simulation(trace, config, load_cost(cost)).run()

    benchmark.pedantic(run, rounds=1)
    reserve, predict, oracle = (r.requests_per_second for r in reports.values())
    benchmark.extra_info |= {
        "requests": len(trace),
        "cost": cost,
        "requests_per_second": predict,
        "beside_reserve": predict / reserve,
        "beside_oracle": predict / oracle,
        "preempted_share": reports["predict"].preempted_share,
    }
    assert reports["predict"].preempted_share < 0.01
    if cost == "qwen3-30b-a3b-h200":  # the default
        assert predict / reserve >= 1.15

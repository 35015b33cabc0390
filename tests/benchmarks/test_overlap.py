"""What plans are worth beside the sequential one, and what running by plans costs."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_kernels import native_status
from nf_runtime import LLM, SamplingParams
from nf_runtime.engine import Engine
from nf_runtime.engine_types import EngineRequest
from nf_runtime.pipeline.plan import PlanError
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.probe import Load, Measured, Probe

pytestmark = pytest.mark.skipif(
    not native_status().available, reason="lanes of a CPU need the native kernels"
)

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
}
LOADS = {
    "decodes": Load(32, 512, 0),
    "decodes with a long context": Load(16, 1500, 0),
    "decodes beside a prompt": Load(32, 512, 224),
    "a prompt": Load(0, 0, 512),
}


@pytest.fixture(scope="module", params=["300m", "1b", "300m on two ranks", "1b on two ranks"])
def probe(request: pytest.FixtureRequest, llama_300m_dir: Path, tmp_path_factory: Any) -> Any:
    """An idle engine with random weights, bfloat16."""
    directory = llama_300m_dir
    if request.param.startswith("1b"):
        directory = tmp_path_factory.mktemp("llama-1b")
        config = json.loads((llama_300m_dir / "config.json").read_text()) | LLAMA_1B
        (directory / "config.json").write_text(json.dumps(config))
    llm = LLM(
        str(directory),
        skip_tokenizer_init=True,
        load_format="dummy",
        kv_cache_tokens=40_000,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        tensor_parallel_size=2 if request.param.endswith("ranks") else 1,
    )
    probe = Probe(llm.engine)
    yield request.param, llm.engine, probe
    probe.close()
    llm.shutdown()


@pytest.mark.parametrize("load", LOADS)
def test_templates_beside_sequential(
    benchmark: Any, probe: tuple[str, Engine, Probe], load: str
) -> None:
    """Every template that applies, in turns with the sequential plan."""
    model, engine, measuring = probe
    plans = []
    for name, template in TEMPLATES.items():
        try:
            plan = template(engine.graph)
            engine.executor.check(plan)
            plans += [plan] if name != "sequential" else []
        except PlanError:
            # Without collectives there is nothing for it to overlap; with them, ranks would do
            # those of different lanes in different orders.
            left_out = (
                ("co-resident", "pd-multiplex") if model.endswith("ranks") else ("two-batch",)
            )
            assert name in left_out
    found: list[Measured] = []
    rounds = 7 if model.startswith("300m") else 3

    def run() -> None:
        found[:] = measuring.measure(plans, LOADS[load], rounds=rounds)

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= {
        "model": model,
        "peak_gflops": measuring.peaks.flops_per_second / 1e9,
        "peak_gb_per_s": measuring.peaks.bytes_per_second / 1e9,
        "peak_sent_gb_per_s": measuring.peaks.sent_per_second / 1e9,
    }
    for one in found:
        benchmark.extra_info[one.plan] = {
            "gain": round(one.gain, 3),
            "quartiles": [round(q, 3) for q in one.quartiles],
            "concurrency": round(one.concurrency, 2),
            "tokens_per_second": round(one.tokens_per_second, 1),
            "compute": round(one.compute, 2),
            "memory": round(one.memory, 2),
            "network": one.network and round(one.network, 3),
        }
        busy_lanes = sum(len(lane) > 0 for lane in one.traces[0].schedule.commands[1:])
        if busy_lanes > 1:
            assert any(trace.overlaps() for trace in one.traces)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: Any, llama_300m_dir: Path) -> Iterator[Engine]:
    """An engine whose model has 32 layers; eight requests decode on it."""
    directory = tmp_path_factory.mktemp("llama-32-layers")
    config = json.loads((llama_300m_dir / "config.json").read_text())
    config |= {"num_hidden_layers": 32, "hidden_size": 512, "intermediate_size": 1792}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    (directory / "config.json").write_text(json.dumps(config))
    llm = LLM(str(directory), skip_tokenizer_init=True, load_format="dummy", kv_cache_tokens=32768)
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
    for number in range(8):
        engine.add(EngineRequest(f"r{number}", [number + 1] * 16, params, seed=0))
    while engine.stats.num_running < 8:
        engine.step()
    yield engine
    llm.shutdown()


def test_work_of_the_cpu_is_hidden_behind_the_device(benchmark: Any, deep: Engine) -> None:
    """Time between the last operation of an iteration and the first of the next, 32 layers."""
    timeline = deep.executor.timeline
    timeline.every = 1
    gaps: list[float] = []
    walls: list[float] = []

    def run() -> None:
        timeline.clear()
        for _ in range(60):
            deep.step()
        traces = timeline.traces
        for before, after in pairwise(traces):
            if after.iteration == before.iteration + 1:
                gaps.append(after.start_ns - before.start_ns - before.wall_ns)
                walls.append(before.wall_ns)

    benchmark.pedantic(run, rounds=5)
    timeline.every = 64
    share = float(np.median(np.array(gaps) / np.array(walls)))
    benchmark.extra_info |= {
        "iteration_ms": float(np.median(walls)) / 1e6,
        "gap_us": float(np.median(gaps)) / 1e3,
        "gap_by_iteration": share,
    }
    # Between two iterations the device samples, which is no nano-operation.
    assert share < 0.1


def test_a_timeline_costs_next_to_nothing(benchmark: Any, deep: Engine) -> None:
    """Iterations with one of 64 noted, in turns with iterations of which none is."""
    seconds: dict[int, list[float]] = {0: [], 64: []}

    def run(every: int) -> None:
        deep.executor.timeline.every = every
        began = time.perf_counter()
        for _ in range(16):
            deep.step()
        seconds[every].append(time.perf_counter() - began)

    def both() -> None:
        order: list[Callable[[], None]] = [lambda: run(0), lambda: run(64)]
        for call in order if len(seconds[0]) % 2 else reversed(order):
            call()

    benchmark.pedantic(both, rounds=40, warmup_rounds=1)
    ratios = np.array(seconds[64]) / np.array(seconds[0])
    benchmark.extra_info |= {
        "with_by_without": float(np.median(ratios)),
        "quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
    }
    assert float(np.median(ratios)) <= 1.01

"""Plans are measured beside the sequential one, on batches that nobody asked for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_kernels import native_status
from nf_runtime import EngineConfig, SamplingParams
from nf_runtime.chrome_trace import chrome_trace
from nf_runtime.engine import Engine
from nf_runtime.engine_types import EngineRequest
from nf_runtime.measured import Load, Measured
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.policy import Reason
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.probe import Probe

LOAD = Load(decodes=24, context=40, prefill=24)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    engine = Engine(
        EngineConfig(
            model=str(tiny_checkpoint("llama3")),
            load_format="dummy",
            overlap="nanoflow",
            kv_cache_tokens=4096,
            max_num_batched_tokens=128,
            max_num_seqs=40,
            device="cpu",
        )
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def probe(engine: Engine) -> Iterator[Probe]:
    probe = Probe(engine)
    yield probe
    probe.close()


def plan(engine: Engine, name: str) -> Plan:
    return TEMPLATES[name](engine.graph)


@pytest.fixture(scope="module")
def measured(engine: Engine, probe: Probe) -> list[Measured]:
    plans = [plan(engine, "nanoflow"), plan(engine, "co-resident")]
    return probe.measure(plans, LOAD, rounds=8)


def test_the_sequential_plan_comes_first_and_gains_nothing(measured: list[Measured]) -> None:
    assert [one.plan for one in measured] == ["sequential", "nanoflow", "co-resident"]
    assert (measured[0].gain, measured[0].quartiles) == (1.0, (1.0, 1.0))
    assert measured[0].overlaps == 0


def test_every_number_is_within_its_range(measured: list[Measured]) -> None:
    for one in measured:
        assert one.load == LOAD
        assert len(one.traces) == 8
        assert one.quartiles[0] <= one.gain <= one.quartiles[1]
        assert 0 < one.wall_ms < one.seconds * 1e3
        assert 0 < one.host_share < 1
        assert one.compute > 0 < one.memory
        assert one.network is None
        assert one.tokens_per_second == pytest.approx(LOAD.tokens / one.seconds)
        lanes = {"device", "compute", "memory"} if one.plan == "nanoflow" else None
        assert lanes is None or set(one.idle_ms) == lanes
        assert np.median([trace.gain for trace in one.traces]) == pytest.approx(one.gain)
        for trace in one.traces:
            assert (trace.tokens, trace.decodes, int(trace.contexts.sum())) == (48, 24, 960)


def test_plans_take_turns_with_the_sequential_one(measured: list[Measured]) -> None:
    numbers = [{trace.iteration for trace in one.traces} for one in measured]
    together = sorted(numbers[0] | numbers[1] | numbers[2])
    assert len(together) == 24
    for turn in range(8):
        assert all(len(set(together[3 * turn : 3 * turn + 3]) & own) == 1 for own in numbers)


@pytest.mark.skipif(not native_status().available, reason="lanes need the native kernels")
def test_nano_operations_of_different_lanes_run_at_the_same_time(measured: list[Measured]) -> None:
    traces = [trace for one in measured[1:] for trace in one.traces]
    assert sum(trace.overlaps() for trace in traces) > 0
    assert pairs_at_once(json.loads(json.dumps(chrome_trace(traces)))) > 0


def pairs_at_once(trace: dict[str, Any]) -> int:
    """Pairs of events of different threads of the same iteration that overlap in time."""
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    return sum(
        one["tid"] < other["tid"]
        and one["args"]["iteration"] == other["args"]["iteration"]
        and one["ts"] < other["ts"] + other["dur"]
        and other["ts"] < one["ts"] + one["dur"]
        for one in events
        for other in events
    )


def test_a_probe_says_by_which_plan_a_batch_would_run(probe: Probe, engine: Engine) -> None:
    choice = probe.choose(LOAD)
    assert (choice.plan.name, choice.reason) == ("nanoflow", Reason.PLANNED)
    alone = probe.choose(Load(1, 40, 0))
    assert (alone.plan.name, alone.reason) == ("sequential", Reason.ONE_NANO_BATCH)
    engine.set_overlap("off")
    assert probe.choose(LOAD).reason is Reason.OFF
    engine.set_overlap("nanoflow")


def test_a_plan_cuts_only_what_it_has_nano_batches_for(probe: Probe, engine: Engine) -> None:
    assert probe.cuts(plan(engine, "nanoflow"), Load(2, 1, 0))
    assert not probe.cuts(plan(engine, "nanoflow"), Load(1, 1, 0))
    assert not probe.cuts(plan(engine, "pd-multiplex"), Load(32, 1, 0))
    assert probe.cuts(plan(engine, "pd-multiplex"), Load(1, 1, 1))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(0, 5, 0), "at least one decode"),
        (Load(0, 0, 129), r"load \+129 has 129 tokens, and the engine takes at most 128"),
        (Load(40, 1, 1), "41 requests, and the engine takes at most 40; raise max_num_seqs"),
        (Load(1, 256, 0), "257 tokens of a request, .* at most 256"),
        (Load(40, 200, 0), "520 pages of KV, .* at most 256; raise kv_cache_tokens"),
    ],
)
def test_a_load_without_room_is_refused(probe: Probe, load: Load, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe.check(load)
    with pytest.raises(ValueError, match=message):
        probe.measure([], load, rounds=1)


def test_progress_is_told_of_each_round(probe: Probe) -> None:
    rounds: list[int] = []
    probe.measure([], Load(2, 3, 0), rounds=3, progress=lambda: rounds.append(1))
    assert len(rounds) == 3


def test_an_engine_with_requests_is_not_probed(engine: Engine) -> None:
    engine.add(EngineRequest("busy", [1, 2], SamplingParams(max_tokens=2, ignore_eos=True), seed=0))
    with pytest.raises(RuntimeError, match="let them end first"):
        Probe(engine)
    while engine.has_work:
        engine.step()


def generated(engine: Engine, name: str) -> list[int]:
    prompt = [1 + i % 90 for i in range(100)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    engine.add(EngineRequest(name, prompt, params, seed=0))
    found = []
    while engine.has_work:
        found += [output.token_id for output in engine.step() if output.token_id is not None]
    return found


def test_a_probe_takes_no_page_from_a_prefix_that_is_found_later(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Of 14 pages 8 are a prompt's and its answer's, and a load wants 12 of them."""
    engine = Engine(
        EngineConfig(
            model=str(tiny_checkpoint("llama3")),
            overlap="off",
            kv_cache_tokens=14 * 16,
            max_model_len=200,
            max_num_seqs=16,
            dtype="float32",
            device="cpu",
        )
    )
    try:
        expected = generated(engine, "first")
        probe = Probe(engine)
        probe.measure([], Load(decodes=4, context=30, prefill=60), rounds=2)
        engine.kv_cache.check_integrity()
        assert engine.kv_cache.num_available == 14
        for name in ("second", "third"):
            assert generated(engine, name) == expected
        probe.measure([plan(engine, "nanoflow")], Load(decodes=8, context=2, prefill=0), rounds=1)
        hits = engine.stats.prefix_hit_tokens
        assert generated(engine, "fourth") == expected
        assert engine.stats.prefix_hit_tokens > hits  # what nobody took is still found
        probe.close()
    finally:
        engine.close()


def test_a_probe_waits_for_requests_that_came_after_it(probe: Probe, engine: Engine) -> None:
    engine.add(EngineRequest("later", [1], SamplingParams(max_tokens=2, ignore_eos=True), seed=0))
    with pytest.raises(RuntimeError, match="let them end first"):
        probe.measure([], LOAD, rounds=1)
    while engine.has_work:
        engine.step()

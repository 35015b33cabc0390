"""The simulator: the real scheduler in computed time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nf_scheduler import Priority
from nf_scheduler.sim import (
    DEFAULT_COST,
    IterationCost,
    Simulation,
    SimulationConfig,
    Trace,
    TraceError,
    load_cost,
    read_trace,
)

COST = IterationCost(
    name="toy",
    source="made up",
    overhead_seconds=0.001,
    weight_seconds=0.009,
    token_seconds=0.0001,
    context_token_seconds=0.0,
    restore_token_seconds=0.00001,
)


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def random_trace(count: int, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(
        arrivals=np.sort(rng.uniform(0, 5, count)),
        prompt_lens=rng.integers(1, 300, count),
        output_lens=rng.geometric(1 / 60, count),
    )


def run(trace: Trace, **options):
    options = {"num_pages": 300, "max_tokens": 256, "max_model_len": 1024, **options}
    return Simulation(trace, SimulationConfig(**options), COST).run()


def test_a_request_alone_takes_the_time_of_its_iterations():
    trace = Trace(np.array([3.0]), np.array([50]), np.array([4]))
    report = run(trace)
    # One iteration for the prompt and three decodes of 10 ms, and the one that was formed ahead,
    # which the device has begun when the end is seen.
    assert report.ttft.p50 == pytest.approx(0.010)
    assert report.latency.p50 == pytest.approx(0.040)
    assert report.tpot.p50 == pytest.approx(0.010)
    assert (report.num_requests, report.num_iterations) == (1, 5)
    assert run(trace, lag=0).num_iterations == 4


def test_a_large_batch_takes_as_long_as_it_computes():
    trace = Trace(np.zeros(1), np.array([200]), np.array([1]))
    assert run(trace, max_model_len=512).latency.p50 == pytest.approx(0.021)


def test_the_device_never_waits_while_there_is_work():
    trace = replace(random_trace(100), arrivals=np.zeros(100))
    assert run(trace).busy_share == pytest.approx(1.0)


@pytest.mark.parametrize("admission", ["predict", "reserve", "greedy", "oracle"])
@pytest.mark.parametrize("lag", [0, 1])
def test_every_request_ends_with_its_tokens(admission, lag):
    trace = random_trace(300)
    simulation = Simulation(
        trace,
        SimulationConfig(
            num_pages=100, max_tokens=256, max_model_len=1024, admission=admission, lag=lag
        ),
        COST,
        Priority(),
    )
    counted: list[int] = []
    report = simulation.run(counted.append)
    simulation._scheduler.check_integrity()
    assert sum(counted) == report.num_requests == 300
    assert simulation._pages.num_available == 100
    tokens = np.minimum(trace.output_lens, 256).sum()
    assert report.output_tokens_per_second * report.seconds == pytest.approx(tokens)
    assert report.ttft.p50 > 0
    assert report.latency.p99 >= report.latency.p90 >= report.latency.p50 >= report.ttft.p50
    assert max(report.timeline.pages) <= 100
    assert (report.num_preemptions > 0) == (admission == "greedy" or report.preempted_share > 0)


def test_greedy_admission_preempts_and_brings_back_from_the_host():
    report = run(random_trace(300), num_pages=60, admission="greedy")
    assert report.preempted_share > 0.02


def test_the_same_simulation_gives_the_same_numbers():
    first, second = (run(random_trace(200)).to_dict() for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first))["num_requests"] == 200


def test_a_long_timeline_is_thinned():
    trace = Trace(np.zeros(3), np.full(3, 4), np.full(3, 4000))
    timeline = run(trace, max_tokens=4000, max_model_len=8192, num_pages=2000).timeline
    assert 1000 <= len(timeline.seconds) <= 2001
    assert len({len(column) for column in timeline.columns().values()}) == 1
    assert timeline.seconds == sorted(timeline.seconds)


def test_a_trace_without_times_comes_at_a_rate_or_all_at_once(tmp_path):
    path = write(tmp_path / "t.csv", [f"XXX,{10 + i},5" for i in range(500)])
    assert not read_trace(path, max_prompt_len=600).arrivals.any()
    assert not read_trace(path, rate=float("inf"), max_prompt_len=600).arrivals.any()
    trace = read_trace(path, rate=20.0, max_prompt_len=600, num_requests=400)
    assert len(trace) == 400
    assert trace.arrivals[0] == 0
    assert trace.arrivals[-1] == pytest.approx(20, rel=0.2)
    assert trace.prompt_lens[:3].tolist() == [10, 11, 12]
    other = read_trace(path, rate=20.0, max_prompt_len=600, num_requests=400, seed=1)
    assert not np.array_equal(trace.arrivals, other.arrivals)


@pytest.mark.parametrize(
    "times",
    [["7", "8.5", "10"], ["2026-01-01 00:00:07", "2026-01-01T00:00:08.5", "2026-01-01 00:00:10"]],
)
def test_times_of_a_trace_are_kept(tmp_path, times):
    path = write(tmp_path / "t.csv", [f"{time},3,4" for time in times])
    assert read_trace(path, max_prompt_len=10).arrivals.tolist() == [0, 1.5, 3]


def test_prompts_beyond_the_context_are_counted_and_left_out(tmp_path):
    path = write(tmp_path / "t.csv", ["XXX,10,5", "XXX,99,5", "XXX,100,5", "XXX,20,5"])
    trace = read_trace(path, max_prompt_len=99)
    assert (trace.prompt_lens.tolist(), trace.num_too_long) == ([10, 99, 20], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"has the columns \['a', 'b'\]; expected TIMESTAMP"),
        ("", "has the columns None"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nX,ten,3\n", "line 2: ContextTokens is 'ten'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nX,10\n", "GeneratedTokens None; expected whole"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nX,0,3\n", "a request of 0 and 3 tokens"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nX,999,3\n",
            "no request with a prompt of 1 to 9",
        ),
    ],
)
def test_files_that_are_no_traces_are_refused(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path, max_prompt_len=99)


def test_other_bad_input_is_refused(tmp_path):
    with pytest.raises(TraceError, match="cannot be read as a trace"):
        read_trace(tmp_path / "missing.csv", max_prompt_len=9)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="cannot be read as a trace"):
        read_trace(tmp_path / "binary.csv", max_prompt_len=9)
    with pytest.raises(TraceError, match="rate is 0; expected requests per second"):
        read_trace(tmp_path / "x", rate=0, max_prompt_len=9)
    for name in ("num_pages", "page_size", "max_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            SimulationConfig(**{name: 0})
    with pytest.raises(ValueError, match="lag is -1"):
        SimulationConfig(lag=-1)
    with pytest.raises(ValueError, match="admission is 'x'; expected one of predict, reserve"):
        SimulationConfig(admission="x")


def test_cost_files(tmp_path):
    default = load_cost()
    assert default == load_cost(DEFAULT_COST)
    assert "not measured" in default.source
    assert load_cost("llama-3-8b-h200").weight_seconds < default.weight_seconds
    with pytest.raises(ValueError, match=r"cost is 'nothing', which cannot be read.*llama-3-8b"):
        load_cost("nothing")
    file = tmp_path / "cost.json"
    values = {name: getattr(default, name) for name in default.__dataclass_fields__}
    for change, message in (
        ({"token_seconds": -1}, "token_seconds is -1; expected seconds"),
        ({"token_seconds": float("nan")}, "token_seconds is nan"),
        ({"name": 3}, "name is 3"),
        ({"more": 3}, "expected an object with"),
    ):
        file.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            load_cost(str(file))
    file.write_text(json.dumps(values))
    assert load_cost(str(file)) == default

"""Numbers of a timed iteration, by hand; and the trace that is made of it."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pipeline_graphs import small_graph

from nf_runtime.chrome_trace import chrome_trace
from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import divide
from nf_runtime.pipeline.node_cost import NodeCosts
from nf_runtime.pipeline.plan import DevicePeaks
from nf_runtime.pipeline.policy import Reason
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.pipeline.utilisation import Utilisation
from nf_runtime.timeline import IterationTrace, Timeline

GRAPH = small_graph("dense", num_layers=2)
MS = 1_000_000


def made(plan: str, times: dict[tuple[str, int], tuple[int, int]]) -> IterationTrace:
    """An iteration of 6 decodes and a prefill of 10.

    Args:
        plan: Name of a template.
        times: Start and end in ms by (operation, first nano-batch), of the first layer, and of what
            is outside of the layers; all else had no rows.
    """
    built = TEMPLATES[plan](GRAPH)
    division = divide(built.nano_batches, 6, np.array([10]), selected=7)
    schedule = compile_plan(GRAPH, built, division.structure)
    noted = np.full((len(schedule.nodes), 2), -1, dtype=np.int64)
    for number in range(len(schedule.nodes)):
        node = schedule.node(number)
        span = times.get((node.operation.name, node.first))
        if span is not None and node.layer != 1:
            noted[number] = np.array(span) * MS
    contexts = np.full(7, 100)
    return IterationTrace(7, 16, 6, contexts, Reason.PLANNED, schedule, division, times=noted)


SEQUENTIAL = {("embedding", 0): (0, 1), ("qkv_proj", 0): (1, 5), ("logits", 0): (6, 8)}
# The memory lane attends for the first nano-batch beside the second one's product.
OVERLAPPED = {
    ("embedding", 0): (0, 1),
    ("qkv_proj", 0): (1, 3),
    ("decode_attention", 0): (3, 7),
    ("qkv_proj", 1): (4, 6),
    ("input_norm", 1): (6, 8),
    ("logits", 0): (8, 10),
}


def test_a_sequential_iteration_has_a_concurrency_below_one() -> None:
    trace = made("sequential", SEQUENTIAL)
    assert trace.wall_ns == 8 * MS
    assert trace.busy_ns == 7 * MS
    assert trace.concurrency == pytest.approx(7 / 8)
    assert trace.idle_ns() == {"device": 1 * MS}
    assert trace.overlaps() == 0


def test_what_two_lanes_do_at_once_counts_twice() -> None:
    trace = made("nanoflow", OVERLAPPED)
    assert trace.wall_ns == 10 * MS
    assert trace.busy_ns == (1 + 2 + 4 + 2 + 2 + 2) * MS
    assert trace.concurrency == pytest.approx(1.3)
    assert trace.idle_ns() == {"device": 7 * MS, "compute": 4 * MS, "memory": 6 * MS}


def test_pairs_of_different_lanes_overlap_where_their_times_do() -> None:
    assert made("nanoflow", OVERLAPPED).overlaps() == 2
    touching = {("qkv_proj", 1): (0, 3), ("decode_attention", 0): (3, 7)}
    assert made("nanoflow", touching).overlaps() == 0
    same_lane = {("qkv_proj", 0): (0, 3), ("qkv_proj", 1): (2, 5)}
    assert made("nanoflow", same_lane).overlaps() == 0


def test_an_iteration_of_which_nothing_ran_has_numbers_too() -> None:
    trace = made("nanoflow", {})
    assert (trace.wall_ns, trace.concurrency, trace.overlaps(), trace.idle_ns()) == (0, 0, 0, {})


def test_token_ranges_are_those_of_the_nano_batches() -> None:
    trace = made("nanoflow", OVERLAPPED)
    ranges = {}
    for number in trace.ran.tolist():
        node = trace.schedule.node(number)
        ranges[node.operation.name, node.first] = trace.token_range(node)
    assert ranges["qkv_proj", 0] == (0, 8)
    assert ranges["qkv_proj", 1] == (8, 16)
    assert ranges["decode_attention", 0] == (0, 6)
    assert ranges["logits", 0] == (0, 16)


def test_a_summary_is_json() -> None:
    summary = json.loads(json.dumps(made("nanoflow", OVERLAPPED).summary()))
    assert summary == {
        "iteration": 7,
        "plan": "nanoflow",
        "reason": "planned",
        "tokens": 16,
        "decodes": 6,
        "context_tokens": 700,
        "wall_ms": 10.0,
        "concurrency": 1.3,
        "gain": None,
        "idle_ms": {"device": 7.0, "compute": 4.0, "memory": 6.0},
    }


def test_a_trace_says_what_each_iteration_gains_and_uses() -> None:
    trace = made("nanoflow", OVERLAPPED)
    trace.gain = 1.25
    costs = NodeCosts(GRAPH, head_dim=8, element_bytes=4)
    flops = costs.total(trace.schedule, trace.division, trace.contexts).flops
    peaks = DevicePeaks(flops_per_second=flops * 400, bytes_per_second=1e9)
    value = chrome_trace([trace], Utilisation(costs, peaks))
    (args,) = (event["args"] for event in value["traceEvents"] if event["ph"] == "i")
    assert args["gain"] == 1.25
    assert args["flops_per_second"] == pytest.approx(flops * 100)  # it took 10 ms
    assert args["compute"] == pytest.approx(0.25)
    assert args["memory"] == pytest.approx(args["bytes_per_second"] / 1e9)
    assert "network" not in args


def test_a_timed_iteration_has_its_gain_from_sequential_ones_alike() -> None:
    timeline = Timeline(every=1)
    timeline.add(made("nanoflow", OVERLAPPED))
    reference = made("sequential", SEQUENTIAL)
    reference.reason = Reason.REFERENCE
    timeline.add(reference)
    timeline.add(made("nanoflow", OVERLAPPED))
    assert [trace.gain for trace in timeline.traces] == [None, None, pytest.approx(0.8)]


def test_a_trace_has_the_events_that_perfetto_reads() -> None:
    traces = [made("sequential", SEQUENTIAL), made("nanoflow", OVERLAPPED)]
    value = json.loads(json.dumps(chrome_trace(traces)))
    events = [event for event in value["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(SEQUENTIAL) + len(OVERLAPPED)
    for event in events:
        assert set(event) == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
        assert set(event["args"]) == {"iteration", "layer", "nano_batch", "tokens"}
        assert event["dur"] >= 0
        assert event["cat"] in ("compute", "memory", "network")
    threads = {
        event["tid"]: event["args"]["name"]
        for event in value["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert sorted(threads.values()) == ["lane compute", "lane device", "lane memory"]
    assert {event["tid"] for event in events} == set(threads)
    (attention,) = (event for event in events if event["name"] == "decode_attention")
    assert threads[attention["tid"]] == "lane memory"
    assert (attention["dur"], attention["args"]["tokens"]) == (4000.0, [0, 6])


def test_iterations_of_a_trace_do_not_overlap_each_other() -> None:
    value = chrome_trace([made("nanoflow", OVERLAPPED)] * 3)
    spans: dict[float, list[dict[str, Any]]] = {}
    starts = [event["ts"] for event in value["traceEvents"] if event["ph"] == "i"]
    for event in value["traceEvents"]:
        if event["ph"] == "X":
            begin = max(start for start in starts if start <= event["ts"])
            spans.setdefault(begin, []).append(event)
    assert sorted(spans) == starts
    for begin, following in pairwise(starts):
        assert all(event["ts"] + event["dur"] <= following for event in spans[begin])


def test_a_timeline_keeps_the_last_iterations() -> None:
    timeline = Timeline(every=1)
    for iteration in range(70):
        trace = made("nanoflow", OVERLAPPED)
        trace.iteration = iteration
        timeline.add(trace)
    assert [trace.iteration for trace in timeline.traces] == list(range(6, 70))
    timeline.clear()
    assert not timeline.traces

"""Runs of programs: the order of their launches, errors, and how long what they need lives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nf_kernels import lanes, native_status, ops
from nf_kernels.lanes import LAUNCH, SIGNAL, WAIT, CpuProgram, CpuRun, CpuSchedule

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")

pytestmark = pytest.mark.skipif(not native_status().available, reason="needs the native kernels")


@pytest.fixture
def two_lanes() -> Iterator[list[lanes.CpuLane]]:
    made = lanes.partition("cpu", [1, 1])
    assert all(isinstance(lane, lanes.CpuLane) for lane in made)
    yield made  # type: ignore[misc]
    for lane in made:
        lane.close()


@pytest.fixture
def undivided() -> Iterator[lanes.CpuLane]:
    lane = lanes.undivided_cpu()
    yield lane
    lane.close()


Span = tuple[int, int, int, int]


def as_spans(spans: list[Span]) -> np.ndarray:
    return np.array(spans, dtype=np.int64).reshape(-1, 4)


def make_schedule(
    program: CpuProgram,
    commands: list[list[tuple[int, int]]],
    blocks: list[int],
    spans: list[int] | None = None,
) -> CpuSchedule:
    return program.schedule(
        [np.array(rows, dtype=np.int32).reshape(-1, 2) for rows in commands],
        np.array(blocks, dtype=np.int32),
        np.array(spans or [0] * len(blocks), dtype=np.int32),
    )


class Chain:
    """x -> rms_norm -> linear -> swiglu -> out, each over all rows."""

    def __init__(self, rows: int = 24, width: int = 64) -> None:
        torch.manual_seed(2)
        self.x = torch.randn(rows, width)
        weight, norm = ops.CPU.pack(torch.randn(2 * width, width)), torch.rand(width)
        self.normed, self.both = torch.zeros(rows, width), torch.zeros(rows, 2 * width)
        self.out = torch.zeros(rows, width)
        self.steps: list[tuple[str, dict[str, Any]]] = [
            ("rms_norm", {"x": self.x, "weight": norm, "eps": 1e-5, "out": self.normed}),
            ("linear", {"x": self.normed, "weight": weight, "out": self.both}),
            ("swiglu", {"gate_up": self.both, "out": self.out}),
        ]
        for name, arguments in self.steps:
            ops.CPU[name](**arguments)
        self.expected = self.out.clone()
        self.span = as_spans([(0, rows, 0, 0)])

    def clear(self) -> None:
        for tensor in (self.normed, self.both, self.out):
            tensor.zero_()

    def record(self, program: CpuProgram) -> list[int]:
        return [program.record(ops.CPU[name], **arguments) for name, arguments in self.steps]


def test_events_order_dependent_operations_on_two_lanes(two_lanes):
    chain, program = Chain(), CpuProgram()
    schedule = make_schedule(
        program,
        [
            [(LAUNCH, 0), (SIGNAL, 2), (WAIT, 0), (LAUNCH, 2)],
            [(WAIT, 2), (LAUNCH, 1), (SIGNAL, 0)],
        ],
        chain.record(program),
    )
    for _ in range(2000):
        chain.clear()
        run = schedule.run(two_lanes, chain.span, [])
        run.wait()
        assert torch.equal(chain.out, chain.expected)
    times = run.times()
    assert times[0, 1] <= times[1, 0]
    assert times[1, 1] <= times[2, 0]
    assert not run.failed


@pytest.mark.parametrize("waits", [True, False])
def test_without_a_wait_the_result_is_wrong(two_lanes, waits):
    """The negative control of the test above: what is read too early shows."""
    chain, program = Chain(), CpuProgram()
    chain.clear()
    slow = program.call(lambda _: time.sleep(0.1))
    schedule = make_schedule(
        program,
        [
            [(LAUNCH, 0), (LAUNCH, 1), (LAUNCH, 2), (SIGNAL, 2)],
            [(WAIT, 2), (LAUNCH, 3)] if waits else [(LAUNCH, 3)],
        ],
        [slow, *chain.record(program)],
    )
    schedule.run(two_lanes, chain.span, []).wait()
    assert torch.equal(chain.out, chain.expected) == waits


@two_cores
def test_lanes_overlap(two_lanes):
    torch.manual_seed(3)
    program, blocks, count = CpuProgram(), [], 20
    for _ in range(2):
        weight = ops.CPU.pack(torch.randn(1024, 1024))
        x, out = torch.randn(256, 1024), torch.empty(256, 1024)
        block = program.record(ops.CPU["linear"], x=x, weight=weight, out=out)
        blocks += [block] * count
    nodes = [range(count), range(count, 2 * count)]
    schedule = make_schedule(program, [[(LAUNCH, n) for n in own] for own in nodes], blocks)
    run = schedule.run(two_lanes, as_spans([(0, 256, 0, 0)]), [])
    run.wait()
    first, second = run.times().reshape(2, count, 2)
    # Some launch of each began before one of the other had ended.
    begins = np.maximum(first[:, None, 0], second[None, :, 0])
    assert (begins < np.minimum(first[:, None, 1], second[None, :, 1])).any()


def test_an_undivided_lane_and_one_of_a_partition_take_part_in_one_run(two_lanes, undivided):
    chain, program = Chain(rows=700), CpuProgram()
    blocks = chain.record(program)
    schedule = make_schedule(
        program,
        [[(WAIT, 1), (LAUNCH, 1), (SIGNAL, 2)], [(LAUNCH, 0), (SIGNAL, 1), (WAIT, 2), (LAUNCH, 2)]],
        blocks,
    )
    for used in ([undivided, two_lanes[1]], [two_lanes[0], undivided]):
        for _ in range(20):
            chain.clear()
            schedule.run(used, chain.span, []).wait()
            assert torch.equal(chain.out, chain.expected)


# Errors of a run.


def failing_program() -> tuple[CpuProgram, int, int, Tensor]:
    """A program that looks a token up, its block, that of a call, and what the call counts."""
    program, count = CpuProgram(), torch.zeros(1)
    ids = torch.zeros(2, dtype=torch.int64)
    program.input(ids)
    out = torch.zeros(2, 8)
    look_up = program.record(ops.CPU["embedding"], token_ids=ids, table=torch.randn(10, 8), out=out)
    return program, look_up, program.call(lambda _: count.add_(1)), count


@pytest.mark.parametrize("failing_lane", [0, 1])
def test_an_index_error_stops_the_run_and_nobody_hangs(two_lanes, failing_lane):
    program, look_up, tell, count = failing_program()
    commands = [
        [(LAUNCH, 0), (SIGNAL, 0), (WAIT, 1)],
        [(WAIT, 0), (LAUNCH, 1), (SIGNAL, 1)],
    ]
    schedule = make_schedule(
        program, commands if failing_lane == 0 else commands[::-1], [look_up, tell]
    )
    for _ in range(20):
        count.zero_()
        run = schedule.run(two_lanes, as_spans([(0, 2, 0, 0)]), [torch.tensor([1, 10])])
        behind = schedule.run(two_lanes, as_spans([(0, 2, 0, 0)]), [torch.tensor([1, 2])])
        event = two_lanes[0].record()
        event.wait()
        assert event.failed
        assert run.failed
        assert behind.failed  # it was dropped
        assert two_lanes[1].error == ""
        with pytest.raises(ValueError, match=r"token_ids\[1\] is 10; expected 0 to 9"):
            two_lanes[0].synchronize()
        two_lanes[1].synchronize()
        assert not count.any()
        assert not run.times()[1].any()
        again = schedule.run(two_lanes, as_spans([(0, 2, 0, 0)]), [torch.tensor([1, 2])])
        two_lanes[0].synchronize()
        assert not again.failed
        assert count.item() == 1


def test_an_index_in_the_middle_is_counted_from_the_span(two_lanes):
    program, look_up, _, _ = failing_program()
    schedule = make_schedule(program, [[(LAUNCH, 0)]], [look_up])
    run = schedule.run(two_lanes[:1], as_spans([(1, 1, 0, 0)]), [torch.tensor([10, 3])])
    run.wait()
    assert not run.failed  # the wrong one is not of the span
    schedule.run(two_lanes[:1], as_spans([(1, 1, 0, 0)]), [torch.tensor([3, -1])])
    with pytest.raises(ValueError, match=r"token_ids\[0\] is -1; expected 0 to 9"):
        two_lanes[0].synchronize()


@pytest.mark.parametrize("lane", [0, 1])
def test_what_a_call_raises_is_the_error_of_the_run(two_lanes, lane):
    program, seen = CpuProgram(), []
    fail = program.call(lambda node: [][node])
    tell = program.call(seen.append)
    own = [(LAUNCH, 0), (LAUNCH, 1)]
    schedule = make_schedule(program, [own, []] if lane == 0 else [[], own], [fail, tell])
    for _ in range(20):
        run = schedule.run(two_lanes, as_spans([(0, 1, 0, 0)]), [])
        run.wait()
        assert run.failed
        with pytest.raises(ValueError, match="IndexError: list index out of range"):
            two_lanes[0].synchronize()
    assert not seen
    run = schedule.run(two_lanes, as_spans([(0, 1, 0, 0)]), [], on_call=seen.append)
    run.wait()
    assert not run.failed
    assert seen == [0, 1]


def test_a_lane_that_had_failed_stops_the_run(two_lanes):
    """What an earlier operation of that lane should have written may be missing."""
    program, seen = CpuProgram(), []
    schedule = make_schedule(program, [[(LAUNCH, 0)], []], [program.call(seen.append)])
    two_lanes[1].call(lambda: 1 // 0)
    run = schedule.run(two_lanes, as_spans([(0, 1, 0, 0)]), [])
    with pytest.raises(ValueError, match=r"lanes\[1\] had failed before: ZeroDivisionError"):
        two_lanes[0].synchronize()
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        two_lanes[1].synchronize()
    assert run.failed


# What is refused, and told.


def test_a_run_that_is_not_over_has_no_times(two_lanes):
    program, go = CpuProgram(), threading.Event()
    schedule = make_schedule(program, [[(LAUNCH, 0)]], [program.call(lambda _: go.wait())])
    run: CpuRun = schedule.run(two_lanes[:1], as_spans([(0, 1, 0, 0)]), [])
    assert not run.done()
    with pytest.raises(ValueError, match="the run is not done yet; wait for it first"):
        run.times()
    with pytest.raises(ValueError, match="the run is not done yet; wait for it first"):
        _ = run.failed
    go.set()
    run.wait()
    assert run.done()
    assert run.times().all()


def test_without_rows_events_are_signalled_and_calls_not_made(two_lanes):
    program, seen = CpuProgram(), []
    schedule = make_schedule(
        program,
        [[(LAUNCH, 0), (SIGNAL, 0)], [(WAIT, 0), (LAUNCH, 1)]],
        [program.call(seen.append)] * 2,
        [0, 1],
    )
    run = schedule.run(two_lanes, as_spans([(0, 0, 0, 0), (0, 1, 0, 0)]), [])
    run.wait()
    assert seen == [1]
    assert not run.times()[0].any()
    assert run.times()[1].all()


@pytest.mark.parametrize(
    ("commands", "blocks", "spans", "message"),
    [
        ([], [0], [0], "commands is empty; expected the commands of at least one lane"),
        ([[(0, 0)]], [1], [0], r"blocks\[0\] is 1; expected the number of one of the program's 1"),
        ([[(0, 0)]], [-1], [0], r"blocks\[0\] is -1"),
        ([[(0, 0)]], [0], [-1], r"spans\[0\] is -1; expected the number of one of a run's spans"),
        ([[(0, 0)]], [0, 0], [0], "blocks has 2 nodes and spans 1; expected as many"),
        ([[(0, 0)], [(3, 0)]], [0], [0], r"commands\[1\]\[0\] has code 3; expected 0 \(launch\)"),
        ([[(0, 1)]], [0], [0], r"commands\[0\]\[0\] has argument 1; expected less than 1"),
        ([[(2, -1)]], [0], [0], r"commands\[0\]\[0\] has argument -1"),
        ([[(0, 0)], [(0, 0)]], [0], [0], r"commands\[1\]\[0\] launches node 0 a second time"),
        ([[(2, 0), (2, 0)]], [0], [0], r"commands\[0\]\[1\] signals event 0 a second time"),
        ([[(0, 0), (1, 0)]], [0], [0], r"commands\[0\]\[1\] waits for event 0, which no lane"),
        ([[(1, 0), (2, 0)]], [0], [0], r"commands\[0\]\[0\] waits for event 0, which is signalled"),
        (
            [[(1, 0), (2, 1)], [(1, 1), (2, 0)]],
            [0, 0],
            [0, 0],
            "expected lanes that do not wait for each other",
        ),
    ],
)
def test_schedules_that_are_none_are_refused(commands, blocks, spans, message):
    program = CpuProgram()
    program.call(lambda _: None)
    with pytest.raises(ValueError, match=message):
        make_schedule(program, commands, blocks, spans)


def test_arrays_of_other_types_are_refused(two_lanes):
    program = CpuProgram()
    program.call(lambda _: None)
    commands, one = np.zeros((1, 2), np.int32), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=r"commands\[0\] is int64 \[1, 2\]; expected int32 \[any"):
        program.schedule([commands.astype(np.int64)], one, one)
    with pytest.raises(ValueError, match=r"blocks is int64 \[1\]; expected int32 \[any\]"):
        program.schedule([commands], one.astype(np.int64), one)
    with pytest.raises(ValueError, match=r"spans is int32 \[1, 1\]; expected int32 \[any\]"):
        program.schedule([commands], one, one[None])
    schedule = program.schedule([commands], one, one)
    with pytest.raises(ValueError, match=r"spans is int32 \[1, 4\]; expected int64 \[any, 4\]"):
        schedule.run(two_lanes[:1], as_spans([(0, 1, 0, 0)]).astype(np.int32), [])


def test_runs_that_are_none_are_refused(two_lanes):
    program, look_up, tell, count = failing_program()
    schedule = make_schedule(program, [[(LAUNCH, 0), (LAUNCH, 1)], []], [look_up, tell], [0, 1])
    spans, ids = as_spans([(0, 2, 0, 0), (0, 1, 0, 0)]), torch.zeros(2, dtype=torch.int64)
    other = lanes.partition("cpu", [1])[0]
    other.close()
    refused: list[tuple[Any, Any, Any, str]] = [
        (two_lanes[:1], spans, [ids], "lanes has 1; expected 2, as the schedule has commands for"),
        ([two_lanes[0]] * 2, spans, [ids], r"lanes\[1\] is lanes\[0\], too; expected every lane"),
        ([two_lanes[0], None], spans, [ids], r"lanes\[1\] is a NoneType; expected a lane of a CPU"),
        (two_lanes, spans[:1], [ids], "spans has 1; expected 2 or more"),
        (two_lanes, spans, [], "inputs has 0 tensors; expected 1, as the program declares"),
        (two_lanes, spans, [ids, ids], "inputs has 2 tensors; expected 1"),
        (two_lanes, spans, [ids.int()], r"inputs\[0\] is torch.int32 \[2\].*expected torch.int64"),
        (two_lanes, spans, [ids.view(2, 1)], r"inputs\[0\] is torch.int64 \[2, 1\].*1 dimension"),
        (two_lanes, spans, [torch.zeros(8).long()[::4]], r"inputs\[0\] has stride 4"),
        (two_lanes, spans, [ids[:1]], r"spans\[0\] does not fit node 0: .*run's input has 1"),
    ]
    for span in [(0, 3, 0, 0), (1, 2, 0, 0), (-1, 2, 0, 0), (0, -1, 0, 0), (2**62, 2**62, 0, 0)]:
        changed = as_spans([span, (0, 1, 0, 0)])
        message = f"a span takes {span[1]} rows from {span[0]} on; the operation was recorded with"
        refused.append((two_lanes, changed, [ids], message))
    for used, given, inputs, message in refused:
        with pytest.raises(ValueError, match=message):
            schedule.run(used, given, inputs)
    with pytest.raises(RuntimeError, match="the lane is closed"):
        schedule.run([two_lanes[0], other], spans, [ids])
    two_lanes[0].synchronize()
    assert not count.any()


# Lifetimes.


@pytest.mark.parametrize("first_closed", [0, 1])
def test_closing_a_lane_finishes_the_runs(first_closed):
    two = lanes.partition("cpu", [1, 1])
    assert all(isinstance(lane, lanes.CpuLane) for lane in two)
    chain, program, seen = Chain(), CpuProgram(), []
    slow = program.call(lambda node: (time.sleep(0.002), seen.append(node)))
    schedule = make_schedule(
        program,
        [[(LAUNCH, 0), (SIGNAL, 0), (WAIT, 2), (LAUNCH, 3)],
         [(WAIT, 0), (LAUNCH, 1), (LAUNCH, 2), (SIGNAL, 2)]],
        [slow, *chain.record(program)],
    )  # fmt: skip
    chain.clear()
    for _ in range(20):
        schedule.run(two, chain.span, [])  # type: ignore[arg-type]
    del schedule, program
    two[first_closed].close()
    assert len(seen) == 20
    two[1 - first_closed].close()
    assert torch.equal(chain.out, chain.expected)


def test_inputs_live_until_the_run_is_over(two_lanes):
    program, go = CpuProgram(), threading.Event()
    ids = torch.zeros(4096, dtype=torch.int64)
    program.input(ids)
    table, out = torch.arange(5000.0).view(-1, 1), torch.zeros(4096, 1)
    look_up = program.record(ops.CPU["embedding"], token_ids=ids, table=table, out=out)
    blocks = [program.call(lambda _: go.wait()), look_up]
    schedule = make_schedule(program, [[(LAUNCH, 0), (LAUNCH, 1)]], blocks)
    schedule.run(two_lanes[:1], as_spans([(0, 4096, 0, 0)]), [torch.arange(4096)])
    del program, schedule, table
    others = [torch.full((4096,), -1) for _ in range(20)]
    go.set()
    two_lanes[0].synchronize()
    assert torch.equal(out[:, 0], torch.arange(4096.0))
    assert len(others) == 20


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)"])
def test_a_process_may_end_while_runs_are_queued(end):
    code = (
        "import time\n"
        "import numpy as np\n"
        "from nf_kernels import lanes\n"
        "program = lanes.CpuProgram()\n"
        "block = program.call(lambda _: time.sleep(0.005))\n"
        "commands = [np.array([[0, i], [2, i]], np.int32) for i in range(2)]\n"
        "zeros = np.zeros(2, np.int32)\n"
        "schedule = program.schedule(commands, zeros + block, zeros)\n"
        "made = lanes.partition('cpu', [1, 1])\n"
        "for _ in range(50):\n"
        "    schedule.run(made, np.array([[0, 1, 0, 0]], np.int64), [])\n" + end
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == (3 if end else 0), result.stderr


def test_no_lane_begins_before_the_first_comes_to_the_run(two_lanes):
    program = CpuProgram()
    seen: list[tuple[str, float]] = []
    blocks = [program.call(lambda node: seen.append((f"node {node}", time.monotonic())))] * 2
    schedule = make_schedule(program, [[(LAUNCH, 0)], [(LAUNCH, 1)]], blocks)

    def slow() -> None:
        time.sleep(0.2)
        seen.append(("before", time.monotonic()))

    two_lanes[0].call(slow)
    schedule.run(two_lanes, as_spans([(0, 1, 0, 0)]), []).wait()
    assert seen[0][0] == "before"
    assert {name for name, _ in seen[1:]} == {"node 0", "node 1"}


def test_a_run_behind_an_error_of_the_first_lane_launches_nothing(two_lanes):
    program = CpuProgram()
    seen: list[int] = []
    schedule = make_schedule(
        program, [[(LAUNCH, 0)], [(LAUNCH, 1)]], [program.call(seen.append)] * 2
    )

    def fail() -> None:
        time.sleep(0.1)
        raise RuntimeError("no")

    two_lanes[0].call(fail)
    run = schedule.run(two_lanes, as_spans([(0, 1, 0, 0)]), [])
    run.wait()
    assert (run.failed, seen) == (True, [])
    with pytest.raises(ValueError, match="no"):
        two_lanes[0].synchronize()
    schedule.run(two_lanes, as_spans([(0, 1, 0, 0)]), []).wait()
    assert sorted(seen) == [0, 1]


def test_a_node_may_have_an_event_for_its_start_and_one_for_its_end(two_lanes):
    program = CpuProgram()
    seen: list[int] = []
    blocks = [program.call(seen.append)]
    commands = [[(SIGNAL, 0), (LAUNCH, 0), (SIGNAL, 1)], [(WAIT, 0), (WAIT, 1)]]
    make_schedule(program, commands, blocks).run(two_lanes, as_spans([(0, 1, 0, 0)]), []).wait()
    assert seen == [0]
    with pytest.raises(ValueError, match="argument 2; expected less than 2, twice the number"):
        make_schedule(program, [[(SIGNAL, 2), (LAUNCH, 0)]], blocks)

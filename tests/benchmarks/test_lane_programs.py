"""What a launch costs on a lane of one thread: by a program, with events, and called from Python.

The operation is a norm of one row, so small that the launch is nearly all there is. Each round
gives the lane a thousand of them and waits for the last; the best round counts.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

from nf_kernels import native_status
from nf_kernels.lanes import LAUNCH, SIGNAL, WAIT, CpuLane, CpuProgram, CpuSchedule, partition
from nf_kernels.ops import CPU

pytestmark = pytest.mark.skipif(not native_status().available, reason="needs the native kernels")

LAUNCHES = 1000
ROUNDS = 200
MOST_US_PER_LAUNCH = 3.0
SPANS = np.array([[0, 1, 0, 0]], dtype=np.int64)
Commands = list[tuple[int, int]]


@pytest.fixture(scope="module")
def lanes() -> Iterator[list[CpuLane]]:
    """Two of one thread each, or as many threads as half of the cores are."""
    made = cast("list[CpuLane]", partition("cpu", [1, 1]))
    yield made
    for lane in made:
        lane.close()


def small_norm() -> dict[str, Any]:
    return {
        "x": torch.randn(1, 64),
        "weight": torch.ones(64),
        "eps": 1e-5,
        "out": torch.empty(1, 64),
    }


def one_after_the_other() -> list[Commands]:
    return [[(LAUNCH, node) for node in range(LAUNCHES)]]


def with_an_event_each() -> list[Commands]:
    return [
        [
            command
            for node in range(LAUNCHES)
            for command in ((LAUNCH, node), (SIGNAL, node), (WAIT, node))
        ]
    ]


def ping_pong() -> list[Commands]:
    """Two lanes take turns: each launch waits for the other lane's."""
    commands: list[Commands] = [[], []]
    for node in range(LAUNCHES):
        wait = [(WAIT, node - 1)] if node else []
        commands[node % 2] += [*wait, (LAUNCH, node), (SIGNAL, node)]
    return commands


def schedule_of(commands: list[Commands]) -> CpuSchedule:
    program = CpuProgram()
    block = program.record(CPU["rms_norm"], **small_norm())
    rows = [np.array(lane, dtype=np.int32).reshape(-1, 2) for lane in commands]
    zeros = np.zeros(LAUNCHES, dtype=np.int32)
    return program.schedule(rows, zeros + block, zeros)


def best_microseconds(benchmark: Any, call: Callable[[], object]) -> float:
    """Of one launch."""
    seconds = []

    def timed() -> None:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)

    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=5)
    return min(seconds) / LAUNCHES * 1e6


def called_from_python(lane: CpuLane) -> float:
    """Best microseconds of one operation that Python queues on a lane."""
    operation, arguments, best = CPU["rms_norm"], small_norm(), float("inf")
    for _ in range(ROUNDS // 10):
        began = time.perf_counter()
        with lane:
            for _ in range(LAUNCHES):
                operation(**arguments)
        lane.synchronize()
        best = min(best, time.perf_counter() - began)
    return best / LAUNCHES * 1e6


@pytest.mark.parametrize("make", [one_after_the_other, with_an_event_each, ping_pong])
def test_a_launch(benchmark: Any, lanes: list[CpuLane], make: Callable[[], list[Commands]]) -> None:
    commands = make()
    if len(commands) == 2 and lanes[0].units == lanes[1].units:
        pytest.skip("two lanes need two cores")
    schedule, used = schedule_of(commands), lanes[: len(commands)]
    mine = best_microseconds(benchmark, lambda: schedule.run(used, SPANS, []).wait())
    theirs = called_from_python(lanes[0])
    benchmark.extra_info |= {
        "lanes": len(used),
        "threads_per_lane": [len(lane.units) for lane in used],
        "us_per_launch": mine,
        "us_called_from_python": theirs,
        "ratio": theirs / mine,
    }
    assert mine < MOST_US_PER_LAUNCH

"""The threads that help the one that runs an operation."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from nf_kernels import native_status, num_threads, set_num_threads
from nf_kernels.ops import CPU

pytestmark = [
    pytest.mark.skipif(not native_status().available, reason="needs the native kernels"),
    pytest.mark.skipif(
        not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
        reason="needs Linux and two cores",
    ),
]


def threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def last_core(thread: int) -> int:
    with open(f"/proc/self/task/{thread}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[36])


def run_together() -> None:
    """An operation that is worth a helper; and time for the helper to wait for the next one."""
    gate_up = torch.ones(64, 8192, dtype=torch.bfloat16)
    out = torch.empty(64, 4096, dtype=torch.bfloat16)
    for _ in range(3):
        CPU["swiglu"](gate_up=gate_up, out=out)
        time.sleep(0.02)


@pytest.fixture
def cores() -> Iterator[set[int]]:
    """All cores; this thread may run on the first of them alone."""
    everywhere, count = os.sched_getaffinity(0), num_threads()
    run_together()  # torch begins its threads
    os.sched_setaffinity(0, {min(everywhere)})
    yield everywhere
    os.sched_setaffinity(0, everywhere)
    set_num_threads(count)


@pytest.fixture
def helper(cores: set[int]) -> int:
    """The one helper of a pool of two, by its number in the system; it may run where this may."""
    set_num_threads(2)
    before = threads()
    run_together()
    (made,) = threads() - before
    return made


def test_a_helper_leaves_the_core_of_the_thread_that_it_helps(helper: int, cores: set[int]) -> None:
    own = min(cores)
    assert last_core(helper) == own  # there is no other core for it yet
    os.sched_setaffinity(helper, cores)
    run_together()
    assert os.sched_getaffinity(helper) == cores - {own}
    assert last_core(helper) != own

    # Nor does it stay where that thread goes to; and it may come back to where it was.
    other = last_core(helper)
    os.sched_setaffinity(0, {other})
    run_together()
    assert os.sched_getaffinity(helper) == cores - {other}


def test_a_helper_without_another_core_stays(helper: int, cores: set[int]) -> None:
    run_together()
    assert os.sched_getaffinity(helper) == {min(cores)}

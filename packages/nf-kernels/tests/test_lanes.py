"""Lanes run operations beside each other on shares of a device, and in order on each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf_kernels import lanes, native_status, num_threads, ops, set_num_threads
from nf_kernels.lanes.lane import grant

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")

pytestmark = pytest.mark.skipif(not native_status().available, reason="needs the native kernels")


@pytest.fixture
def two_lanes() -> Iterator[list[lanes.Lane]]:
    made = lanes.partition("cpu", [1, 1])
    yield made
    for lane in made:
        lane.close()


@given(st.integers(1, 200), st.lists(st.floats(0.001, 1000), min_size=1, max_size=12))
def test_units_are_granted_whole_and_disjoint_and_none_is_left(count, shares):
    units = list(range(100, 100 + count))
    granted = grant(units, shares)
    assert len(granted) == len(shares)
    assert all(granted)
    if count >= len(shares):
        assert [unit for lane in granted for unit in lane] == units
        exact = [count * share / sum(shares) for share in shares]
        # Nobody is more than a unit from the exact share, but for those that every lane must have.
        needed = sum(max(0.0, 1 - size) for size in exact)
        for lane, size in zip(granted, exact, strict=True):
            assert size - 1 - needed <= len(lane) <= size + 1
    else:
        assert {unit for lane in granted for unit in lane} == set(units)


@pytest.mark.parametrize("shares", [[], [0.5, 0], [-1], [float("nan")], [float("inf")]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match=r"shares(\[\d\])? is"):
        lanes.partition("cpu", shares)


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="device is 'meta'; lanes exist on cpu and cuda"):
        lanes.partition("meta", [1])


@two_cores
def test_a_lane_says_what_it_got(two_lanes):
    assert [unit for lane in two_lanes for unit in lane.units] == CORES
    assert sum(lane.share for lane in two_lanes) == pytest.approx(1)
    assert all(lane.exclusive for lane in two_lanes)


def test_more_lanes_than_cores_share_cores_and_say_so():
    many = lanes.partition("cpu", [1] * (len(CORES) + 1))
    assert {lane.units for lane in many} == {(core,) for core in CORES}
    assert not many[0].exclusive
    assert not many[-1].exclusive
    together = lanes.partition("cpu", [1, 1], mechanism="shared")
    assert all(lane.units == tuple(CORES) and not lane.exclusive for lane in together)
    for lane in (*many, *together):
        lane.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_each_thread_is_pinned_to_its_core():
    def pinned() -> dict[str, str]:
        found = {}
        for task in Path("/proc/self/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            allowed = next(line for line in lines if line.startswith("Cpus_allowed_list"))
            found[task.name] = allowed.split()[1]
        return found

    before = pinned()
    (lane,) = lanes.partition("cpu", [1])
    new = {task: cores for task, cores in pinned().items() if task not in before}
    assert sorted(new.values()) == sorted(str(core) for core in CORES)
    lane.close()
    assert set(pinned()) == set(before)


def work(native, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors for a chain of operations, and what the chain gives when it runs at once."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(200, 256, generator=generator).bfloat16()
    tensors = {
        "x": hidden,
        "norm": torch.rand(256, generator=generator).bfloat16(),
        "up": native.pack(torch.randn(1024, 256, generator=generator).bfloat16() / 16),
        "down": native.pack(torch.randn(256, 512, generator=generator).bfloat16() / 16),
    }
    results = {}
    for name, width in (("normed", 256), ("gate_up", 1024), ("inner", 512), ("out", 256)):
        results[name] = torch.zeros(200, width).bfloat16()
    return tensors, results


def run_chain(native, tensors, results) -> None:
    native["rms_norm"](x=tensors["x"], weight=tensors["norm"], eps=1e-5, out=results["normed"])
    native["linear"](x=results["normed"], weight=tensors["up"], out=results["gate_up"])
    native["swiglu"](gate_up=results["gate_up"], out=results["inner"])
    native["linear"](
        x=results["inner"], weight=tensors["down"], residual=tensors["x"], out=results["out"]
    )


def test_a_lane_runs_operations_in_order_with_the_same_result(native, two_lanes):
    for seed in range(20):
        tensors, expected = work(native, seed)
        run_chain(native, tensors, expected)
        _, got = work(native, seed)
        with two_lanes[seed % 2]:
            run_chain(native, tensors, got)
        two_lanes[seed % 2].synchronize()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name


def test_a_lane_of_all_cores_gives_the_same_result(native):
    (lane,) = lanes.partition("cpu", [1])
    tensors, expected = work(native, 1)
    run_chain(native, tensors, expected)
    _, got = work(native, 1)
    with lane:
        run_chain(native, tensors, got)
    lane.synchronize()
    assert torch.equal(got["out"], expected["out"])
    lane.close()


@two_cores
def test_two_lanes_work_at_the_same_time(native, two_lanes):
    spans = []
    cases = [work(native, seed) for seed in range(2)]
    for lane, case in zip(two_lanes, cases, strict=True):
        with lane:
            begin = lane.record()
            for _ in range(30):
                run_chain(native, *case)
            spans.append((begin, lane.record()))
    for _, end in spans:
        end.wait()
    (a, a_end), (b, b_end) = spans
    # Each began before the other had ended.
    assert a_end.seconds_since(b) > 0
    assert b_end.seconds_since(a) > 0


def test_a_call_returns_before_the_work_is_done(native, two_lanes):
    tensors, results = work(native, 0)
    with two_lanes[0]:
        for _ in range(50):
            run_chain(native, tensors, results)
        event = two_lanes[0].record()
        queued_first = not event.done()
    event.wait()
    assert queued_first
    assert event.done()


def test_a_lane_waits_for_another_ones_event(native, two_lanes):
    tensors, expected = work(native, 3)
    run_chain(native, tensors, expected)
    first, second = two_lanes
    for _ in range(50):
        _, got = work(native, 3)
        with first:
            native["rms_norm"](x=tensors["x"], weight=tensors["norm"], eps=1e-5, out=got["normed"])
            native["linear"](x=got["normed"], weight=tensors["up"], out=got["gate_up"])
        second.wait(first.record())
        with second:
            native["swiglu"](gate_up=got["gate_up"], out=got["inner"])
        second.synchronize()
        assert torch.equal(got["inner"], expected["inner"])


def test_an_index_out_of_range_stops_the_lane_until_it_is_told(native, two_lanes):
    lane, table = two_lanes[0], torch.randn(10, 8)
    out, after = torch.zeros(2, 8), torch.zeros(2, 8)
    with lane:
        native["embedding"](token_ids=torch.tensor([1, 10]), table=table, out=out)
        native["rms_norm"](x=table[:2], weight=torch.ones(8), eps=1e-5, out=after)
        event = lane.record()
    event.wait()
    with pytest.raises(ValueError, match=r"token_ids\[1\] is 10; expected 0 to 9"):
        lane.synchronize()
    assert not out.any()
    assert not after.any()
    with lane:
        native["rms_norm"](x=table[:2], weight=torch.ones(8), eps=1e-5, out=after)
    lane.synchronize()
    assert after.any()


def test_plain_torch_takes_its_turn_on_a_lane(native, two_lanes):
    lane, head_dim = two_lanes[0], 514  # larger than the kernels take
    x, norm = torch.randn(2, head_dim), torch.ones(head_dim)
    queries, out = torch.zeros(2, head_dim), torch.zeros(2, head_dim)
    cache = {name: torch.randn(2, 1, 4, head_dim) for name in ("k_cache", "v_cache")}
    pages = {
        "page_table": torch.tensor([[0], [1]], dtype=torch.int32),
        "seq_lens": torch.tensor([4, 3], dtype=torch.int32),
    }
    big = torch.randn(4000, 1000)
    with lane:
        native["rms_norm"](x=big, weight=torch.ones(1000), eps=1e-5, out=torch.empty_like(big))
        native["rms_norm"](x=x, weight=norm, eps=1e-5, out=queries)
        native["decode_attention"](q=queries, scale=0.1, window=0, out=out, **pages, **cache)
    lane.synchronize()
    normalized, expected = torch.zeros(2, head_dim), torch.zeros(2, head_dim)
    ops.REFERENCE["rms_norm"](x=x, weight=norm, eps=1e-5, out=normalized)
    torch.testing.assert_close(queries, normalized, rtol=1e-5, atol=1e-6)
    ops.REFERENCE["decode_attention"](
        q=queries, scale=0.1, window=0, out=expected, **pages, **cache
    )
    assert torch.equal(out, expected)


def test_lanes_nest_and_belong_to_one_thread(native, two_lanes):
    outer, inner = two_lanes
    x, out = torch.randn(4, 8), torch.zeros(4, 8)
    seen = []

    def elsewhere() -> None:
        result = torch.zeros(4, 8)
        native["rms_norm"](x=x, weight=torch.ones(8), eps=1e-5, out=result)
        seen.append(bool(result.any()))  # at once: the other thread's lane is not this one's

    with outer:
        with inner:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        outer.wait(inner.record())
        native["rms_norm"](x=x, weight=torch.ones(8), eps=1e-5, out=out)
        outer.synchronize()
    assert seen == [True]
    assert out.any()
    out.zero_()
    native["rms_norm"](x=x, weight=torch.ones(8), eps=1e-5, out=out)
    assert out.any()  # no lane any more


def test_a_closed_lane_says_so():
    (lane,) = lanes.partition("cpu", [1])
    lane.close()
    lane.close()
    with pytest.raises(RuntimeError, match="the lane is closed"):
        lane.synchronize()
    with pytest.raises(RuntimeError, match="the lane is closed"), lane:
        pass


def test_closing_finishes_what_is_queued(native):
    (lane,) = lanes.partition("cpu", [1])
    tensors, results = work(native, 0)
    with lane:
        for _ in range(20):
            run_chain(native, tensors, results)
    lane.close()
    assert results["out"].any()


def test_the_time_of_an_event_needs_the_event(two_lanes, native):
    lane = two_lanes[0]
    tensors, results = work(native, 0)
    first = lane.record()
    with lane:
        for _ in range(50):
            run_chain(native, tensors, results)
    second = lane.record()
    with pytest.raises(ValueError, match="an event is not done yet"):
        second.seconds_since(first)
    second.wait()
    assert second.seconds_since(first) > 0


@pytest.fixture
def undivided() -> Iterator[lanes.CpuLane]:
    lane = lanes.undivided_cpu()
    yield lane
    lane.close()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_undivided_lane_has_the_threads_of_all_operations(threads):
    before = num_threads()
    set_num_threads(threads)
    try:
        tasks = set(os.listdir("/proc/self/task")) if sys.platform.startswith("linux") else set()
        lane = lanes.undivided_cpu()
        if tasks:
            new = set(os.listdir("/proc/self/task")) - tasks
            assert len(new) == threads
            assert all(os.sched_getaffinity(int(task)) == set(CORES) for task in new)
        lane.close()
    finally:
        set_num_threads(before)


def test_an_undivided_lane_gives_what_operations_give_outside(undivided):
    native = ops.load("cpu")
    tensors, expected = work(native, 1)
    run_chain(native, tensors, expected)
    results = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with undivided:
        run_chain(native, tensors, results)
    undivided.synchronize()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_python_is_called_between_operations(undivided):
    native = ops.load("cpu")
    slots, kept = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    seen = []
    with undivided:
        for number in range(100):
            native["keep_sampled"](sampled=torch.full((1,), number), slots=slots, last_sampled=kept)
            undivided.call(lambda: seen.append(int(kept)))
    undivided.synchronize()
    assert seen == list(range(100))


def test_what_python_raises_is_the_error_of_the_lane(undivided):
    seen = []
    undivided.call(lambda: 1 // 0)
    undivided.call(lambda: seen.append(1))
    event = undivided.record()
    event.wait()
    assert event.failed
    assert "ZeroDivisionError" in undivided.error
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        undivided.synchronize()
    assert undivided.error == ""  # it was told
    undivided.call(lambda: seen.append(2))
    undivided.synchronize()
    assert seen == [2]


def test_nothing_runs_behind_an_error_until_it_was_told(undivided):
    """Not in the middle of what is queued either, when somebody has asked for the error."""
    native = ops.load("cpu")
    slots, kept = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    seen = []
    for _ in range(20):
        before = undivided.record()
        undivided.call(lambda: 1 // 0)
        event = undivided.record()
        with undivided:
            for _ in range(50):
                native["keep_sampled"](
                    sampled=torch.ones(1, dtype=torch.int64), slots=slots, last_sampled=kept
                )
                undivided.call(lambda: seen.append(1))
        event.wait()
        assert event.failed
        assert not before.failed
        assert undivided.error
        with pytest.raises(ValueError, match="ZeroDivisionError"):
            undivided.synchronize()
    assert not seen
    assert kept.tolist() == [0]


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)"])
def test_a_process_may_end_while_python_is_queued(end):
    code = (
        "import time\n"
        "from nf_kernels import lanes\n"
        "lane = lanes.undivided_cpu()\n"
        "for _ in range(50):\n"
        "    lane.call(lambda: time.sleep(0.005))\n" + end
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == (3 if end else 0), result.stderr


def test_a_lane_that_ends_still_calls_what_it_was_given():
    lane = lanes.undivided_cpu()
    go, seen = threading.Event(), []
    lane.call(go.wait)
    lane.call(lambda: seen.append(1))
    threading.Timer(0.05, go.set).start()
    lane.close()
    assert seen == [1]

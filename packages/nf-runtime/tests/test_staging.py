"""Buffers that iterations take in turn: nothing is overwritten before it was read."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nf_runtime.staging import FixedArrays, StagingBuffer, StagingRing

CPU = torch.device("cpu")


class SlowDevice:
    """Reads its buffers late, in order: when it is told to."""

    def __init__(self) -> None:
        self.may_read = threading.Semaphore(0)
        self.read: list[list[int]] = []
        self._work = ThreadPoolExecutor(1)

    def launch(self, buffer: StagingBuffer) -> "Future[None]":
        def work() -> None:
            self.may_read.acquire()
            buffer.upload()
            self.read.append(buffer.on_device("ids").tolist())

        return self._work.submit(work)

    def close(self) -> None:
        self._work.shutdown()


class ReadGuard:
    """Until the device has read."""

    def __init__(self, work: "Future[None]") -> None:
        self._work = work

    def wait(self) -> None:
        self._work.result()


def run(device: SlowDevice, ring: StagingRing, iterations: int, *, guarded: bool) -> None:
    """Stage and launch as fast as the ring allows; the device reads whenever somebody waits."""
    for iteration in range(iterations):
        waiter = threading.Timer(0.02, device.may_read.release)
        waiter.start()
        buffer = ring.acquire()
        buffer.fill({"ids": np.full(3 + iteration % 5, iteration, dtype=np.int32)})
        work = device.launch(buffer)
        ring.release(ReadGuard(work) if guarded else Never())
    for _ in range(iterations):
        device.may_read.release()
    device.close()


class Never:
    def wait(self) -> None:
        pass


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_late_device_reads_what_was_meant_for_it(depth: int) -> None:
    device = SlowDevice()
    run(device, StagingRing(depth, CPU), 12, guarded=True)
    assert device.read == [[i] * (3 + i % 5) for i in range(12)]


def test_without_guards_it_would_not() -> None:
    """The comparison above sees the fault that guards are there for."""
    device = SlowDevice()
    run(device, StagingRing(2, CPU), 12, guarded=False)
    assert device.read != [[i] * (3 + i % 5) for i in range(12)]


def test_a_buffer_holds_arrays_of_every_kind_side_by_side() -> None:
    buffer = StagingBuffer(CPU)
    arrays = {
        "ids": np.arange(7, dtype=np.int64),
        "none": np.empty(0, dtype=np.int32),
        "table": np.arange(6, dtype=np.int32).reshape(2, 3),
        "numbers": np.linspace(0, 1, 5, dtype=np.float32),
        "large": np.arange(100_000, dtype=np.int32),
    }
    for _ in range(2):
        buffer.fill(arrays)
        buffer.upload()
        for name, array in arrays.items():
            for tensor in (buffer.host(name), buffer.on_device(name)):
                assert np.array_equal(tensor.numpy(), array)
                assert tensor.data_ptr() % 64 == 0 or not array.size
        arrays["ids"] = arrays["ids"][::-1]


def filled(ids: list[int], lens: list[int]) -> StagingBuffer:
    buffer = StagingBuffer(CPU)
    more = np.arange(3, dtype=np.float32)
    buffer.fill({"ids": np.array(ids), "lens": np.array(lens, dtype=np.int32), "more": more})
    buffer.upload()
    return buffer


def test_fixed_arrays_stay_where_they_are() -> None:
    fixed = FixedArrays(filled([1, 2, 3], [4, 5]), ["ids", "lens"])
    ids, lens = fixed.on_device("ids"), fixed.on_device("lens")
    buffer = filled([7, 8, 9], [10, 11])
    fixed.take(buffer)
    buffer.fill({"ids": np.zeros(3, dtype=np.int64)})  # for the next iteration
    assert ids.tolist() == [7, 8, 9]
    assert lens.tolist() == [10, 11]
    assert fixed.on_device("ids").data_ptr() == ids.data_ptr()


def test_fixed_arrays_tell_which_numbers_they_have_on_the_host() -> None:
    fixed = FixedArrays(filled([1], [2]), ["ids", "lens"])
    buffer = filled([3], [4])
    fixed.take(buffer)
    assert fixed.host("ids").tolist() == [3]
    assert fixed.host("lens").data_ptr() == buffer.host("lens").data_ptr()


@pytest.mark.parametrize(("ids", "lens"), [([1] * 9, [2]), ([1], [2, 3])])
def test_fixed_arrays_of_other_shapes_are_refused(ids: list[int], lens: list[int]) -> None:
    fixed = FixedArrays(filled([1], [2]), ["ids", "lens"])
    with pytest.raises(
        RuntimeError, match=r"^array (ids|lens) is \[\d\]; expected at most \[1\], wh"
    ):
        fixed.take(filled(ids, lens))


def table(rows: list[list[int]]) -> StagingBuffer:
    buffer = StagingBuffer(CPU)
    buffer.fill({"table": np.array(rows, dtype=np.int32)})
    buffer.upload()
    return buffer


def test_a_fixed_table_takes_one_with_fewer_columns() -> None:
    fixed = FixedArrays(table([[1, 2, 3], [4, 5, 6]]), ["table"])
    fixed.take(table([[7], [8]]))
    assert fixed.on_device("table").tolist() == [[7, 2, 3], [8, 5, 6]]
    assert fixed.host("table").tolist() == [[7], [8]]
    with pytest.raises(RuntimeError, match=r"^array table is \[2, 4\]; expected at most \[2, 3\]"):
        fixed.take(table([[1] * 4] * 2))

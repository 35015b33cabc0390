"""Buffers that iterations take in turn: nothing is overwritten before it was read."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nf_runtime.staging import StagingBuffer, StagingRing

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

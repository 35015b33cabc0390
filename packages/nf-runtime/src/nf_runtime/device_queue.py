"""Work on a device, in the order in which it is given, beside the thread that gives it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class DeviceQueue(Protocol):
    """Runs work one after the other."""

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Give it more work; the result, or what it raised, once that has been done."""

    def close(self) -> None:
        """End, after what was given."""


class InlineQueue:
    """Does the work at once, on the calling thread.

    On a GPU that means to launch it, because kernels run on a stream by themselves. On a CPU it
    means to wait for it.
    """

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Do it."""
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing is left to do."""


class ThreadQueue:
    """Does the work on a thread of its own, which stands for the CPU as a device."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nf-device")

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Have it done after what was given before."""
        return self._thread.submit(work)

    def close(self) -> None:
        """Wait for what was given, and end the thread."""
        self._thread.shutdown()


def make_queue(device: torch.device, *, asynchronous: bool) -> DeviceQueue:
    """The queue of a device.

    Args:
        device: Where the work goes.
        asynchronous: Whether the caller wants to do something else meanwhile.
    """
    return ThreadQueue() if asynchronous and device.type == "cpu" else InlineQueue()

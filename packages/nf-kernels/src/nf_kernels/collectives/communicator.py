"""A group of ranks that exchange tensors: the interface, its checks, and the group of one rank."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
"""What every communicator sends."""


class CommunicatorError(RuntimeError):
    """The ranks could not meet, an operation was not completed, or its communicator is closed."""


class Communicator(ABC):
    """A group of ranks that exchange tensors, as one of its ranks sees it.

    All ranks call the same operations in the same order, with tensors of the same shape and dtype.
    The tensors belong to the caller, lie on `device`, are contiguous (a range of the rows of a
    contiguous tensor is), and hold float32, bfloat16, float16, int32 or int64. Where they hold no
    element, nothing is sent. A wrong argument is a `ValueError` on the rank that passed it, before
    anything is sent; the others then wait for that rank, so it should call again or close.

    On a CPU an operation returns when it is done. On a CUDA device it is queued on the current
    stream, and the tensors may be used on that stream at once. Calls must not overlap: threads,
    streams and lanes that run at the same time need a communicator each.

    A communicator is a context manager that closes itself.

    Attributes:
        rank: Number of this rank, from 0 to world_size - 1.
        world_size: Number of ranks.
        device: Where the tensors lie.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._ended = ""

    @property
    def invariant(self) -> bool:
        """Whether row i of a sum depends on row i of the ranks' tensors alone, bit by bit.

        So it is for two ranks, because addition commutes. From three on, the order in which ranks
        are added depends on where in the tensor an element lies, and with it the last bit.
        """
        return self.world_size <= 2

    def all_reduce(self, x: Tensor) -> None:
        """Replace the tensor of every rank by their sum, the same bits on every rank.

        Args:
            x: Any shape. Each addition of two ranks' elements rounds to the dtype of `x`.

        Raises:
            ValueError: `x` is not as the class says.
            CommunicatorError: A peer died or did not take part in time.
        """
        self._check_tensor("x", x)
        self._check_open("all_reduce")
        if x.numel():
            self._all_reduce(x)

    def all_gather(self, x: Tensor, *, out: Tensor) -> None:
        """Concatenate the tensors of all ranks along their rows, in the order of the ranks.

        To concatenate along columns, gather x [T, D] to out [world_size * T, D]:
        `out.view(world_size, T, D).transpose(0, 1)` is [T, world_size, D], and row t of it holds
        row t of all ranks, one after the other. It is a view; `.reshape(T, world_size * D)` copies
        it for an operation that needs the columns next to each other.

        Args:
            x: [R, ...].
            out: [world_size * R, ...], dtype of `x`. It may hold `x` as its rows rank * R to
                (rank + 1) * R, which are then not copied, and must not overlap it otherwise.

        Raises:
            ValueError: An argument is not as described.
            CommunicatorError: A peer died or did not take part in time.
        """
        self._check_pair(x, out, whole=out, whole_name="out", part=x, part_name="x")
        own_rows = out.data_ptr() + self.rank * x.nbytes
        if _overlap(x, out) and x.data_ptr() != own_rows:
            raise ValueError(
                f"x and out overlap; expected separate memory, "
                f"or x as the rows of rank {self.rank} in out"
            )
        self._check_open("all_gather")
        if x.numel():
            self._all_gather(x, out)

    def reduce_scatter(self, x: Tensor, *, out: Tensor) -> None:
        """Sum the tensors of all ranks and leave each rank its share of the rows.

        Args:
            x: [world_size * R, ...]; keeps its values.
            out: [R, ...], dtype of `x`, not overlapping it. Becomes rows rank * R to
                (rank + 1) * R of the sum; each addition rounds to the dtype.

        Raises:
            ValueError: An argument is not as described.
            CommunicatorError: A peer died or did not take part in time.
        """
        self._check_pair(x, out, whole=x, whole_name="x", part=out, part_name="out")
        if _overlap(x, out):
            raise ValueError("x and out overlap; expected separate memory")
        self._check_open("reduce_scatter")
        if x.numel():
            self._reduce_scatter(x, out)

    def barrier(self) -> None:
        """Return when every rank has called this; on a CUDA device, after the work queued before.

        Raises:
            CommunicatorError: A peer died or did not take part in time.
        """
        self._check_open("barrier")
        self._barrier()

    def close(self) -> None:
        """Leave the group, without waiting for the other ranks; closing again does nothing.

        A peer that is in an operation, or calls one afterwards, gets a `CommunicatorError`.
        """
        if not self._ended:
            self._ended = "the communicator is closed"
            self._close(failed=False)

    def abort(self) -> None:
        """Leave a group of which other ranks have ended; what waits for them is given up."""
        if not self._ended:
            self._ended = "the communicator is closed"
            self._close(failed=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _all_reduce(self, x: Tensor) -> None: ...

    @abstractmethod
    def _all_gather(self, x: Tensor, out: Tensor) -> None: ...

    @abstractmethod
    def _reduce_scatter(self, x: Tensor, out: Tensor) -> None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    @abstractmethod
    def _close(self, *, failed: bool) -> None: ...

    def _fail(self, operation: str, cause: Exception) -> NoReturn:
        """Leave the group, so that peers that wait for this rank fail too instead of waiting on."""
        self._ended = f"{operation} has failed before"
        self._close(failed=True)
        raise CommunicatorError(
            f"{operation} failed on rank {self.rank} of {self.world_size}: "
            f"{_first_sentence(cause)}. The communicator is closed and the operation's tensors are "
            f"undefined; see why another rank stopped or fell behind, start all ranks again and "
            f"connect"
        ) from cause

    def _check_open(self, operation: str) -> None:
        if self._ended:
            raise CommunicatorError(
                f"{operation} on rank {self.rank} of {self.world_size}: {self._ended}; "
                f"connect all ranks again"
            )

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}"
            )
        if tensor.device != self.device:
            raise ValueError(
                f"{name} is on {tensor.device}; expected {self.device}, "
                f"the device of this communicator"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} {list(tensor.shape)} has strides {list(tensor.stride())}; "
                f"expected a contiguous tensor, such as a range of whole rows"
            )

    def _check_pair(
        self,
        x: Tensor,
        out: Tensor,
        *,
        whole: Tensor,
        whole_name: str,
        part: Tensor,
        part_name: str,
    ) -> None:
        """Check that `whole` has the rows of `part` once for each rank."""
        self._check_tensor("x", x)
        self._check_tensor("out", out)
        if out.dtype != x.dtype:
            raise ValueError(f"out is {out.dtype}; expected {x.dtype}, the dtype of x")
        if not part.dim():
            raise ValueError(f"{part_name} is a scalar; expected at least one dimension")
        expected = [self.world_size * part.shape[0], *part.shape[1:]]
        if list(whole.shape) != expected:
            raise ValueError(
                f"{whole_name} is {list(whole.shape)}; expected {expected}, "
                f"the rows of {part_name} {list(part.shape)} for each of {self.world_size} ranks"
            )


def _first_sentence(error: Exception) -> str:
    """What libraries say before they go on about where in their source, and what else to try."""
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip())
    return re.split(r"\. |\.?\n|\.$", text, maxsplit=1)[0] or type(error).__name__


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    return (
        a.data_ptr() < b.data_ptr() + b.nbytes
        and b.data_ptr() < a.data_ptr() + a.nbytes
        and a.numel() > 0
    )


class SingleCommunicator(Communicator):
    """The group of one rank: a sum is the tensor itself, and nothing is sent.

    Args:
        device: Where the tensors lie; any device of torch.
    """

    def __init__(self, *, device: torch.device) -> None:
        super().__init__(rank=0, world_size=1, device=device)

    def _all_reduce(self, x: Tensor) -> None:
        pass

    def _all_gather(self, x: Tensor, out: Tensor) -> None:
        if x.data_ptr() != out.data_ptr():
            out.copy_(x)

    def _reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x)

    def _barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _close(self, *, failed: bool) -> None:
        pass

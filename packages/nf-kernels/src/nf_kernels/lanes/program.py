"""Programs: operations that are checked once, and run again and again on lanes of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nf_kernels.lanes.cpu import CpuEvent, CpuLane, outside_of_lanes
from nf_kernels.native import native_module, native_status

LAUNCH, WAIT, SIGNAL = range(3)
"""Codes of the commands of a schedule."""

_INPUT_ARGUMENTS = frozenset(
    {"token_ids", "index", "positions", "slots", "page_table", "seq_lens", "query_start"}
)


class NotRecordable(RuntimeError):
    """An operation that the native kernels do not run alone; `CpuProgram.call` can call it."""


class CpuProgram:
    """Operations with their arguments, written down to be launched on any of their rows.

    An operation is checked when it is recorded, with whole tensors: the most rows and requests that
    it will have. A launch works on a *span* of them. Whatever has a row for each token (x, out,
    residual, expert_ids, …) is taken from the span's first row on, and so are token_ids, index,
    positions and slots; page_table, seq_lens and query_start are taken from its first request on.
    What `gather_rows` reads from, weights and caches are whole. Rows may be views of wider tensors.

    A tensor that changes from run to run is declared as an input, and recorded with a placeholder.
    Indices are checked by every launch.

    Two launches of `moe_experts` that may run at the same time need blocks with scratch of their
    own.
    """

    def __init__(self) -> None:
        """Begin an empty program.

        Raises:
            RuntimeError: The native kernels are missing.
        """
        module = native_module()
        if module is None:
            raise RuntimeError(
                f"programs of a CPU need the native kernels: {native_status().reason}"
            )
        self._native: Any = module.Program()
        self._placeholders: list[Tensor] = []
        # Arguments and functions of the blocks, which the native program does not own.
        self._kept: list[object] = []

    def input(self, placeholder: Tensor) -> int:
        """Declare a tensor that stands for one given anew at every run.

        It can be the token_ids, index, positions, slots, page_table, seq_lens or query_start of
        operations that are recorded from now on.

        Args:
            placeholder: int64 or int32, [rows] or [rows, width], with as many rows as the largest;
                what it holds is never read.

        Returns:
            Its number: its place in `CpuSchedule.run`'s inputs.

        Raises:
            ValueError: It is empty, or nothing that a run could replace, or lies in another input.
            RuntimeError: Something has been recorded already.
        """
        if self._kept:
            raise RuntimeError("input was called after record or call; declare all inputs first")
        _check_input("placeholder", placeholder, placeholder.dtype, placeholder.dim())
        if placeholder.dtype not in (torch.int32, torch.int64) or placeholder.dim() not in (1, 2):
            raise ValueError(
                f"placeholder is {placeholder.dtype} {list(placeholder.shape)}; expected "
                f"torch.int32 or torch.int64, [rows] or [rows, width]"
            )
        if not placeholder.numel():
            raise ValueError(
                f"placeholder is {list(placeholder.shape)}; expected the most rows it will have"
            )
        for number, other in enumerate(self._placeholders):
            if _overlap(placeholder, other):
                raise ValueError(
                    f"placeholder lies in that of input {number}; expected memory of its own"
                )
        self._placeholders.append(placeholder)
        return int(self._native.add_input(*_native_input(placeholder)))

    def record(self, operation: Callable[..., None], **arguments: Any) -> int:
        """Check an operation and write it down; it is not run.

        Args:
            operation: A function of `ops.CPU`.
            arguments: Its arguments, with the most rows and requests that it will have. The program
                keeps them alive.

        Returns:
            The number of the block.

        Raises:
            ValueError: An argument is refused by the operation, or begins in the middle of an
                input, or lies in one and cannot be given anew.
            NotRecordable: The operation computes in plain torch with these arguments, or samples,
                or is no function of `ops.CPU`.
        """
        name = getattr(operation, "__name__", repr(operation))
        for argument, value in arguments.items():
            if isinstance(value, Tensor):
                self._check_place(argument, value)
        with outside_of_lanes():
            block = self._native.record(lambda: operation(**arguments))
        if block is None:
            raise NotRecordable(
                f"{name} cannot be recorded; expected an operation of ops.CPU that does not "
                f"sample, use CpuProgram.call"
            )
        self._kept.append(arguments)
        return int(block)

    def call(self, function: Callable[[int], object]) -> int:
        """Write down a call of Python.

        Args:
            function: Called with the number of the node, holding the GIL, on the lane's thread;
                what it raises is the run's error.

        Returns:
            The number of the block.
        """
        self._kept.append(function)
        return int(self._native.call(function))

    def schedule(
        self, commands: Sequence[np.ndarray], blocks: np.ndarray, spans: np.ndarray
    ) -> CpuSchedule:
        """Say in which order, and on which lanes, blocks are launched.

        A node is a launch of a block on one of the spans that a run is given; nodes may share
        blocks, and spans. An event has a number below twice that of nodes, and orders lanes: what
        follows its WAIT comes after what precedes its SIGNAL.

        Args:
            commands: For each lane int32 [n, 2], rows (code, argument): (LAUNCH, node),
                (WAIT, event) or (SIGNAL, event).
            blocks: int32 [nodes], the block of each node.
            spans: int32 [nodes], which of a run's spans each works on.

        Raises:
            ValueError: There is no lane, a number is out of range, a node is launched or an event
                signalled twice, an event is waited for and not signalled, or lanes wait for each
                other.
        """
        for lane, rows in enumerate(commands):
            _check_array(f"commands[{lane}]", rows, np.int32, (None, 2))
        _check_array("blocks", blocks, np.int32, (None,))
        _check_array("spans", spans, np.int32, (None,))
        native = self._native.schedule(list(commands), blocks, spans)
        return CpuSchedule(self, native, tuple(self._placeholders))

    def _check_place(self, name: str, tensor: Tensor) -> None:
        """Refuse a tensor in an input that no run could replace."""
        for number, placeholder in enumerate(self._placeholders):
            if not _overlap(tensor, placeholder):
                continue
            if name not in _INPUT_ARGUMENTS:
                raise ValueError(
                    f"{name} lies in input {number}; expected one of "
                    f"{', '.join(sorted(_INPUT_ARGUMENTS))} there"
                )
            if tensor.data_ptr() != placeholder.data_ptr():
                raise ValueError(
                    f"{name} begins in the middle of input {number}; expected its beginning, the "
                    f"span of a launch chooses rows and requests"
                )


class CpuSchedule:
    """An order in which lanes launch a program's blocks; made by `CpuProgram.schedule`."""

    def __init__(self, program: CpuProgram, native: Any, placeholders: tuple[Tensor, ...]) -> None:
        self._program = program
        self._native = native
        self._placeholders = placeholders

    def run(
        self,
        lanes: Sequence[CpuLane],
        spans: np.ndarray,
        inputs: Sequence[Tensor],
        *,
        on_call: Callable[[int], object] | None = None,
    ) -> CpuRun:
        """Queue one run on its lanes; return at once.

        The run begins when the first lane comes to it, and ends there when all lanes are through.
        Its first error stops it, and is the error of the first lane; other lanes stay usable.
        Where the first lane has an error already, the run is dropped.

        Args:
            lanes: One for each of the schedule's, all different.
            spans: int64 [n, 4], rows (first row, number of rows, first request, number of
                requests). A launch without rows does nothing.
            inputs: One tensor for each input, in their order, dtypes and dimensions as declared;
                the number of rows, and for two dimensions their width and stride, may differ. They
                are kept alive, and must not be written to before the run is over.
            on_call: Called with the number of the node in place of the functions of `call`.

        Raises:
            ValueError: The lanes, the spans or the inputs are not as above, or a node's span is
                outside of what its block was recorded with, or of the inputs.
            RuntimeError: A lane is closed.
        """
        _check_array("spans", spans, np.int64, (None, 4))
        for number, lane in enumerate(lanes):
            if not isinstance(lane, CpuLane):
                raise ValueError(
                    f"lanes[{number}] is a {type(lane).__name__}; expected a lane of a CPU"
                )
        for number, (tensor, placeholder) in enumerate(
            zip(inputs, self._placeholders, strict=False)
        ):
            _check_input(f"inputs[{number}]", tensor, placeholder.dtype, placeholder.dim())
        rows = np.array([_native_input(tensor) for tensor in inputs], np.int64).reshape(-1, 4)
        native = self._native.run([lane.native for lane in lanes], spans, rows, on_call)
        kept: Mapping[str, Any] = {"schedule": self, "inputs": tuple(inputs), "on_call": on_call}
        run = CpuRun(native)
        lanes[0].keep(kept, until=run.end)
        return run


class CpuRun:
    """One run of a schedule; made by `CpuSchedule.run`.

    Attributes:
        end: The event of the first lane that says that the run is over.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        self.end = CpuEvent(native.end)

    def done(self) -> bool:
        """Whether all lanes are through with it."""
        return self.end.done()

    def wait(self) -> None:
        """Block until all lanes are through with it."""
        self.end.wait()

    @property
    def failed(self) -> bool:
        """Whether it was stopped or dropped; to be asked when it is done.

        `CpuLane.synchronize` of the first lane raises the error.
        """
        self._check_done()
        return bool(self._native.failed())

    def times(self) -> np.ndarray:
        """When each node ran.

        Returns:
            int64 [nodes, 2], start and end in nanoseconds of the steady clock (that of
            `time.monotonic_ns` on Linux); 0 where it did not run.

        Raises:
            ValueError: The run is not done yet.
        """
        self._check_done()
        times: np.ndarray = self._native.times()
        return times

    def _check_done(self) -> None:
        if not self.done():
            raise ValueError("the run is not done yet; wait for it first")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte, and of that after its last."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    first = tensor.data_ptr()
    return first, first + (last + 1) * tensor.element_size() if tensor.numel() else first


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    return a_first < b_end and b_first < a_end


def _native_input(tensor: Tensor) -> tuple[int, int, int, int]:
    """What the extension is given for an input: address, rows, width, stride."""
    if tensor.dim() == 1:
        return tensor.data_ptr(), tensor.shape[0], 1, 1
    return tensor.data_ptr(), tensor.shape[0], tensor.shape[1], tensor.stride(0)


def _check_input(name: str, tensor: Tensor, dtype: torch.dtype, dimensions: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dimensions or not tensor.is_cpu:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {dtype} "
            f"of {dimensions} dimensions on cpu"
        )
    if dimensions and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1, "
            f"make it contiguous"
        )


def _check_array(
    name: str, array: np.ndarray, dtype: type[np.generic], shape: tuple[int | None, ...]
) -> None:
    fits = array.ndim == len(shape) and all(
        want in (None, size) for size, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)}; expected {dtype.__name__} [{expected}]"
        )

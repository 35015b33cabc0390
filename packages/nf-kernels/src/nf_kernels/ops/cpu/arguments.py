"""Checks of arguments, and what the extension is given for them: addresses and numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nf_kernels.lanes.cpu import current_lane
from nf_kernels.lanes.program import NotRecordable
from nf_kernels.native import native_module
from nf_kernels.ops import packing
from nf_kernels.ops.checks import Checks

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernels() -> Any:
    """The compiled extension."""
    return native_module()


_checks = Checks("cpu", tuple(_DTYPES))
check, check_contiguous, check_caches = _checks.tensor, _checks.contiguous, _checks.caches


def check_packed(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    experts: tuple[int, ...],
    out_features: int,
    in_features: int,
) -> None:
    """Refuse a weight [N, K], or [*experts, N, K], that is not as `packing.pack` makes it."""
    expected = (*experts, *packing.packed_shape(out_features, in_features, dtype))
    if tensor.shape != expected and tensor.dim() == 2 + len(experts):
        raise ValueError(
            f"{name} is {list(tensor.shape)}, not packed; expected {list(expected)}, "
            f"as OperationSet.pack makes it"
        )
    check(name, tensor, dtype, expected)
    check_contiguous(name, tensor)


def in_plain_torch(operation: Callable[..., None], **arguments: Any) -> None:
    """Run an operation on what the kernels do not take; it waits for a lane instead of queueing.

    Raises:
        NotRecordable: A program is recording.
    """
    if kernels().is_recording():
        raise NotRecordable(
            f"{operation.__name__} runs in plain torch with these arguments, which the native "
            f"kernels do not take; it cannot be recorded, use CpuProgram.call"
        )
    lane = current_lane()
    if lane is not None:
        lane.synchronize()
    operation(**arguments)


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first element; 0 for none."""
    return tensor.data_ptr() if tensor is not None else 0


def scratch_address(scratch: Tensor | None, needed: int) -> int:
    """The address of scratch of at least `needed` bytes."""
    if scratch is None:
        raise ValueError(
            f"scratch is None; expected uint8 [{needed}] or more, see OperationSet.scratch_bytes"
        )
    check("scratch", scratch, torch.uint8, (None,))
    if scratch.shape[0] < needed:
        raise ValueError(f"scratch is uint8 [{scratch.shape[0]}]; expected [{needed}] or more")
    return scratch.data_ptr()


def dtype_code(name: str, tensor: Tensor) -> int:
    """The extension's number for a tensor's dtype."""
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(
            f"{name} is {tensor.dtype}; expected torch.float32, torch.bfloat16 or torch.float16"
        )
    return code

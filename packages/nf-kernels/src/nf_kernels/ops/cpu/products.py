"""Products with packed weights."""

import torch
from torch import Tensor

from nf_kernels.ops.cpu.arguments import (
    address,
    check,
    check_packed,
    dtype_code,
    kernels,
)


def linear(
    *,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """As `reference.linear`, with a weight that `packing.pack` has packed.

    The sum of an element has one order, whatever the number of rows; bias and residual are added in
    float32, before the one rounding, of which there is none where `out` is float32.
    """
    check("x", x, x.dtype, (None, None))
    float_out = out.dtype == torch.float32
    check("out", out, torch.float32 if float_out else x.dtype, (x.shape[0], None))
    rows, in_features = x.shape
    out_features = out.shape[1]
    check_packed("weight", weight, x.dtype, (), out_features, in_features)
    if bias is not None:
        check("bias", bias, x.dtype, (out_features,))
    if residual is not None:
        check("residual", residual, x.dtype, (rows, out_features))
    kernels().linear(
        dtype_code("x", x),
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        address(residual),
        out.data_ptr(),
        rows,
        in_features,
        out_features,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        float_out,
    )

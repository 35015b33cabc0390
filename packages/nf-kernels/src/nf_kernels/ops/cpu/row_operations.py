"""Operations on rows: norms, gates, and looking rows up."""

import torch
from torch import Tensor

from nf_kernels.ops import packing
from nf_kernels.ops.cpu.arguments import (
    address,
    check,
    check_packed,
    dtype_code,
    kernels,
)


def rms_norm(
    *, x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None
) -> None:
    """As `reference.rms_norm`."""
    check("x", x, x.dtype, (None, None))
    rows, width = x.shape
    check("weight", weight, x.dtype, (width,))
    check("out", out, x.dtype, (rows, width))
    if residual is not None:
        check("residual", residual, x.dtype, (rows, width))
    kernels().rms_norm(
        dtype_code("x", x),
        x.data_ptr(),
        weight.data_ptr(),
        address(residual),
        out.data_ptr(),
        rows,
        width,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        eps,
    )


def embedding(*, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
    """As `reference.embedding`; the table may be packed, as one that is the head, too."""
    check("token_ids", token_ids, torch.int64, (None,))
    check("out", out, table.dtype, (token_ids.shape[0], None))
    packed = table.dim() > 2
    if packed:
        # How many rows the last block has is not known here; what fills it up is zero.
        rows = table.shape[0] * packing.BLOCK
        check_packed("table", table, out.dtype, (), rows, out.shape[1])
    else:
        check("table", table, out.dtype, (None, out.shape[1]))
        rows = table.shape[0]
    _gather(table, token_ids, out, source_rows=rows, packed=packed, is_embedding=True)


def gather_rows(*, x: Tensor, index: Tensor, out: Tensor) -> None:
    """As `reference.gather_rows`."""
    check("index", index, torch.int64, (None,))
    check("x", x, x.dtype, (None, None))
    check("out", out, x.dtype, (index.shape[0], x.shape[1]))
    _gather(x, index, out, source_rows=x.shape[0], packed=False, is_embedding=False)


def _gather(
    source: Tensor,
    index: Tensor,
    out: Tensor,
    *,
    source_rows: int,
    packed: bool,
    is_embedding: bool,
) -> None:
    kernels().gather_rows(
        dtype_code("out", out),
        source.data_ptr(),
        index.data_ptr(),
        out.data_ptr(),
        index.shape[0],
        out.shape[1],
        source_rows,
        source.stride(0),
        out.stride(0),
        packed,
        is_embedding,
    )


def swiglu(*, gate_up: Tensor, out: Tensor) -> None:
    """As `reference.swiglu`."""
    check("gate_up", gate_up, gate_up.dtype, (None, None))
    rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate_up has rows of {both}; expected an even number")
    width = both // 2
    check("out", out, gate_up.dtype, (rows, width))
    kernels().swiglu(
        dtype_code("gate_up", gate_up),
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        gate_up.stride(0),
        out.stride(0),
    )

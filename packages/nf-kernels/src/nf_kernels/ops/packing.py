"""Weights in the order in which the native matrix product reads them.

32 rows of a weight [N, K] make a block; the last one is filled up with zeros. Within a block the
elements lie by k, those of all 32 rows side by side; bfloat16 by pairs of k, which its dot-product
instruction takes, so that an odd K is filled up, too.
"""

import torch
from torch import Tensor

BLOCK = 32
_PIECE_BYTES = 1 << 20  # what is rearranged at a time


def packed_shape(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of a packed weight [N, K]: [blocks, K / 2, 32, 2] in bfloat16, else [blocks, K, 32]."""
    blocks = -(-out_features // BLOCK)
    if dtype == torch.bfloat16:
        return blocks, -(-in_features // 2), BLOCK, 2
    return blocks, in_features, BLOCK


def pack(weight: Tensor) -> Tensor:
    """Pack a weight [N, K], or the weights [E, N, K] of some experts.

    A contiguous weight that fills its blocks is rearranged where it is, with little memory beside
    it, and must not be used as it was any more; another one is copied.

    Args:
        weight: float32, bfloat16 or float16.

    Returns:
        As `packed_shape`, with E before it if the weight has it.

    Raises:
        ValueError: The weights of experts in bfloat16 have an odd K.
    """
    out_features, in_features = weight.shape[-2:]
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    if weight.dim() == 3 and in_features % pair:
        raise ValueError(
            f"weight is {list(weight.shape)} in bfloat16; experts need an even number of inputs, "
            f"use float32 or the reference operations"
        )
    pad = (0, -in_features % pair, 0, -out_features % BLOCK)
    if any(pad):
        weight = torch.nn.functional.pad(weight, pad)
    weight = weight.contiguous()
    rows = weight.view(-1, BLOCK, weight.shape[-1])
    step = max(1, _PIECE_BYTES // max(1, rows[:1].nbytes))
    for piece in rows.split(step):
        packed = piece.unflatten(-1, (-1, pair)).transpose(1, 2).contiguous()
        piece.view(-1).copy_(packed.view(-1))
    shape = packed_shape(out_features, in_features, weight.dtype)
    return weight.view(*weight.shape[:-2], *shape)


def unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo `pack`: a copy [N, K] of a packed weight."""
    if packed.dtype != torch.bfloat16:
        packed = packed.unsqueeze(-1)
    rows = packed.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return rows[..., :out_features, :in_features].contiguous()

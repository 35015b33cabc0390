"""One text for all the weights of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import torch
import xxhash

_PIECE_BYTES = 64 * 2**20
"""What is copied at once of a tensor whose bytes cannot be read in place."""


def weights_digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest names, types, shapes and all bytes of tensors; their order does not matter.

    It tells apart weights that differ by mistake or by training. It is no defence against somebody
    who looks for weights with a given digest: the hash is xxh3, which is as fast as memory.

    Args:
        named_tensors: such as `model.state_dict().items()`, or a generator that loads one at a
            time: a tensor is not kept. Any type and strides; one that is on another device, or not
            contiguous, is copied in pieces.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: two tensors have the same name, or the bytes of one are not here.
    """
    digests: dict[str, list[object]] = {}
    for name, tensor in named_tensors:
        if name in digests:
            raise ValueError(f"named_tensors has {name!r} twice; expected every name once.")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ValueError(
                f"Tensor {name!r} is {tensor.layout} on {tensor.device}; expected a strided one "
                "with its numbers in memory: load all weights first."
            )
        digest = xxhash.xxh3_128()
        for piece in _pieces(tensor.detach()):
            digest.update(_bytes(piece.cpu().contiguous()))
        digests[name] = [str(tensor.dtype), list(tensor.shape), digest.hexdigest()]
    return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in row-major order: whole if its bytes can be read in place, else cut."""
    in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
    if in_place or tensor.nbytes <= _PIECE_BYTES:
        yield tensor
    elif tensor[0].nbytes > _PIECE_BYTES:
        for row in tensor:
            yield from _pieces(row)
    else:
        yield from tensor.split(_PIECE_BYTES // tensor[0].nbytes)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor. `view` refuses some strides of dimensions of size 1."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data

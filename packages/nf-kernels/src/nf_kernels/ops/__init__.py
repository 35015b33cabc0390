"""The operation set, by implementation.

Every operation writes into the tensors the caller gives (`out=` and its kin), accepts views of row
ranges, and returns nothing. Shapes use T tokens (rows), D hidden size, H query heads, G key/value
heads, d head size, F feed-forward size, E experts, P pages of a request.
"""

import functools
import logging

import torch

from nf_kernels.native import native_module
from nf_kernels.ops import cpu, cuda, packing, reference
from nf_kernels.ops.operation_set import OPERATION_NAMES, AttentionBatch, OperationSet

_log = logging.getLogger(__name__)

REFERENCE = OperationSet(
    name="reference",
    functions={name: getattr(reference, name) for name in OPERATION_NAMES},
    invariant=frozenset(OPERATION_NAMES) - {"linear", "moe_experts", "prefill_attention"},
    pack=lambda weight: weight,
    scratch={},
)
"""Plain torch on any device: readable, and the oracle of the other implementations."""

# Those that read packed weights, and those that write where only a lane's order protects them.
_NATIVE_ONLY = {"embedding", "linear", "moe_experts", "sample", "feed_sampled", "keep_sampled"}

CPU = OperationSet(
    name="cpu",
    functions=cpu.OPERATIONS,
    invariant=frozenset(OPERATION_NAMES),
    pack=packing.pack,
    scratch={
        "moe_experts": cpu.moe_experts_scratch_bytes,
        "sample": cpu.sample_scratch_bytes,
    },
    others={
        name: {"reference": functools.partial(cpu.in_plain_torch, getattr(reference, name))}
        for name in OPERATION_NAMES
        if name not in _NATIVE_ONLY
    },
)
"""C++ on a CPU, where the extension is there."""

_cuda = cuda.CudaOperations()

CUDA = OperationSet(
    name="cuda",
    functions=_cuda.functions(),
    invariant=cuda.INVARIANT,
    pack=lambda weight: weight,
    scratch={},
    prepare=_cuda.prepare,
)
"""FlashInfer, cuBLAS and CUTLASS on a CUDA device, where FlashInfer is there."""


def load(device: torch.device | str, *, native: bool = True) -> OperationSet:
    """Give the fastest operation set that works on a device.

    Args:
        device: Where the tensors are.
        native: False keeps to plain torch, the slow twin of the others.
    """
    device = torch.device(device)
    if native and device.type == "cpu" and native_module() is not None:
        return CPU
    if native and device.type == "cuda":
        reason = cuda.missing(device)
        if not reason:
            return CUDA
        _say_once(reason)
    return REFERENCE


@functools.cache
def _say_once(reason: str) -> None:
    _log.info("CUDA operations run in plain torch: %s.", reason)


__all__ = ["CPU", "CUDA", "OPERATION_NAMES", "REFERENCE", "AttentionBatch", "OperationSet", "load"]

"""The operation set, by implementation.

Every operation writes into the tensors the caller gives (`out=` and its kin), accepts views of row
ranges, and returns nothing. Shapes use T tokens (rows), D hidden size, H query heads, G key/value
heads, d head size, F feed-forward size, E experts, P pages of a request.
"""

import torch

from nf_kernels.native import native_module
from nf_kernels.ops import cpu, packing, reference
from nf_kernels.ops.operation_set import OPERATION_NAMES, OperationSet

REFERENCE = OperationSet(
    name="reference",
    functions={name: getattr(reference, name) for name in OPERATION_NAMES},
    invariant=frozenset(OPERATION_NAMES) - {"linear", "moe_experts", "prefill_attention"},
    pack=lambda weight: weight,
    scratch={},
)
"""Plain torch on any device: readable, and the oracle of the other implementations."""

CPU = OperationSet(
    name="cpu",
    functions=cpu.OPERATIONS,
    invariant=frozenset(OPERATION_NAMES),
    pack=packing.pack,
    scratch={
        "moe_experts": cpu.moe_experts_scratch_bytes,
        "sample": cpu.sample_scratch_bytes,
    },
)
"""C++ on a CPU, where the extension is there."""


def load(device: torch.device | str, *, native: bool = True) -> OperationSet:
    """Give the fastest operation set that works on a device.

    Args:
        device: Where the tensors are.
        native: False keeps to plain torch, the slow twin of the native kernels.
    """
    if not native or torch.device(device).type != "cpu" or native_module() is None:
        return REFERENCE
    return CPU


__all__ = ["CPU", "OPERATION_NAMES", "REFERENCE", "OperationSet", "load"]

"""The operation set, by implementation.

Every operation writes into the tensors the caller gives (`out` and its kin), accepts views of row
ranges, and returns nothing. Shapes use T tokens (rows), D hidden size, H query heads, G key/value
heads, d head size, F feed-forward size, E experts, P pages of a request.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from nf_kernels.cost import CATEGORIES
from nf_kernels.native import native_module
from nf_kernels.ops import cpu, reference

OperationSet = Mapping[str, Callable[..., None]]
"""One implementation of every operation of `nf_kernels.cost.CATEGORIES`, by name."""

REFERENCE: OperationSet = MappingProxyType({name: getattr(reference, name) for name in CATEGORIES})
"""Plain torch on any device: readable, and the oracle of the other implementations."""


def load(device: torch.device | str, *, native: bool = True) -> OperationSet:
    """Give the fastest operation set that works on a device.

    Args:
        device: Where the tensors are.
        native: False keeps to plain torch, the slow twin of the native kernels.
    """
    if not native or torch.device(device).type != "cpu" or native_module() is None:
        return REFERENCE
    return MappingProxyType({**REFERENCE, **cpu.OPERATIONS})


__all__ = ["REFERENCE", "OperationSet", "load"]

"""Checks of an operation's arguments: dtype, shape, device and layout, before any is touched."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

Shape = tuple[int | None, ...]
"""Sizes by dimension; None is any."""


def _fits(have: Shape, wanted: Shape) -> bool:
    if have == wanted:
        return True
    if len(have) != len(wanted):
        return False
    for size, want in zip(have, wanted, strict=True):  # a generator would take twice as long
        if want is not None and want != size:
            return False
    return True


class Checks:
    """Checks for tensors on one type of device.

    Every method raises a ValueError that names the argument, what it is and what was expected.
    """

    def __init__(self, device_type: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """Say what is expected.

        Args:
            device_type: As `torch.device.type`.
            dtypes: Those that activations and weights may have.
        """
        self._device_type = device_type
        self._is_there = attrgetter(f"is_{device_type}")
        self._dtypes = dtypes

    def tensor(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: Shape) -> None:
        """Rows whose elements are next to each other; the rows may be apart."""
        if not (tensor.dtype == dtype and _fits(tensor.shape, shape) and self._is_there(tensor)):
            expected = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"expected {dtype} {expected} on {self._device_type}"
            )
        if shape and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension; expected 1, "
                f"make it contiguous"
            )

    def first(self, name: str, tensor: Tensor, shape: Shape) -> None:
        """As `tensor`, for the one whose dtype the others follow."""
        if tensor.dtype not in self._dtypes:
            expected = [str(dtype) for dtype in self._dtypes]
            raise ValueError(
                f"{name} is {tensor.dtype}; expected {', '.join(expected[:-1])} or {expected[-1]}"
            )
        self.tensor(name, tensor, tensor.dtype, shape)

    def contiguous(self, name: str, tensor: Tensor) -> None:
        """No gaps between rows either."""
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous; pass a contiguous tensor")

    def caches(self, k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype) -> None:
        """K and V, [pages, KV heads, page size, head_dim] each, of the queries' dtype."""
        self.tensor("k_cache", k_cache, dtype, (None, None, None, None))
        self.tensor("v_cache", v_cache, dtype, tuple(k_cache.shape))
        self.contiguous("k_cache", k_cache)
        self.contiguous("v_cache", v_cache)
        if 0 in k_cache.shape[1:]:
            raise ValueError(
                f"k_cache is {list(k_cache.shape)}; "
                f"expected [pages, KV heads, page size, head_dim], the last three at least 1"
            )

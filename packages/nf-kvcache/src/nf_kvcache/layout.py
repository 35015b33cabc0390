"""The shape of a page."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What the KV of a model looks like, and how much of it makes a page.

    Attributes:
        num_layers: attention layers.
        num_kv_heads: heads of K, and of V, on this device.
        head_dim: numbers per head.
        dtype: a floating-point type.
        page_size: token slots in a page.

    Raises:
        ValueError: for a size below 1, or a type that is not floating-point.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int = 16

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not self.dtype.is_floating_point:
            raise ValueError(
                f"dtype is {self.dtype}; expected a floating-point type such as torch.bfloat16."
            )

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """Shape of K, and of V, of one page in one layer: heads, token slots, head_dim."""
        return (self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a page: K and V of all layers."""
        numbers = self.num_kv_heads * self.page_size * self.head_dim
        return 2 * self.num_layers * numbers * self.dtype.itemsize

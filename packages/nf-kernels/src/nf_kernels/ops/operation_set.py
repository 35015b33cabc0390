"""One implementation of every operation."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

OPERATION_NAMES = (
    "embedding",
    "gather_rows",
    "rms_norm",
    "linear",
    "rope_append",
    "prefill_attention",
    "decode_attention",
    "merge_attention",
    "swiglu",
    "moe_route",
    "moe_experts",
    "sample",
)


class OperationSet(Mapping[str, Callable[..., None]]):
    """One implementation of every operation, by name.

    Attributes:
        name: Of the implementation.
        invariant: Operations whose row i depends on row i of their arguments alone, bitwise,
            whatever else is in the batch.
    """

    def __init__(
        self,
        *,
        name: str,
        functions: Mapping[str, Callable[..., None]],
        invariant: frozenset[str],
        pack: Callable[[Tensor], Tensor],
        scratch: Mapping[str, Callable[..., int]],
    ) -> None:
        """Collect an implementation.

        Args:
            name: See above.
            functions: Every operation of `OPERATION_NAMES`.
            invariant: See above.
            pack: Arranges a weight [N, K] or [E, N, K] as this implementation reads it.
            scratch: For the operations that need it, bytes of scratch by their shapes.
        """
        self.name = name
        self.invariant = invariant
        self._functions = {name: functions[name] for name in OPERATION_NAMES}
        self._pack = pack
        self._scratch = scratch

    def __getitem__(self, name: str) -> Callable[..., None]:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def pack(self, weight: Tensor) -> Tensor:
        """Arrange a weight [N, K] of `linear`, or [E, N, K] of `moe_experts`, for this set.

        The weight may be rearranged where it is: use only what is returned. What one set has
        packed, another cannot read.
        """
        return self._pack(weight)

    def scratch_bytes(self, name: str, **shape: object) -> int:
        """Bytes of scratch that an operation needs; 0 for one that takes none."""
        return self._scratch[name](**shape) if name in self._scratch else 0

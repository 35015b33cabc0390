"""One implementation of every operation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
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
    "feed_sampled",
    "keep_sampled",
)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Index arrays of attention that is computed in several layers, for `OperationSet.prepare`.

    Attributes:
        page_table: int32 [R, P], the very tensor that the operation will be given, or a view of the
            same memory.
        seq_lens: int32 [R], likewise.
        query_start: int32 [R + 1], likewise; None for `decode_attention`.
        host_page_table: The same numbers as `page_table` in host memory, or None.
        host_seq_lens: Likewise. Without it the host waits for the device to read `seq_lens`.
        host_query_start: Likewise.
        device_graph: Stands for the device graph that holds the operation, or is about to; None for
            one that is called. A graph is launched again with other numbers in the same arrays:
            what is planned for it lies where the graph reads it, is planned anew whenever it is
            announced, and lives as long as this object.
    """

    page_table: Tensor
    seq_lens: Tensor
    query_start: Tensor | None = None
    host_page_table: Tensor | None = None
    host_seq_lens: Tensor | None = None
    host_query_start: Tensor | None = None
    device_graph: object | None = None

    def on_host(self) -> tuple[Tensor, Tensor]:
        """`seq_lens` and `query_start` in host memory; one query of each request by default."""
        seq_lens = self.seq_lens.cpu() if self.host_seq_lens is None else self.host_seq_lens
        if self.host_query_start is not None:
            return seq_lens, self.host_query_start
        if self.query_start is not None:
            return seq_lens, self.query_start.cpu()
        return seq_lens, torch.arange(len(seq_lens) + 1, dtype=torch.int32)


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
        prepare: Callable[[Sequence[AttentionBatch]], None] | None = None,
        others: Mapping[str, Mapping[str, Callable[..., None]]] = MappingProxyType({}),
    ) -> None:
        """Collect an implementation.

        Args:
            name: See above.
            functions: Every operation of `OPERATION_NAMES`.
            invariant: See above.
            pack: Arranges a weight [N, K] or [E, N, K] as this implementation reads it.
            scratch: For the operations that need it, bytes of scratch by their shapes.
            prepare: See the method; None where nothing is to be prepared.
            others: By operation, other implementations that take the same arguments, by name.
        """
        self.name = name
        self.invariant = invariant
        self._functions = {name: functions[name] for name in OPERATION_NAMES}
        self._pack = pack
        self._scratch = scratch
        self._prepare = prepare
        self._others = others

    def __getitem__(self, name: str) -> Callable[..., None]:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def implementations(self, name: str) -> Mapping[str, Callable[..., None]]:
        """All implementations of an operation that take this set's arguments, by name."""
        return {self.name: self._functions[name], **self._others.get(name, {})}

    def pack(self, weight: Tensor) -> Tensor:
        """Arrange a weight [N, K] of `linear`, or [E, N, K] of `moe_experts`, for this set.

        The weight may be rearranged where it is: use only what is returned. What one set has
        packed, another cannot read.
        """
        return self._pack(weight)

    def scratch_bytes(self, name: str, **shape: object) -> int:
        """Bytes of scratch that an operation needs; 0 for one that takes none."""
        return self._scratch[name](**shape) if name in self._scratch else 0

    def prepare(self, batches: Sequence[AttentionBatch]) -> None:
        """Announce all index arrays of an iteration, in place of those of the one before.

        Some implementations plan attention on the host; for announced arrays they do so once, not
        in every layer. The arrays must keep their numbers until the next call. It is never needed
        for a right result.
        """
        if self._prepare is not None:
            self._prepare(batches)

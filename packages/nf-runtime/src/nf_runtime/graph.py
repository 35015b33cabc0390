"""The model as data: operations, the edges between them, and what each reads. Torch-free.

The forward pass is a walk over a `LayerGraph`; there is no other model code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from nf_kernels.cost import CATEGORIES, Category


class Rows(StrEnum):
    """The token range of the batch that an operation works on."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"
    SELECTED = "selected"  # rows whose logits are wanted

    @property
    def parts(self) -> tuple["Rows", ...]:
        """The ranges without a row in common that it consists of."""
        return (self,) if self in (Rows.DECODE, Rows.PREFILL) else (Rows.DECODE, Rows.PREFILL)


class ElementType(StrEnum):
    """Element type of an edge; `model` is the dtype the model runs in."""

    MODEL = "model"
    INT64 = "int64"
    FLOAT32 = "float32"


class BatchInput(StrEnum):
    """What an operation can read of the iteration's batch and of the KV cache."""

    TOKEN_IDS = "token_ids"
    POSITIONS = "positions"
    SLOTS = "slots"
    COS_SIN = "cos_sin"
    K_CACHE = "k_cache"
    V_CACHE = "v_cache"
    DECODE_PAGE_TABLE = "decode_page_table"
    DECODE_SEQ_LENS = "decode_seq_lens"
    PREFILL_PAGE_TABLE = "prefill_page_table"
    PREFILL_QUERY_START = "prefill_query_start"
    PREFILL_SEQ_LENS = "prefill_seq_lens"
    SELECTED_ROWS = "selected_rows"


@dataclass(frozen=True, slots=True)
class Edge:
    """An activation: one row of `width` elements per token.

    Attributes:
        name: Unique in its graph.
        width: Elements of a row.
        element: Their type.
        contiguous: Whether rows must follow each other without gaps.
    """

    name: str
    width: int
    element: ElementType = ElementType.MODEL
    contiguous: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a layer.

    The mappings go from a parameter of the operation to what is passed for it.

    Attributes:
        name: Unique within its layer.
        kind: Name of the operation in `nf_kernels.ops`, or of a collective that
            `nf_runtime.network_operations` does.
        reads: Edges it reads.
        writes: Edges it writes; an edge may be in both.
        weights: Weights of the layer (or of the model, outside the layers).
        inputs: Parts of the batch.
        updates: Those of `inputs` that it writes to.
        constants: Plain numbers.
        rows: The token range it works on.
        reads_all_rows: Edges of `reads` that are passed whole, whatever `rows` is.
    """

    name: str
    kind: str
    reads: Mapping[str, str] = field(default_factory=dict)
    writes: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, BatchInput] = field(default_factory=dict)
    updates: frozenset[BatchInput] = frozenset()
    constants: Mapping[str, float | int | bool] = field(default_factory=dict)
    rows: Rows = Rows.ALL
    reads_all_rows: frozenset[str] = frozenset()

    @property
    def category(self) -> Category:
        """The resource this operation saturates."""
        return CATEGORIES[self.kind]


@dataclass(frozen=True)
class LayerGraph:
    """A model: what runs before the layers, in each layer, and after them.

    Attributes:
        edges: Every edge by name.
        prologue: Operations before the first layer.
        layers: Operations of each layer, in an order that respects their dependencies.
        epilogue: Operations after the last layer.

    Raises:
        ValueError: An operation is unknown, or reads an edge that nothing wrote before it.
    """

    edges: Mapping[str, Edge]
    prologue: tuple[Operation, ...]
    layers: tuple[tuple[Operation, ...], ...]
    epilogue: tuple[Operation, ...]

    @property
    def parts(self) -> tuple[tuple[Operation, ...], ...]:
        """All operations: before the layers, of each layer, after them."""
        return (self.prologue, *self.layers, self.epilogue)

    @cached_property
    def layer_kinds(self) -> tuple[int, ...]:
        """For each layer a number, the same for layers that differ in weights and constants alone.

        They have the same operations on the same edges.
        """
        known: list[Sequence[Operation]] = []
        kinds = []
        for layer in self.layers:
            alike = (kind for kind, other in enumerate(known) if _are_alike(layer, other))
            kind = next(alike, len(known))
            if kind == len(known):
                known.append(layer)
            kinds.append(kind)
        return tuple(kinds)

    @property
    def selected_edges(self) -> frozenset[str]:
        """Edges that have rows only where logits are wanted."""
        return frozenset(
            edge
            for operation in self.epilogue
            if operation.rows is Rows.SELECTED
            for edge in operation.writes.values()
        )

    def __post_init__(self) -> None:
        written: set[str] = set()
        for part in (self.prologue, *self.layers, self.epilogue):
            for operation in part:
                if operation.kind not in CATEGORIES:
                    raise ValueError(
                        f"operation {operation.name!r} is of kind {operation.kind!r}; "
                        f"expected one of {sorted(CATEGORIES)}"
                    )
                for edge in operation.reads.values():
                    if edge not in written:
                        raise ValueError(
                            f"operation {operation.name!r} reads edge {edge!r}, "
                            f"which no operation before it writes"
                        )
                for edge in operation.writes.values():
                    if edge not in self.edges:
                        raise ValueError(
                            f"operation {operation.name!r} writes edge {edge!r}, "
                            f"which is not among the edges {sorted(self.edges)}"
                        )
                    written.add(edge)


def _are_alike(layer: Sequence[Operation], other: Sequence[Operation]) -> bool:
    return len(layer) == len(other) and all(
        mine.name == its.name
        and mine.kind == its.kind
        and mine.rows is its.rows
        and mine.reads == its.reads
        and mine.writes == its.writes
        and mine.inputs == its.inputs
        and mine.updates == its.updates
        and mine.reads_all_rows == its.reads_all_rows
        for mine, its in zip(layer, other, strict=True)
    )

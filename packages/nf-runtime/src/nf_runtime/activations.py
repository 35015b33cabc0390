"""The memory of a graph's edges."""

import torch
from torch import Tensor

from nf_runtime.graph import ElementType, LayerGraph
from nf_runtime.pipeline.workspace import Buffer, Layout, Workspace

_ELEMENTS = {ElementType.INT64: torch.int64, ElementType.FLOAT32: torch.float32}


class Activations:
    """The workspace of a model on its device.

    It is one memory, which an iteration uses by one layout. Nothing in it outlives an iteration.

    Args:
        graph: The model.
        workspace: Where its edges are.
        dtype: Of the model.
        device: Where the memory is.
        max_tokens: Of one iteration.
        max_selected: Rows of one iteration whose logits are wanted; `reserve_selected` makes more.
    """

    def __init__(
        self,
        graph: LayerGraph,
        workspace: Workspace,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        max_selected: int,
    ) -> None:
        self._workspace = workspace
        self._device = device
        self._dtypes = {
            edge.name: _ELEMENTS.get(edge.element, dtype) for edge in graph.edges.values()
        }
        self._num_selected = max_selected
        self._buffers = [
            self._allocate(buffer, max_selected if buffer.selected else max_tokens)
            for buffer in workspace.buffers
        ]
        self._edges = self._views()

    @property
    def num_selected(self) -> int:
        """Rows whose logits can be wanted."""
        return self._num_selected

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The memory, as it is now; `reserve_selected` puts other buffers in the place of some."""
        return tuple(self._buffers)

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def edge(self, name: str, layout: Layout) -> Tensor:
        """All rows of an edge."""
        return self._edges[layout][name]

    def rows(self, name: str, first: int, end: int, layout: Layout) -> Tensor:
        """Some rows of an edge."""
        return self._edges[layout][name][first:end]

    def reserve_selected(self, count: int) -> bool:
        """Have room for so many rows whose logits are wanted; whether edges have moved for that.

        Log-probabilities of prompts want a row for every token, which few iterations do.
        """
        if count <= self._num_selected:
            return False
        count = self._num_selected = 1 << (count - 1).bit_length()
        for number, buffer in enumerate(self._workspace.buffers):
            if buffer.selected:
                self._buffers[number] = self._allocate(buffer, count)
        self._edges = self._views()
        return True

    def _allocate(self, buffer: Buffer, rows: int) -> Tensor:
        return torch.empty(rows, buffer.row_bytes, dtype=torch.uint8, device=self._device)

    def _views(self) -> dict[Layout, dict[str, Tensor]]:
        """All rows of all edges, by layout."""
        by_token, by_edge = {}, {}
        for name, place in self._workspace.places.items():
            buffer, dtype = self._buffers[place.buffer], self._dtypes[name]
            first, end = place.offset, place.offset + place.num_bytes
            by_token[name] = buffer[:, first:end].view(dtype)
            rows = len(buffer)
            columns = buffer.view(-1)[first * rows : end * rows]
            by_edge[name] = columns.view(rows, place.num_bytes).view(dtype)
        return {Layout.BY_TOKEN: by_token, Layout.BY_EDGE: by_edge}

"""Turning a batch into the arrays that operations read."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from nf_kernels.ops import AttentionBatch
from nf_runtime.graph import BatchInput, Rows
from nf_runtime.pipeline.division import Division
from nf_runtime.pipeline.workspace import Layout
from nf_runtime.staging import Arrays, StagingBuffer
from nf_scheduler import Batch


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """A batch in a staging buffer.

    Attributes:
        division: How it is cut.
        layout: How the rows of edges lie in the workspace.
        num_selected: Rows whose logits are wanted.
        has_unknown_tokens: Whether some are only on the device.
        buffer: Where the arrays are.
    """

    division: Division
    layout: Layout
    num_selected: int
    has_unknown_tokens: bool
    buffer: Arrays
    _rebased: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """All rows."""
        return self.division.bounds[-1]

    def row_range(self, rows: Rows, first: int, end: int) -> tuple[int, int]:
        """First row and end of a token range in the nano-batches from `first` to before `end`."""
        if rows is Rows.SELECTED:
            return 0, self.num_selected
        return self.division.rows(rows, first, end)

    def arrays(self) -> list[Tensor]:
        """The arrays on the device in the order of `INPUTS`, after the buffer's `upload`."""
        return [self.buffer.on_device(source.name) for source in INPUTS]

    def input(self, source: BatchInput, rows: tuple[int, int], requests: tuple[int, int]) -> Tensor:
        """The part of an array that is of some rows or requests.

        Args:
            source: Which array.
            rows: First row and end.
            requests: First request of attention, or segment, and end.
        """
        whole = self.buffer.on_device(source.name)
        if source in (BatchInput.TOKEN_IDS, BatchInput.POSITIONS, BatchInput.SLOTS):
            return whole[rows[0] : rows[1]]
        if source is BatchInput.SELECTED_ROWS:
            return whole
        if source is BatchInput.PREFILL_QUERY_START:
            if requests[0] == 0:
                return whole[: requests[1] + 1]
            if requests not in self._rebased:
                part = whole[requests[0] : requests[1] + 1]
                self._rebased[requests] = part - part[0]
            return self._rebased[requests]
        return whole[requests[0] : requests[1]]

    def attention(
        self, groups: Iterable[tuple[Rows, int, int]], *, device_graph: object | None = None
    ) -> list[AttentionBatch]:
        """Index arrays of attention, on the device and on the host.

        Args:
            groups: Token range, first nano-batch and the one behind the last of each operation.
            device_graph: As `AttentionBatch.device_graph`.
        """
        batches = []
        for rows, first, end in dict.fromkeys(groups):
            own, requests = (
                self.row_range(rows, first, end),
                self.division.requests(rows, first, end),
            )
            if own[0] == own[1]:
                continue
            kind = "DECODE" if rows is Rows.DECODE else "PREFILL"
            table, lens = BatchInput[f"{kind}_PAGE_TABLE"], BatchInput[f"{kind}_SEQ_LENS"]
            part = slice(*requests)
            batch = AttentionBatch(
                self.input(table, own, requests),
                self.input(lens, own, requests),
                host_page_table=self.buffer.host(table.name)[part],
                host_seq_lens=self.buffer.host(lens.name)[part],
                device_graph=device_graph,
            )
            if rows is Rows.PREFILL:
                start = BatchInput.PREFILL_QUERY_START
                host = self.buffer.host(start.name)[requests[0] : requests[1] + 1]
                batch = replace(
                    batch,
                    query_start=self.input(start, own, requests),
                    host_query_start=host - host[0],
                )
            batches.append(batch)
        return batches


INPUTS = (
    BatchInput.TOKEN_IDS,
    BatchInput.POSITIONS,
    BatchInput.SLOTS,
    BatchInput.DECODE_PAGE_TABLE,
    BatchInput.DECODE_SEQ_LENS,
    BatchInput.PREFILL_PAGE_TABLE,
    BatchInput.PREFILL_QUERY_START,
    BatchInput.PREFILL_SEQ_LENS,
    BatchInput.SELECTED_ROWS,
)
"""What is staged for operations."""


def stage(
    batch: Batch,
    division: Division,
    layout: Layout,
    page_tables: np.ndarray,
    page_size: int,
    prompt_rows: np.ndarray,
    more: dict[str, np.ndarray],
    buffer: StagingBuffer,
) -> StagedBatch:
    """Write the arrays of one iteration to a buffer.

    Args:
        batch: n requests with T tokens, decodes first.
        division: How it is cut.
        layout: How the rows of edges will lie in the workspace.
        page_tables: int32 [n, P].
        page_size: Token slots of a page.
        prompt_rows: int64, rows whose logits are wanted besides the sampled ones.
        more: Other arrays that are to go along, by names of their own.
        buffer: To fill.
    """
    lengths = np.diff(batch.query_start)
    request_of_row = np.repeat(np.arange(len(batch)), lengths)
    first_rows = batch.query_start[:-1]
    positions = np.arange(batch.num_tokens) + (batch.context_lens - first_rows)[request_of_row]
    pages = page_tables[request_of_row, positions // page_size].astype(np.int64)
    seq_lens = batch.context_lens + lengths
    sampled_rows = batch.query_start[1:][batch.samples].astype(np.int64) - 1
    selected = np.concatenate((sampled_rows, prompt_rows))
    split = batch.num_decodes
    # A request that is cut is in several segments; all but the last see a part of its tokens.
    prefills = split + division.segment_request
    segment_end = division.segment_start[1:] + split
    segment_lens = batch.context_lens[prefills] + segment_end - first_rows[prefills]
    arrays = {
        BatchInput.TOKEN_IDS: batch.token_ids.astype(np.int64),
        BatchInput.POSITIONS: positions,
        BatchInput.SLOTS: pages * page_size + positions % page_size,
        BatchInput.DECODE_PAGE_TABLE: page_tables[:split],
        BatchInput.DECODE_SEQ_LENS: seq_lens[:split],
        BatchInput.PREFILL_PAGE_TABLE: page_tables[prefills],
        BatchInput.PREFILL_QUERY_START: division.segment_start.astype(np.int32),
        BatchInput.PREFILL_SEQ_LENS: segment_lens.astype(np.int32),
        BatchInput.SELECTED_ROWS: selected,
    }
    named = {name.name: array for name, array in arrays.items()}
    has_unknown_tokens = bool((batch.token_ids < 0).any())
    if has_unknown_tokens:
        named["slot_of_row"] = batch.slots[request_of_row].astype(np.int64)
    buffer.fill(named | more)
    return StagedBatch(
        division=division,
        layout=layout,
        num_selected=len(selected),
        has_unknown_tokens=has_unknown_tokens,
        buffer=buffer,
    )

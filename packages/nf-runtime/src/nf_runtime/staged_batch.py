"""Turning a batch into the arrays that operations read."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nf_kernels.ops import AttentionBatch
from nf_runtime.graph import BatchInput, Rows
from nf_runtime.staging import StagingBuffer
from nf_scheduler import Batch


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """A batch in a staging buffer.

    Attributes:
        num_requests: Of the batch.
        num_decodes: Rows of decodes, which come first.
        num_tokens: All rows.
        num_selected: Rows whose logits are wanted.
        has_unknown_tokens: Whether some are only on the device.
        buffer: Where the arrays are.
    """

    num_requests: int
    num_decodes: int
    num_tokens: int
    num_selected: int
    has_unknown_tokens: bool
    buffer: StagingBuffer

    def row_range(self, rows: Rows) -> tuple[int, int]:
        """First row and end of a token range."""
        if rows is Rows.DECODE:
            return 0, self.num_decodes
        if rows is Rows.PREFILL:
            return self.num_decodes, self.num_tokens
        return 0, self.num_selected if rows is Rows.SELECTED else self.num_tokens

    def num_rows(self, rows: Rows) -> int:
        """Length of a token range."""
        start, end = self.row_range(rows)
        return end - start

    def inputs(self) -> dict[BatchInput, Tensor]:
        """The arrays on the device by what operations call them, after the buffer's `upload`."""
        return {name: self.buffer.on_device(name.name) for name in _ARRAYS}

    def attention(self, inputs: dict[BatchInput, Tensor]) -> list[AttentionBatch]:
        """Index arrays of the decodes and of the prefills, where there are any, and on the host."""
        host = self.buffer.host
        batches = []
        if self.num_decodes:
            batches.append(
                AttentionBatch(
                    inputs[BatchInput.DECODE_PAGE_TABLE],
                    inputs[BatchInput.DECODE_SEQ_LENS],
                    host_page_table=host(BatchInput.DECODE_PAGE_TABLE.name),
                    host_seq_lens=host(BatchInput.DECODE_SEQ_LENS.name),
                )
            )
        if self.num_decodes < self.num_requests:
            batches.append(
                AttentionBatch(
                    inputs[BatchInput.PREFILL_PAGE_TABLE],
                    inputs[BatchInput.PREFILL_SEQ_LENS],
                    inputs[BatchInput.PREFILL_QUERY_START],
                    host_page_table=host(BatchInput.PREFILL_PAGE_TABLE.name),
                    host_seq_lens=host(BatchInput.PREFILL_SEQ_LENS.name),
                    host_query_start=host(BatchInput.PREFILL_QUERY_START.name),
                )
            )
        return batches


_ARRAYS = (
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


def stage(
    batch: Batch,
    page_tables: np.ndarray,
    page_size: int,
    prompt_rows: np.ndarray,
    more: dict[str, np.ndarray],
    buffer: StagingBuffer,
) -> StagedBatch:
    """Write the arrays of one iteration to a buffer.

    Args:
        batch: n requests with T tokens, decodes first.
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
    arrays = {
        BatchInput.TOKEN_IDS: batch.token_ids.astype(np.int64),
        BatchInput.POSITIONS: positions,
        BatchInput.SLOTS: pages * page_size + positions % page_size,
        BatchInput.DECODE_PAGE_TABLE: page_tables[:split],
        BatchInput.DECODE_SEQ_LENS: seq_lens[:split],
        BatchInput.PREFILL_PAGE_TABLE: page_tables[split:],
        BatchInput.PREFILL_QUERY_START: batch.query_start[split:] - split,
        BatchInput.PREFILL_SEQ_LENS: seq_lens[split:],
        BatchInput.SELECTED_ROWS: selected,
    }
    named = {name.name: array for name, array in arrays.items()}
    has_unknown_tokens = bool((batch.token_ids < 0).any())
    if has_unknown_tokens:
        named["slot_of_row"] = batch.slots[request_of_row].astype(np.int64)
    buffer.fill(named | more)
    return StagedBatch(
        num_requests=len(batch),
        num_decodes=split,
        num_tokens=batch.num_tokens,
        num_selected=len(selected),
        has_unknown_tokens=has_unknown_tokens,
        buffer=buffer,
    )

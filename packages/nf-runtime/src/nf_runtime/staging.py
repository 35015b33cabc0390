"""Turning a batch into the arrays that operations read."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nf_kernels.ops import AttentionBatch
from nf_runtime.graph import BatchInput, Rows
from nf_scheduler import Batch


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """A batch on the device.

    Attributes:
        num_decodes: Rows of decodes, which come first.
        num_tokens: All rows.
        num_selected: Rows whose logits are wanted.
        inputs: Arrays by what operations call them.
        attention: Those of the decodes and of the prefills, where there are any, with their copies
            in host memory.
    """

    num_decodes: int
    num_tokens: int
    num_selected: int
    inputs: dict[BatchInput, Tensor]
    attention: list[AttentionBatch]

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


def stage(
    batch: Batch,
    page_tables: np.ndarray,
    page_size: int,
    prompt_rows: np.ndarray,
    last_sampled: Tensor,
    *,
    device: torch.device,
) -> StagedBatch:
    """Make the arrays of one iteration.

    Args:
        batch: n requests with T tokens, decodes first.
        page_tables: int32 [n, P].
        page_size: Token slots of a page.
        prompt_rows: int64, rows whose logits are wanted besides the sampled ones.
        last_sampled: int64 [slots] on the device, the token that each slot sampled last.
        device: Where the arrays go.
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

    def on_host(array: np.ndarray, dtype: type[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))

    def put(array: np.ndarray, dtype: type[np.generic]) -> Tensor:
        return on_host(array, dtype).to(device)

    token_ids = put(batch.token_ids, np.int64)
    if (batch.token_ids < 0).any():
        slots = put(batch.slots[request_of_row], np.int64)
        token_ids = torch.where(token_ids < 0, last_sampled[slots], token_ids)
    inputs = {
        BatchInput.TOKEN_IDS: token_ids,
        BatchInput.POSITIONS: put(positions, np.int64),
        BatchInput.SLOTS: put(pages * page_size + positions % page_size, np.int64),
        BatchInput.DECODE_PAGE_TABLE: put(page_tables[:split], np.int32),
        BatchInput.DECODE_SEQ_LENS: put(seq_lens[:split], np.int32),
        BatchInput.PREFILL_PAGE_TABLE: put(page_tables[split:], np.int32),
        BatchInput.PREFILL_QUERY_START: put(batch.query_start[split:] - split, np.int32),
        BatchInput.PREFILL_SEQ_LENS: put(seq_lens[split:], np.int32),
        BatchInput.SELECTED_ROWS: put(selected, np.int64),
    }
    tables, totals = on_host(page_tables, np.int32), on_host(seq_lens, np.int32)
    attention = []
    if split:
        attention.append(
            AttentionBatch(
                inputs[BatchInput.DECODE_PAGE_TABLE],
                inputs[BatchInput.DECODE_SEQ_LENS],
                host_page_table=tables[:split],
                host_seq_lens=totals[:split],
            )
        )
    if split < len(batch):
        attention.append(
            AttentionBatch(
                inputs[BatchInput.PREFILL_PAGE_TABLE],
                inputs[BatchInput.PREFILL_SEQ_LENS],
                inputs[BatchInput.PREFILL_QUERY_START],
                host_page_table=tables[split:],
                host_seq_lens=totals[split:],
                host_query_start=on_host(batch.query_start[split:] - split, np.int32),
            )
        )
    return StagedBatch(
        num_decodes=split,
        num_tokens=batch.num_tokens,
        num_selected=len(selected),
        inputs=inputs,
        attention=attention,
    )

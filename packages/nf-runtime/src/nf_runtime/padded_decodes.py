"""Batches of decodes alone, filled up to a few sizes, so that a device graph of each will do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nf_runtime.config import EngineConfig
from nf_scheduler import Batch

# A third of the rows is padding at most. Beyond, an iteration takes the device much longer than
# the host needs to launch it.
_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def graph_sizes(config: EngineConfig, kind: str) -> tuple[int, ...]:
    """Decodes of the batches that have a device graph, ascending; none where there are no graphs.

    Args:
        config: Of the engine, on its device.
        kind: Of device: `cpu` or `cuda`.
    """
    if kind != "cuda" or not config.cuda_graphs or config.tensor_parallel_size > 1:
        return ()
    most = min(config.max_num_seqs, config.batch_tokens, _SIZES[-1])
    return (*(size for size in _SIZES if size < most), most)


def no_decodes() -> Batch:
    """A batch that is all padding once it is padded."""
    return Batch(
        iteration=-1,
        request_ids=[],
        slots=np.zeros(0, dtype=np.int32),
        num_decodes=0,
        query_start=np.zeros(1, dtype=np.int32),
        context_lens=np.zeros(0, dtype=np.int32),
        token_ids=np.zeros(0, dtype=np.int32),
        samples=np.zeros(0, dtype=bool),
    )


def pad_decodes(
    batch: Batch, page_tables: np.ndarray, *, size: int, page: int
) -> tuple[Batch, np.ndarray]:
    """Add decodes of nobody: token 0 at position 0, whose K and V go to a page of nobody.

    Args:
        batch: Decodes alone, each of which samples.
        page_tables: int32 [n, P], P at least 1.
        size: Decodes of the result.
        page: That is read and written by the added ones.
    """
    more = size - len(batch)
    tables = np.full((size, page_tables.shape[1]), page, dtype=np.int32)
    tables[: len(batch)] = page_tables
    zeros = np.zeros(more, dtype=np.int32)
    padded = replace(
        batch,
        request_ids=[*batch.request_ids, *[""] * more],
        slots=np.concatenate((batch.slots, zeros)),
        num_decodes=size,
        query_start=np.arange(size + 1, dtype=np.int32),
        context_lens=np.concatenate((batch.context_lens, zeros)),
        token_ids=np.concatenate((batch.token_ids, zeros)),
        samples=np.ones(size, dtype=bool),
    )
    return padded, tables

"""Short numbers that tell one decision from another."""

import zlib

import numpy as np

from nf_scheduler import Batch, Progress


def batch_digest(batch: Batch, *, with_tokens: bool) -> int:
    """32 bits of which rows of which requests an iteration computes.

    Args:
        batch: What the scheduler chose.
        with_tokens: Whether the tokens are the real ones, and count; else only which are known.
    """
    tokens = batch.token_ids if with_tokens else batch.token_ids < 0
    digest = zlib.crc32("\n".join(batch.request_ids).encode())
    for array in (batch.slots, batch.query_start, batch.context_lens, batch.samples, tokens):
        digest = zlib.crc32(np.ascontiguousarray(array).data, digest)
    return digest


def pages_digest(page_tables: np.ndarray) -> int:
    """32 bits of the pages of an iteration."""
    return zlib.crc32(np.ascontiguousarray(page_tables).data)


def progress_digest(progress: Progress) -> int:
    """32 bits of who gained a token and who ended, and why."""
    ends = [f"{name}\t{end.reason.value}" for name, end in progress.ends.items()]
    return zlib.crc32("\n".join([*progress.request_ids, "", *ends]).encode())

"""What an earlier process left on the disk."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk.format import MAX_SALT_BYTES, ROOT, child_identity, root_identity
from nf_kvcache.disk.page_index import PageIndex, PageRow
from nf_kvcache.disk.segments import Segments
from nf_kvcache.disk.slot_tree import FREE, NONE, SlotTree

logger = logging.getLogger("nf_kvcache.disk")


class StoredPage(NamedTuple):
    """A page on the disk.

    Attributes:
        slot: where.
        parent_slot: of the page before it; -1: it is the first.
        salt: of the first page of its prefix.
        tokens: int32 [page_size].
    """

    slot: int
    parent_slot: int
    salt: bytes
    tokens: npt.NDArray[np.int32]


class Restored(NamedTuple):
    """What was found.

    Attributes:
        pages: those that may be read, parents before children.
        useless_rows: rows to be deleted: their slot or their parent is not there.
        next_row: the first id that was never given.
        last_stamp: of the most recently used page.
    """

    pages: list[StoredPage]
    useless_rows: list[int]
    next_row: int
    last_stamp: int


def restore(index: PageIndex, segments: Segments, tree: SlotTree, page_size: int) -> Restored:
    """Fill `tree` with what the index says and the files do not contradict."""
    pages: list[StoredPage] = []
    useless: list[int] = []
    page_by_row: dict[int, StoredPage] = {}
    seen: set[int] = set()
    last_stamp = 0
    for row in index.take_rows():
        parent = page_by_row.get(row.parent)
        if not _is_usable(row, parent, segments, tree, page_size):
            useless.append(row.id)
            continue
        salt = parent.salt if parent is not None else row.salt or b""
        parent_identity = tree.identity[parent.slot] if parent else root_identity(salt)
        identity = child_identity(parent_identity, row.tokens)
        if identity in seen:  # nobody writes a page twice: one of them is not what it says
            useless.append(row.id)
            continue
        seen.add(identity)
        tokens = np.frombuffer(row.tokens, dtype="<i4").astype(np.int32, copy=False)
        page = StoredPage(row.slot, parent.slot if parent else NONE, salt, tokens)
        tree.load(row.slot, page.parent_slot, row.used)
        tree.row_id[row.slot] = row.id
        tree.identity[row.slot] = identity
        tree.checksum[row.slot] = row.checksum
        last_stamp = max(last_stamp, row.used)
        page_by_row[row.id] = page
        pages.append(page)
    tree.loaded()
    if useless:
        logger.warning(
            "%d of %d pages in the index have no place in the files any more, and are forgotten.",
            len(useless),
            len(useless) + len(pages),
        )
    return Restored(pages, useless, index.last_id() + 1, last_stamp)


def _is_usable(
    row: PageRow, parent: StoredPage | None, segments: Segments, tree: SlotTree, page_size: int
) -> bool:
    if row.parent == ROOT:
        has_prefix = row.salt is not None and len(row.salt) <= MAX_SALT_BYTES
    else:
        has_prefix = parent is not None
    return (
        has_prefix
        and 0 <= row.slot < tree.num_slots
        and tree.state[row.slot] == FREE
        and len(row.tokens) == 4 * page_size
        and segments.was_there(row.slot)
    )

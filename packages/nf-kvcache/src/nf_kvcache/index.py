"""Which pages hold the KV of which tokens, in all tiers."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Protocol

import numpy as np

from nf_kvcache.python_prefix_index import PythonPrefixIndex

_log = logging.getLogger(__name__)


class PrefixIndex(Protocol):
    """A tree of full pages; the path from a root to a node spells the tokens of a prefix.

    A node is the end of a prefix: a page's worth of tokens after those of its parent. A root is the
    empty prefix of its salt, so prefixes of different salts have no node in common. Identity is
    exact: tokens are compared, so that no collision of hashes can return another prefix.

    A node knows in which page of which tier its KV is. It stays without a page for as long as
    longer prefixes build on it or somebody holds it; when its last page, child or hold goes, it is
    removed, and then its parent if that has none of the three either. A new node has none yet: it
    stays until something that it got is taken away again.

    Nodes are named by positive ints, which are never reused. Tiers are those of `Tier`.

    Every method that takes a node raises KeyError if it is not in the index (`is_alive` and `holds`
    answer instead), and every one that takes an array TypeError if it is none and ValueError for
    another dtype or shape than the one stated. Whatever raises has changed nothing. Not
    thread-safe.
    """

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        ...

    def __len__(self) -> int:
        """Nodes, roots included."""
        ...

    def walk(self, salt: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the longest prefix of `tokens` whose pages are all in one tier or another.

        Args:
            salt: of the root to begin at.
            tokens: int32 [n]; those after the last full page are not looked at.

        Returns:
            The nodes of the path, int64 [k], shortest prefix first; and where each is, int32
            [k, 3]: by tier its page there, or -1. They are copies.
        """
        ...

    def root(self, salt: bytes) -> int:
        """The root of `salt`; made if there is none."""
        ...

    def extend(self, node: int, tokens: np.ndarray) -> int:
        """The prefix that is longer than `node` by `tokens`, int32 [page_size]; made if need be."""
        ...

    def place(self, node: int, tier: int, page: int) -> None:
        """Record that `page` of `tier` holds the KV of `node`; it takes the place of another one.

        Raises:
            ValueError: no such tier, the page is not in 0 to 2**31 - 1, or the node is a root.
        """
        ...

    def displace(self, node: int, tier: int) -> None:
        """Record that `tier` no longer has the KV of `node`, which may remove the node.

        Raises:
            ValueError: no such tier, or it has not had it.
        """
        ...

    def page(self, node: int, tier: int) -> int:
        """The page of `tier` that holds the KV of `node`, or -1.

        Raises:
            ValueError: no such tier.
        """
        ...

    def hold(self, node: int) -> None:
        """Keep `node`, with or without a page, until `unhold` was called as often."""
        ...

    def unhold(self, node: int) -> None:
        """Undo one `hold`, which may remove the node.

        Raises:
            ValueError: it is not held.
        """
        ...

    def advance(
        self, nodes: np.ndarray, tokens: np.ndarray, tier: int, pages: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move one hold of each of some nodes to the prefix that is a page longer.

        As `extend`, `page`, `place` unless there is a page, `hold` and `unhold` for one after the
        other; none of them loses its last page, child or hold by that.

        Args:
            nodes: int64 [k], held at least as often as they occur.
            tokens: int32 [k * page_size], the page that follows each.
            tier: where the pages are.
            pages: int32 [k], of that tier.

        Returns:
            The longer prefixes, int64 [k]; and whether each was placed, bool [k]: False where it
            has another page there already.

        Raises:
            ValueError: no such tier or page, or a node that is not held so often.
        """
        ...

    def parent(self, node: int) -> int:
        """The prefix that is one page shorter; 0 for a root."""
        ...

    def salt(self, node: int) -> bytes:
        """What the root `node` was made for.

        Raises:
            ValueError: it is not a root.
        """
        ...

    def tokens(self, node: int) -> np.ndarray:
        """The tokens of the last page of `node`, int32 [page_size], a copy; [0] for a root."""
        ...

    def num_children(self, node: int) -> int:
        """Prefixes in the index that are longer than `node` by one page."""
        ...

    def holders(self, node: int) -> int:
        """How often `node` is held."""
        ...

    def is_alive(self, node: int) -> bool:
        """Whether `node` is in the index."""
        ...

    def holds(self, nodes: np.ndarray, tier: int, pages: np.ndarray) -> bool:
        """Whether every node is in the index and has its KV in that page of `tier`.

        Args:
            nodes: int64 [k].
            tier: where.
            pages: int32 [k]; -1 stands for no page, so it is never what a node has.

        Raises:
            ValueError: no such tier.
        """
        ...

    def nodes(self) -> np.ndarray:
        """All nodes, int64 [len(self)], roots included, in no particular order."""
        ...

    def check_integrity(self) -> None:
        """Compare everything that is kept twice. Costs time linear in the number of nodes.

        Raises:
            RuntimeError: names what does not agree.
        """
        ...


def make_index(page_size: int, *, native: bool = True) -> PrefixIndex:
    """An empty index.

    Args:
        page_size: tokens in a page, 1 to 65536.
        native: take the one in C++; where it is missing, that in Python serves after a warning.

    Raises:
        ValueError: page_size is out of range.
    """
    if native:
        try:
            module = importlib.import_module("nf_kvcache._native")
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            _warn_once(
                "nf-kvcache was installed without a C++ compiler or Python's headers; install "
                "them and reinstall nf-kvcache for speed"
                if missing
                else f"the extension does not load: {error}"
            )
        else:
            index: PrefixIndex = module.PrefixIndex(page_size)
            return index
    return PythonPrefixIndex(page_size)


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("The prefix index runs in Python: %s.", reason)

"""The prefix index without native code."""

from __future__ import annotations

from collections import Counter

import numpy as np

from nf_kvcache.tier import Tier

_NO_PAGE = -1
_MAX_PAGE = 2**31 - 1
_MAX_PAGE_SIZE = 65536
_NUM_TIERS = len(Tier)


class _Node:
    """The end of a prefix."""

    __slots__ = ("children", "holders", "key", "pages", "parent")

    def __init__(self, parent: int, key: bytes) -> None:
        self.parent = parent  # 0 for a root
        self.key = key  # the tokens, int32 as bytes; of a root the salt
        self.pages = [_NO_PAGE] * _NUM_TIERS
        self.children = 0
        self.holders = 0

    @property
    def is_placed(self) -> bool:
        return any(page != _NO_PAGE for page in self.pages)


class PythonPrefixIndex:
    """A `nf_kvcache.index.PrefixIndex` in plain Python: dictionaries whose keys are the tokens.

    It serves where the native one is missing, and tells the tests what that one has to do. Every
    operation takes constant time per page.

    Args:
        page_size: tokens in a page, 1 to 65536.

    Raises:
        ValueError: page_size is out of range.
    """

    def __init__(self, page_size: int) -> None:
        if not 1 <= page_size <= _MAX_PAGE_SIZE:
            raise ValueError(f"page_size is {page_size}; expected 1 to {_MAX_PAGE_SIZE}.")
        self._page_size = page_size
        self._bytes_per_key = page_size * np.dtype(np.int32).itemsize
        self._nodes: dict[int, _Node] = {}
        self._names: dict[tuple[int, bytes], int] = {}  # by parent and key
        self._last_name = 0

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._page_size

    def __len__(self) -> int:
        return len(self._nodes)

    def walk(self, salt: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See PrefixIndex."""
        data = _checked(tokens, "tokens", np.dtype(np.int32)).tobytes()
        step = self._bytes_per_key
        nodes: list[int] = []
        pages: list[list[int]] = []
        name = self._names.get((0, salt))
        for start in range(0, len(data) - step + 1, step):
            if name is None:
                break
            name = self._names.get((name, data[start : start + step]))
            if name is None or not self._nodes[name].is_placed:
                break
            nodes.append(name)
            pages.append(self._nodes[name].pages)
        return (
            np.array(nodes, dtype=np.int64),
            np.array(pages, dtype=np.int32).reshape(len(pages), _NUM_TIERS),
        )

    def root(self, salt: bytes) -> int:
        """See PrefixIndex."""
        return self._child(0, salt)

    def extend(self, node: int, tokens: np.ndarray) -> int:
        """See PrefixIndex."""
        key = _checked(tokens, "tokens", np.dtype(np.int32), self._page_size).tobytes()
        self._node(node)
        return self._child(node, key)

    def place(self, node: int, tier: int, page: int) -> None:
        """See PrefixIndex."""
        found = self._node(node)
        _check_tier(tier)
        if not 0 <= page <= _MAX_PAGE:
            raise ValueError(f"page is {page}; expected 0 to {_MAX_PAGE}.")
        if found.parent == 0:
            raise ValueError(f"node {node} is a root, the empty prefix; it has no KV to place.")
        found.pages[tier] = page

    def displace(self, node: int, tier: int) -> None:
        """See PrefixIndex."""
        found = self._node(node)
        _check_tier(tier)
        if found.pages[tier] == _NO_PAGE:
            raise ValueError(f"node {node} has no page in tier {int(tier)} to displace.")
        found.pages[tier] = _NO_PAGE
        self._prune(node)

    def page(self, node: int, tier: int) -> int:
        """See PrefixIndex."""
        found = self._node(node)
        _check_tier(tier)
        return found.pages[tier]

    def hold(self, node: int) -> None:
        """See PrefixIndex."""
        self._node(node).holders += 1

    def unhold(self, node: int) -> None:
        """See PrefixIndex."""
        found = self._node(node)
        if found.holders == 0:
            raise ValueError(f"node {node} is not held; every unhold undoes one hold.")
        found.holders -= 1
        self._prune(node)

    def advance(
        self, nodes: np.ndarray, tokens: np.ndarray, tier: int, pages: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See PrefixIndex."""
        names = _checked(nodes, "nodes", np.dtype(np.int64)).tolist()
        keys = _checked(tokens, "tokens", np.dtype(np.int32), len(names) * self._page_size)
        targets = _checked(pages, "pages", np.dtype(np.int32), len(names)).tolist()
        _check_tier(tier)
        holds: Counter[int] = Counter()
        for name, page in zip(names, targets, strict=True):
            holds[name] += 1
            if holds[name] > self._node(name).holders:
                raise ValueError(f"node {name} is not held; advance moves a hold of each node.")
            if page < 0:
                raise ValueError(f"page is {page}; expected 0 to {_MAX_PAGE}.")
        longer, placed = [], []
        for name, key, page in zip(names, keys.reshape(-1, self._page_size), targets, strict=True):
            child = self._child(name, key.tobytes())
            node = self._nodes[child]
            placed.append(node.pages[tier] == _NO_PAGE)
            if placed[-1]:
                node.pages[tier] = page
            node.holders += 1
            self._nodes[name].holders -= 1  # it stays: it has a child now
            longer.append(child)
        return np.array(longer, dtype=np.int64), np.array(placed, dtype=np.bool_)

    def parent(self, node: int) -> int:
        """See PrefixIndex."""
        return self._node(node).parent

    def salt(self, node: int) -> bytes:
        """See PrefixIndex."""
        found = self._node(node)
        if found.parent != 0:
            raise ValueError(f"node {node} is not a root; only roots have a salt.")
        return found.key

    def tokens(self, node: int) -> np.ndarray:
        """See PrefixIndex."""
        found = self._node(node)
        return np.frombuffer(b"" if found.parent == 0 else found.key, dtype=np.int32).copy()

    def num_children(self, node: int) -> int:
        """See PrefixIndex."""
        return self._node(node).children

    def holders(self, node: int) -> int:
        """See PrefixIndex."""
        return self._node(node).holders

    def is_alive(self, node: int) -> bool:
        """See PrefixIndex."""
        return node in self._nodes

    def holds(self, nodes: np.ndarray, tier: int, pages: np.ndarray) -> bool:
        """See PrefixIndex."""
        names = _checked(nodes, "nodes", np.dtype(np.int64))
        expected = _checked(pages, "pages", np.dtype(np.int32), len(names))
        _check_tier(tier)
        for name, page in zip(names.tolist(), expected.tolist(), strict=True):
            found = self._nodes.get(name)
            if found is None or page == _NO_PAGE or found.pages[tier] != page:
                return False
        return True

    def nodes(self) -> np.ndarray:
        """See PrefixIndex."""
        return np.fromiter(self._nodes, dtype=np.int64, count=len(self._nodes))

    def check_integrity(self) -> None:
        """See PrefixIndex."""
        children = Counter(node.parent for node in self._nodes.values())
        for name, node in self._nodes.items():
            if self._names.get((node.parent, node.key)) != name:
                raise RuntimeError(f"The prefix index is broken: node {name} cannot be found.")
            if node.children != children[name]:
                raise RuntimeError(
                    f"The prefix index is broken: node {name} has {children[name]} children and "
                    f"counts {node.children}."
                )
        if len(self._names) != len(self._nodes):
            raise RuntimeError(
                f"The prefix index is broken: {len(self._names)} keys lead to "
                f"{len(self._nodes)} nodes."
            )

    def _node(self, name: int) -> _Node:
        node = self._nodes.get(name)
        if node is None:
            raise KeyError(
                f"Node {name} is not in the index: it was removed when it had no page, child and "
                "holder left, or never was there."
            )
        return node

    def _child(self, parent: int, key: bytes) -> int:
        name = self._names.get((parent, key))
        if name is None:
            name = self._last_name = self._last_name + 1
            self._names[parent, key] = name
            self._nodes[name] = _Node(parent, key)
            if parent != 0:
                self._nodes[parent].children += 1
        return name

    def _prune(self, name: int) -> None:
        """Remove the node, and the parents that it alone kept, if it has no use."""
        while name != 0:
            node = self._nodes[name]
            if node.is_placed or node.children or node.holders:
                return
            del self._nodes[name]
            del self._names[node.parent, node.key]
            name = node.parent
            if name != 0:
                self._nodes[name].children -= 1


def _checked(array: np.ndarray, name: str, dtype: np.dtype, count: int | None = None) -> np.ndarray:
    """An array of one dimension, of this dtype and count.

    Raises:
        TypeError: it is no array.
        ValueError: it is another one.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is {type(array).__name__}; expected a numpy array of {dtype}.")
    if array.dtype != dtype or array.ndim != 1 or (count is not None and len(array) != count):
        wanted = "n" if count is None else count
        raise ValueError(f"{name} is {array.dtype} {array.shape}; expected {dtype} [{wanted}].")
    return array


def _check_tier(tier: int) -> None:
    if not 0 <= tier < _NUM_TIERS:
        raise ValueError(f"tier is {int(tier)}; expected 0 (device), 1 (host) or 2 (disk).")

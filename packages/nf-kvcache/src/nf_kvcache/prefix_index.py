"""Which page holds the KV of which tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

NO_PAGE = -1


class PrefixNode:
    """The end of a prefix: a page's worth of tokens that follow those of the parent.

    Attributes:
        parent: the prefix that is one page shorter; None for the empty one.
        key: the tokens of this page, int32 as bytes.
        page: where their KV is, or NO_PAGE.
        children: prefixes that are one page longer, by their key.
        holders: sequences whose last indexed page is this; they may add children.
    """

    __slots__ = ("children", "holders", "key", "page", "parent")

    def __init__(self, parent: PrefixNode | None, key: bytes) -> None:
        self.parent = parent
        self.key = key
        self.page = NO_PAGE
        self.children: dict[bytes, PrefixNode] = {}
        self.holders = 0

    @property
    def is_useful(self) -> bool:
        """Whether it has a page, or something builds on it."""
        return self.page != NO_PAGE or bool(self.children) or self.holders > 0


class PrefixIndex:
    """A tree of full pages; the path from the root spells the tokens.

    Keys are the tokens themselves, so that no collision of hashes can return another prefix. A node
    stays without its page for as long as longer prefixes or a sequence build on it; when the same
    tokens are computed again it gets a page again, and the longer ones can be found again.

    Attributes:
        root: the empty prefix.
        nodes: the node of every indexed page.
    """

    def __init__(self) -> None:
        self.root = PrefixNode(None, b"")
        self.nodes: dict[int, PrefixNode] = {}

    def walk(self, tokens: bytes, bytes_per_page: int) -> list[PrefixNode]:
        """Nodes of the longest prefix of `tokens` whose pages are all there, shortest first."""
        path: list[PrefixNode] = []
        children = self.root.children
        for start in range(0, len(tokens) - bytes_per_page + 1, bytes_per_page):
            node = children.get(tokens[start : start + bytes_per_page])
            if node is None or node.page == NO_PAGE:
                break
            path.append(node)
            children = node.children
        return path

    def extend(self, node: PrefixNode, key: bytes, page: int) -> PrefixNode:
        """Record that `page` holds the KV of `key` after the prefix of `node`.

        If another page does already, that one stays.

        Returns:
            The prefix that is longer by `key`.
        """
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = PrefixNode(node, key)
        if child.page == NO_PAGE:
            child.page = page
            self.nodes[page] = child
        return child

    def hold(self, node: PrefixNode) -> None:
        """Keep `node` for a sequence that ends there for now."""
        node.holders += 1

    def unhold(self, node: PrefixNode) -> None:
        """Undo a `hold`."""
        node.holders -= 1
        self._prune(node)

    def forget(self, page: int) -> None:
        """Record that `page` is about to hold something else."""
        node = self.nodes.pop(page)
        node.page = NO_PAGE
        self._prune(node)

    def check_integrity(self, held: Iterable[PrefixNode]) -> None:
        """Compare the tree with the table of pages, and its holders with those of `held`.

        Raises:
            RuntimeError: names the page at fault.
        """
        found = {node.page: node for node in self._all() if node.page != NO_PAGE}
        if found != self.nodes:
            pages = found.keys() | self.nodes.keys()
            wrong = sorted(page for page in pages if found.get(page) is not self.nodes.get(page))
            raise RuntimeError(
                f"The prefix index is broken: tree and table disagree on pages {wrong[:8]}."
            )
        holders = Counter(map(id, held))
        for node in self._all():
            if node.holders != holders[id(node)]:
                raise RuntimeError(
                    f"The prefix index is broken: {holders[id(node)]} sequences end at a prefix "
                    f"that counts {node.holders}."
                )
            if not node.is_useful:
                raise RuntimeError("The prefix index is broken: it keeps a prefix without a use.")

    def _prune(self, node: PrefixNode) -> None:
        """Remove `node`, and the parents that it alone kept, if it has no use."""
        while node.parent is not None and not node.is_useful:
            del node.parent.children[node.key]
            node = node.parent

    def _all(self) -> Iterator[PrefixNode]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

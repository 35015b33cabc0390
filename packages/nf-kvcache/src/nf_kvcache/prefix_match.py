"""What a search for a prefix returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from nf_kvcache.prefix_index import PrefixNode


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Pages that hold the KV of the beginning of a sequence.

    A match takes nothing: pages can go to others until it is handed to `KVCache.reserve`.

    Attributes:
        num_tokens: length of the prefix; a whole number of pages.
        pages: where it is, in order.
        queried_tokens: length of the sequence that was looked for.
        node: its place in the index; None for an empty match.
    """

    num_tokens: int
    pages: tuple[int, ...]
    queried_tokens: int = 0
    node: PrefixNode | None = field(default=None, repr=False, compare=False)

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """Where it is: tokens by name of the tier; this cache has one."""
        return {"device": self.num_tokens} if self.num_tokens else {}

    @property
    def is_valid(self) -> bool:
        """Whether the pages still hold what was found."""
        node = self.node
        for page in reversed(self.pages):
            if node is None or node.page != page:
                return False
            node = node.parent
        return True

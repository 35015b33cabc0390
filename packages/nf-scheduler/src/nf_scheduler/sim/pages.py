"""Pages that are only counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(slots=True, frozen=True)
class CountedMatch:
    """What a preempted sequence has on the host.

    Attributes:
        num_tokens: tokens of it.
    """

    num_tokens: int = 0

    @property
    def tokens_by_tier(self) -> Mapping[str, int]:
        """All of it is on the host."""
        return {"host": self.num_tokens} if self.num_tokens else {}


class CountedPages:
    """A `PageBudget` without pages: prompts have no tokens to compare, so none is found again.

    The KV of a preempted sequence goes to the host, which is large enough, and takes time to
    return.

    Args:
        num_pages: of the device.
        page_size: token slots of a page.
        restore_token_seconds: to bring the KV of a token back.
        clock: seconds.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        restore_token_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_available = num_pages
        self._restore_token_seconds = restore_token_seconds
        self._clock = clock
        self._taken: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._restores: dict[str, tuple[float, CountedMatch]] = {}

    @property
    def next_restore(self) -> float | None:
        """When the next restore ends; None if there is none."""
        return min((end for end, _ in self._restores.values()), default=None)

    def match(self, token_ids: np.ndarray, *, seq: str = "", cache_salt: str = "") -> CountedMatch:
        """What is kept of a preempted sequence."""
        return CountedMatch(min(self._kept.get(seq, 0), len(token_ids)))

    def can_reserve(self, seq: str, num_tokens: int, match: CountedMatch | None = None) -> bool:
        """Whether there are enough pages."""
        return self._missing(seq, num_tokens) <= self.num_available

    def reserve(self, seq: str, num_tokens: int, match: CountedMatch | None = None) -> None:
        """Take pages, and begin the restore of a match."""
        missing = self._missing(seq, num_tokens)
        if missing > self.num_available:
            raise RuntimeError(
                f"{missing} pages were asked for, and {self.num_available} are free."
            )
        self.num_available -= missing
        self._taken[seq] = self._taken.get(seq, 0) + missing
        if match is not None:
            end = self._clock() + match.num_tokens * self._restore_token_seconds
            self._restores[seq] = end, match
            self._tokens[seq] = match.num_tokens

    def grow(self, seqs: Sequence[str]) -> None:
        """Take one more page for each."""
        for seq in seqs:
            self._taken[seq] += 1
        self.num_available -= len(seqs)

    def restored(self, seq: str) -> CountedMatch | None:
        """The match, once it has had the time to return."""
        end, match = self._restores[seq]
        if self._clock() < end:
            return None
        del self._restores[seq]
        self._kept.pop(seq, None)
        return match

    def fork(self, parent: str, child: str, num_tokens: int) -> None:
        """Begin with what another one has."""
        raise NotImplementedError("traces have no requests that share a prompt")

    def commit(self, seq: str, token_ids: np.ndarray) -> None:
        """Count complete tokens."""
        self._tokens[seq] = self._tokens.get(seq, 0) + len(token_ids)

    def commit_pages(self, seqs: Sequence[str], token_ids: np.ndarray) -> None:
        """Count complete pages."""
        for seq in seqs:
            self._tokens[seq] = self._tokens.get(seq, 0) + self.page_size

    def preempt(self, seq: str) -> None:
        """Give the pages back, and keep the KV on the host."""
        if self._restores.pop(seq, None) is None:
            self._kept[seq] = self._tokens.get(seq, 0)
        self._vacate(seq)

    def release(self, seq: str) -> None:
        """Give the pages back, and forget the sequence."""
        self._restores.pop(seq, None)
        self._kept.pop(seq, None)
        self._vacate(seq)

    def _vacate(self, seq: str) -> None:
        self._tokens.pop(seq, None)
        self.num_available += self._taken.pop(seq, 0)

    def _missing(self, seq: str, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.page_size) - self._taken.get(seq, 0))

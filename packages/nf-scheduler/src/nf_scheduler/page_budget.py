"""What the scheduler needs from whoever owns the KV pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class PrefixMatch(Protocol):
    """A prefix of a sequence whose KV already exists.

    It is good until the next call that reserves or takes pages.
    """

    @property
    def num_tokens(self) -> int:
        """Length of the prefix in tokens.

        A whole number of pages, unless it is what a preempted sequence kept.
        """

    @property
    def tokens_by_tier(self) -> Mapping[str, int]:
        """Where it is: tokens by name of the tier, such as {"device": 32, "host": 16}.

        They sum to `num_tokens`.
        """


class PageBudget(Protocol):
    """Pages of KV, handed out by the sequence. `nf_kvcache.KVCache` is one.

    A sequence is named by its request id, begins with its first `reserve`, or as a `fork` of
    another, and ends with its one `release`. In between, `preempt` takes its pages, and the next
    `reserve` gives it new ones. The scheduler passes a match only to the `can_reserve` and
    `reserve` that follow it directly.

    KV in a lower tier is brought up without anyone waiting for it in a call: `reserve` begins that,
    and `restored` says when it has ended. It has to end in bounded time, and may end with less.
    """

    @property
    def page_size(self) -> int:
        """Token slots in a page."""

    @property
    def num_pages(self) -> int:
        """Pages that exist. One sequence alone can always have them all."""

    @property
    def num_available(self) -> int:
        """Pages that nobody refers to, which `reserve` can give out now."""

    def match(self, token_ids: np.ndarray, *, seq: str = "", cache_salt: str = "") -> PrefixMatch:
        """Find the longest prefix of `token_ids` whose KV exists in any tier, in whole pages.

        Args:
            token_ids: int32 [n].
            seq: the sequence that asks; if it was preempted, what was kept of it counts too, beyond
                whole pages.
            cache_salt: only KV that was computed under the same salt is found. A sequence that is
                begun with this match, be it empty, computes under the same salt; one begun without
                a match, under the empty salt.
        """

    def can_reserve(self, seq: str, num_tokens: int, match: Any = None) -> bool:
        """Whether `reserve` with the same arguments would succeed now."""

    def reserve(self, seq: str, num_tokens: int, match: Any = None) -> None:
        """Give `seq` room for `num_tokens` tokens in total, from its start.

        The first call for a sequence, or the first since `preempt`, may carry a match, whose KV
        then is that of the sequence's first tokens. What of it is in a lower tier begins its way
        up.

        Raises:
            RuntimeError: there are not enough pages; nothing has changed.
        """

    def grow(self, seqs: Sequence[str]) -> None:
        """Give each of `seqs` one more page.

        The scheduler asks for no more than `num_available`, and for nobody who lacks a page that
        another one shares (see `fork`).
        """

    def restored(self, seq: str) -> PrefixMatch | None:
        """What has come of the match that `seq` was begun with.

        It may be less than the match, down to nothing, where pages were damaged or too slow; the
        rest is computed. The scheduler asks after that `reserve`, and again in every `schedule`
        until there is an answer.

        Returns:
            None while pages are on their way up; the match itself at once if none have to be.
        """

    def fork(self, parent: str, child: str, num_tokens: int) -> None:
        """Begin `child` with the KV of the first `num_tokens` tokens of `parent`.

        The scheduler has committed them, and reserves for the child next, which gives it a page of
        its own in place of a partly filled one: the parent goes on writing to that.
        """

    def commit(self, seq: str, token_ids: np.ndarray) -> None:
        """Say that the KV of the next tokens of `seq` (int32 [n]) is complete.

        They follow those of what was restored and of earlier commits. The scheduler calls this
        whenever pages have become full, with their tokens, and before `preempt`, with what is
        complete of the last page.
        """

    def commit_pages(self, seqs: Sequence[str], token_ids: np.ndarray) -> None:
        """Say the same of the next page of each of some sequences.

        Args:
            seqs: n sequences, which have only full pages committed.
            token_ids: int32 [n, page_size].
        """

    def preempt(self, seq: str) -> None:
        """Take the pages of `seq`, which comes back later.

        Its KV is kept where it can be, for the match of its return. A restore that is under way
        ends; what it was bringing stays where it was. The pages no longer count as taken.
        """

    def release(self, seq: str) -> None:
        """End `seq`, preempted or not, and a restore that is under way.

        Its pages no longer count as taken. They may be kept for later matches of other sequences.
        """

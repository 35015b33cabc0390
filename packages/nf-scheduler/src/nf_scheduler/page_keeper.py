"""Pages of the requests, from their start to their end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nf_scheduler.page_budget import PageBudget, PrefixMatch
from nf_scheduler.request import RequestState
from nf_scheduler.running_set import RunningSet
from nf_scheduler.sequence import Sequence


class PageKeeper:
    """Takes pages and slots for requests and gives them back; keeps both sides in step.

    Who starts, grows or gives way is decided by the scheduler.

    Args:
        pages: who owns the KV pages.
        running: the requests that have pages.
        clock: seconds, for the ledgers.
    """

    def __init__(self, pages: PageBudget, running: RunningSet, clock: Callable[[], float]) -> None:
        self._pages = pages
        self._running = running
        self._clock = clock

    def start(self, sequence: Sequence, tenant: int, parent: Sequence | None) -> int | None:
        """Give a queued request pages for all its known tokens, and a slot.

        It runs from the end of what could be found of its KV, or waits until that is restored.

        Args:
            sequence: the request.
            tenant: index of its tenant.
            parent: a running request with the same prompt, whose KV is complete.

        Returns:
            The slot; None if there are too few pages.
        """
        pages, request_id, num_tokens = self._pages, sequence.request_id, sequence.num_tokens
        available = pages.num_available
        match = None
        if parent is not None:
            shared = (num_tokens - 1) // pages.page_size
            if self._num_pages(num_tokens) - shared > available:
                return None
            self._fork(sequence, parent)
            if not pages.can_reserve(request_id, num_tokens):
                pages.release(request_id)
                return None
        else:
            match = self._match(sequence)
            if not pages.can_reserve(request_id, num_tokens, match):
                return None
        pages.reserve(request_id, num_tokens, match)
        count = self._num_pages(num_tokens)
        taken = available - pages.num_available
        slot = self._running.add(sequence, count * pages.page_size, count - taken, tenant)
        if sequence.ledger.first_scheduled is None:  # else it was preempted
            sequence.ledger.first_scheduled = self._clock()
        if parent is not None:
            sequence.count_reuse(num_tokens - 1, {"device": num_tokens - 1})
            self._running.go_on(slot, num_tokens - 1)
        elif match is not None:
            restored = pages.restored(request_id)
            if restored is None:
                sequence.restore_began = self._clock()
                self._running.wait(slot)
            else:
                self._reuse(slot, restored)
        return slot

    def has_computed_prompt(self, sequence: Sequence) -> bool:
        """Whether a request has pages with the KV of all its prompt but the last token."""
        slot = sequence.slot
        return (
            slot >= 0
            and bool(self._running.alive[slot])
            and int(self._running.completed[slot]) >= sequence.request.prompt_len - 1
        )

    def end_restores(self) -> None:
        """Run the requests whose restore has ended."""
        for slot in np.flatnonzero(self._running.restoring).tolist():
            sequence = self._running.sequence(slot)
            restored = self._pages.restored(sequence.request_id)
            if restored is not None:
                sequence.end_restore(self._clock())
                self._reuse(slot, restored)

    def grow(self, slots: np.ndarray) -> bool:
        """Reserve a page for the next token of each request; if there are not enough, for nobody.

        Returns:
            Whether there were enough.
        """
        if self._pages.num_available < len(slots):
            return False
        self._pages.grow(self._running.names(slots))
        self._running.capacity[slots] += self._pages.page_size
        return True

    def publish(self, slots: np.ndarray) -> None:
        """Report to the page budget the pages that have become full."""
        running, page_size = self._running, self._pages.page_size
        published = running.published[slots]
        news = running.completed[slots] // page_size > published // page_size
        if not news.any():
            return
        slots, published = slots[news], published[news]
        full = running.completed[slots] // page_size * page_size
        # Mostly a page of a decode, whose tokens are at hand; as many at once as there are.
        single = (full == published + page_size) & (published >= running.recent_from[slots])
        single &= published % page_size == 0
        decodes = slots[single]
        if len(decodes):
            tokens = running.recent_pages(decodes, published[single])
            self._pages.commit_pages(running.names(decodes), tokens)
            running.published[decodes] = full[single]
        if len(decodes) < len(slots):
            others = ~single
            for slot, stop in zip(slots[others].tolist(), full[others].tolist(), strict=True):
                self._commit(slot, stop)

    def preempt(self, slot: int) -> Sequence:
        """Take slot and pages from an idle request. If it waits for a restore, that ends.

        Returns:
            The request.
        """
        running = self._running
        sequence = running.sequence(slot)
        if sequence.request.reuse_prefix:
            completed = int(running.completed[slot])
            if completed > running.published[slot]:
                self._commit(slot, completed)
            self._pages.preempt(sequence.request_id)
        else:
            self._pages.release(sequence.request_id)
        sequence.end_restore(self._clock())
        sequence.state = RequestState.PREEMPTED
        sequence.ledger.preemptions += 1
        running.remove(slot)
        return sequence

    def free(self, slot: int) -> Sequence:
        """Take slot and pages from a request for good.

        Returns:
            The request.
        """
        sequence = self._running.sequence(slot)
        self._pages.release(sequence.request_id)
        self._running.remove(slot)
        return sequence

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for the return of a queued request, if it was preempted."""
        if sequence.state is RequestState.PREEMPTED and sequence.request.reuse_prefix:
            self._pages.release(sequence.request_id)

    def count_cached(self, sequence: Sequence) -> int:
        """Tokens of a queued request whose KV would be found now."""
        match = self._match(sequence)
        return 0 if match is None else match.num_tokens

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._pages.page_size)

    def _fork(self, sequence: Sequence, parent: Sequence) -> None:
        """Begin a request with the KV of another one's prompt, all but that of the last token."""
        num_tokens = sequence.request.prompt_len - 1
        if num_tokens > self._running.published[parent.slot]:
            self._commit(parent.slot, num_tokens)
        self._pages.fork(parent.request_id, sequence.request_id, num_tokens)

    def _match(self, sequence: Sequence) -> PrefixMatch | None:
        """Find KV to reuse. The last token is always computed, because it is sampled from."""
        request = sequence.request
        if request.reuse_prefix:
            tokens = sequence.tokens(0, sequence.num_tokens - 1)
        elif request.cache_salt:  # an empty match says under which salt its KV is filed
            tokens = sequence.tokens(0, 0)
        else:
            return None
        return self._pages.match(tokens, seq=request.request_id, cache_salt=request.cache_salt)

    def _reuse(self, slot: int, restored: PrefixMatch) -> None:
        """Run the request in `slot` from the end of what has been restored for it."""
        sequence = self._running.sequence(slot)
        sequence.count_reuse(restored.num_tokens, restored.tokens_by_tier)
        self._running.go_on(slot, restored.num_tokens)

    def _commit(self, slot: int, stop: int) -> None:
        """Report that the KV of the tokens up to `stop` of the request in `slot` is complete."""
        self._running.write(slot)
        sequence = self._running.sequence(slot)
        tokens = sequence.tokens(int(self._running.published[slot]), stop)
        self._pages.commit(sequence.request_id, tokens)
        self._running.published[slot] = stop

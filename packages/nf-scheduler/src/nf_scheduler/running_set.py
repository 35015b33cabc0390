"""The running requests, as a structure of arrays."""

from __future__ import annotations

import numpy as np

from nf_scheduler.batch import Batch
from nf_scheduler.request import RequestState
from nf_scheduler.sequence import Sequence

_STOP_WIDTH = 4  # stop ids that are compared for all requests at once
_NO_STOP = np.iinfo(np.int32).min
_RECENT_PAGES = 16  # whose tokens are appended to a request's output at once


class RunningSet:
    """Counts of every running request, int32 arrays indexed by slot.

    A request occupies a slot from admission until its last iteration in flight is committed. It is
    `alive` until it finishes. One that waits for a restore is alive and idle, and has no KV yet.
    All orders below are by rank, then arrival; the first comes first.

    Attributes:
        num_retired: slots of requests that have finished.
        sequences: who occupies each slot.
        alive: bool; occupied by a request that goes on.
        restoring: bool; it waits for a restore.
        prompt_len: tokens of the prompt.
        limit: tokens at which the request ends: prompt_len + max_tokens.
        known: tokens whose ids are known.
        written: those of them that the sequence has; the others are only in `recent` yet.
        pending: tokens sampled by iterations in flight; their ids follow the known ones.
        last_token: id of the last known token.
        scheduled: tokens whose KV is in pages once all iterations in flight have run.
        completed: tokens whose KV is in pages for certain.
        published: tokens that the page budget knows to be complete.
        capacity: tokens for which pages are reserved.
        shared_pages: those of its pages that were in use when it got them.
        recent: [max_num_seqs, width]; ids of the last known tokens, each at its position modulo the
            width, a whole number of pages.
        recent_from: the first token that `recent` may still have.
        in_flight: uncommitted iterations that contain the request.
        tenant: index of its tenant.
        first_token: float64; when its first token was committed, or NaN.
    """

    def __init__(self, max_num_seqs: int, page_size: int) -> None:
        self.num_retired = 0
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._order = np.empty(0, dtype=np.intp)  # occupied slots, in order
        self._ids = np.full(max_num_seqs, "", dtype=np.object_)

        def zeros(dtype: type[np.generic] = np.int32) -> np.ndarray:
            return np.zeros(max_num_seqs, dtype=dtype)

        self.alive = zeros(np.bool_)
        self.restoring = zeros(np.bool_)
        self.prompt_len = zeros()
        self.limit = zeros()
        self.known = zeros()
        self.written = zeros()
        self.pending = zeros()
        self.last_token = zeros()
        self.scheduled = zeros()
        self.completed = zeros()
        self.published = zeros()
        self.capacity = zeros()
        self.shared_pages = zeros()
        self.recent = np.zeros((max_num_seqs, _RECENT_PAGES * page_size), dtype=np.int32)
        self._page_size = page_size
        self.recent_from = zeros()
        self.in_flight = zeros()
        self.tenant = zeros()
        self.first_token = zeros(np.float64)
        # A stop id ends a request once it has this many tokens.
        self._stops_from = zeros()
        self._stops = np.full((_STOP_WIDTH, max_num_seqs), _NO_STOP, dtype=np.int32)
        self._has_more_stops = zeros(np.bool_)
        self._num_with_more_stops = 0

    @property
    def num_running(self) -> int:
        """Number of requests that take part in iterations."""
        return int(np.count_nonzero(self.alive)) - self.num_restoring

    @property
    def num_restoring(self) -> int:
        """Number of requests that wait for a restore."""
        return int(np.count_nonzero(self.restoring))

    @property
    def has_free_slot(self) -> bool:
        """Whether another request can be added."""
        return bool(self._free)

    @property
    def occupied(self) -> np.ndarray:
        """All occupied slots, intp, in order."""
        return self._order

    @property
    def order(self) -> np.ndarray:
        """Slots of all that are alive, intp, in order."""
        slots: np.ndarray = self._order[self.alive[self._order]]
        return slots

    def sequence(self, slot: int) -> Sequence:
        """Who occupies `slot`."""
        sequence = self.sequences[slot]
        if sequence is None:
            raise RuntimeError(f"Slot {slot} is empty; something was scheduled that does not run.")
        return sequence

    def names(self, slots: np.ndarray) -> list[str]:
        """Ids of the requests in `slots`, intp [n]."""
        names: list[str] = self._ids[slots].tolist()
        return names

    def add(self, sequence: Sequence, capacity: int, shared_pages: int, tenant: int) -> int:
        """Give `sequence` a slot and run it, with pages for `capacity` tokens and no KV yet."""
        slot = self._free.pop()
        sequence.slot = slot
        sequence.state = RequestState.RUNNING
        request = sequence.request
        self.sequences[slot] = sequence
        self._ids[slot] = request.request_id
        self.alive[slot] = True
        self.prompt_len[slot] = request.prompt_len
        self.limit[slot] = request.prompt_len + request.max_tokens
        self.known[slot] = self.written[slot] = sequence.num_tokens
        self.pending[slot] = 0
        # The page that the next tokens go on with.
        start = (sequence.num_tokens - 1) // self._page_size * self._page_size
        last = sequence.tokens(start, sequence.num_tokens)
        self.last_token[slot] = last[-1]
        position = start % self.recent.shape[1]
        self.recent[slot, position : position + len(last)] = last
        self.recent_from[slot] = start
        self.scheduled[slot] = self.completed[slot] = self.published[slot] = 0
        self.capacity[slot] = capacity
        self.shared_pages[slot] = shared_pages
        self.in_flight[slot] = 0
        self.tenant[slot] = tenant
        first_token = sequence.ledger.first_token
        self.first_token[slot] = np.nan if first_token is None else first_token
        stops = sorted(request.stop_token_ids)
        self._stops_from[slot] = request.prompt_len + min(
            request.min_tokens, request.max_tokens + 1
        )
        self._stops[:, slot] = (stops + [_NO_STOP] * _STOP_WIDTH)[:_STOP_WIDTH]
        self._has_more_stops[slot] = len(stops) > _STOP_WIDTH
        self._num_with_more_stops += len(stops) > _STOP_WIDTH
        self._insert(slot, sequence)
        return slot

    def wait(self, slot: int) -> None:
        """Have the request in `slot`, just added, wait for a restore."""
        self.sequence(slot).state = RequestState.WAITING_FOR_RESTORE
        self.restoring[slot] = True

    def go_on(self, slot: int, num_tokens: int) -> None:
        """Run the request in `slot`; the KV of its first `num_tokens` tokens exists."""
        self.sequence(slot).state = RequestState.RUNNING
        self.restoring[slot] = False
        self.scheduled[slot] = self.completed[slot] = self.published[slot] = num_tokens

    def retire(self, slot: int) -> None:
        """Mark the request in `slot` as finished; it keeps the slot until `remove`."""
        self.write(slot)
        self.sequence(slot).state = RequestState.FINISHED
        self.alive[slot] = False
        self.num_retired += 1

    def write(self, slot: int) -> None:
        """Append to the output of the request in `slot` the tokens that it lacks.

        Whoever reads the output of a running request asks for this first: to append every token as
        it comes would take longer than all else that `take_tokens` does.
        """
        start, stop = int(self.written[slot]), int(self.known[slot])
        if start < stop:
            position = start % self.recent.shape[1]
            tokens = self.recent[slot, position : position + stop - start]
            self.sequence(slot).output.frombytes(tokens.tobytes())
            self.written[slot] = stop

    def remove(self, slot: int) -> None:
        """Free `slot`."""
        self.write(slot)
        self.sequence(slot).slot = -1
        self.num_retired -= not self.alive[slot]
        self._num_with_more_stops -= bool(self._has_more_stops[slot])
        self.sequences[slot] = None
        self.alive[slot] = self.restoring[slot] = False
        self._order = self._order[self._order != slot]
        self._free.append(slot)

    def ready(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the requests that can go on now: those that decode, those in their prefill."""
        # Of all slots: whole arrays cost less than picking the occupied ones out of each.
        total = self.known + self.pending
        goes_on = self.alive & ~self.restoring & (total < self.limit)
        decodes = goes_on & (self.scheduled == total - 1) & (total > self.prompt_len)
        prefills = goes_on & ~decodes
        order = self._order
        return order[decodes[order]], order[prefills[order]]

    def last_after(self, slot: int, *, idle: bool = False) -> int | None:
        """Slot of the last request in order, if that comes after the one in `slot`.

        Args:
            slot: whose followers are looked at.
            idle: look only at those that no iteration in flight contains.
        """
        position = int(np.flatnonzero(self._order == slot)[0])
        later = self._order[position + 1 :]
        eligible = self.alive[later]
        if idle:
            eligible &= self.in_flight[later] == 0
        slots = later[eligible]
        return int(slots[-1]) if slots.size else None

    def take_tokens(self, slots: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append a sampled token to each of some requests.

        Args:
            slots: intp [n].
            ids: int32 [n].

        Returns:
            bool [n] each: whether a stop id ended the request; whether it reached its limit.
        """
        self.pending[slots] -= 1
        known = self.known[slots]
        width = self.recent.shape[1]
        position = known % width
        self.recent[slots, position] = ids
        known += 1
        self.known[slots] = known
        self.last_token[slots] = ids
        for slot in slots[position == width - 1].tolist():  # before `recent` begins anew
            self.write(slot)
        stopped = (self._stops.take(slots, axis=1) == ids).any(axis=0)
        if self._num_with_more_stops:
            for row in np.flatnonzero(self._has_more_stops[slots] & ~stopped).tolist():
                stop_ids = self.sequence(int(slots[row])).request.stop_token_ids
                stopped[row] = int(ids[row]) in stop_ids
        stopped &= known >= self._stops_from[slots]
        return stopped, known == self.limit[slots]

    def recent_pages(self, slots: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Ids of a full page of tokens of each of some requests, int32 [n, page_size].

        Args:
            slots: intp [n].
            starts: int32 [n]; where each page begins; `recent` still has it.
        """
        recent = self.recent.reshape(-1, _RECENT_PAGES, self._page_size)
        pages: np.ndarray = recent[slots, starts // self._page_size % _RECENT_PAGES]
        return pages

    def form_batch(
        self, iteration: int, decodes: np.ndarray, chunks: list[tuple[int, int]]
    ) -> Batch:
        """Write down an iteration and count it as in flight.

        Args:
            iteration: its number.
            decodes: intp; slots that get their next token.
            chunks: (slot, new tokens) of the prefills.
        """
        num_decodes = len(decodes)
        slots = np.concatenate((decodes, np.array([slot for slot, _ in chunks], dtype=np.intp)))
        counts = np.ones(len(slots), dtype=np.int32)
        counts[num_decodes:] = [count for _, count in chunks]
        query_start = np.zeros(len(slots) + 1, dtype=np.int32)
        counts.cumsum(dtype=np.int32, out=query_start[1:])
        context_lens, pending = self.scheduled[slots], self.pending[slots]

        token_ids = np.empty(query_start[-1], dtype=np.int32)
        token_ids[:num_decodes] = np.where(pending[:num_decodes] > 0, -1, self.last_token[decodes])
        for row, (slot, count) in enumerate(chunks, start=num_decodes):
            start = int(context_lens[row])
            tokens = self.sequence(slot).tokens(start, start + count)
            token_ids[query_start[row] : query_start[row + 1]] = tokens

        ends = context_lens + counts
        samples = ends == self.known[slots] + pending
        self.scheduled[slots] = ends
        self.pending[slots] = pending + samples
        self.in_flight[slots] += 1
        return Batch(
            iteration=iteration,
            request_ids=self.names(slots),
            slots=slots.astype(np.int32),
            num_decodes=num_decodes,
            query_start=query_start,
            context_lens=context_lens,
            token_ids=token_ids,
            samples=samples,
        )

    def _insert(self, slot: int, sequence: Sequence) -> None:
        """Put a slot at its place in the order; most come last."""
        place = len(self._order)
        while place and self.sequence(int(self._order[place - 1])).place > sequence.place:
            place -= 1
        self._order = np.insert(self._order, place, slot)

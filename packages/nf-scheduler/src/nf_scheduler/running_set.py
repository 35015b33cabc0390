"""The running requests, as a structure of arrays."""

from __future__ import annotations

import numpy as np

from nf_scheduler.batch import Batch
from nf_scheduler.request import RequestState
from nf_scheduler.sequence import Sequence


class RunningSet:
    """Counts of every running request, int32 arrays indexed by slot.

    A request occupies a slot from admission until its last iteration in flight is committed. It is
    `alive` until it finishes. One that waits for a restore is alive and idle, and has no KV yet.
    All orders below are orders of arrival, oldest first.

    Attributes:
        sequences: who occupies each slot.
        alive: bool; occupied by a request that goes on.
        restoring: bool; it waits for a restore.
        arrival: int64; number of the request, in order of arrival.
        prompt_len: tokens of the prompt.
        limit: tokens at which the request ends: prompt_len + max_tokens.
        known: tokens whose ids are known.
        pending: tokens sampled by iterations in flight; their ids follow the known ones.
        last_token: id of the last known token.
        scheduled: tokens whose KV is in pages once all iterations in flight have run.
        completed: tokens whose KV is in pages for certain.
        published: tokens that the page budget knows to be complete.
        capacity: tokens for which pages are reserved.
        in_flight: uncommitted iterations that contain the request.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self.alive = np.zeros(max_num_seqs, dtype=np.bool_)
        self.restoring = np.zeros(max_num_seqs, dtype=np.bool_)
        self.arrival = np.zeros(max_num_seqs, dtype=np.int64)
        self.prompt_len = np.zeros(max_num_seqs, dtype=np.int32)
        self.limit = np.zeros(max_num_seqs, dtype=np.int32)
        self.known = np.zeros(max_num_seqs, dtype=np.int32)
        self.pending = np.zeros(max_num_seqs, dtype=np.int32)
        self.last_token = np.zeros(max_num_seqs, dtype=np.int32)
        self.scheduled = np.zeros(max_num_seqs, dtype=np.int32)
        self.completed = np.zeros(max_num_seqs, dtype=np.int32)
        self.published = np.zeros(max_num_seqs, dtype=np.int32)
        self.capacity = np.zeros(max_num_seqs, dtype=np.int32)
        self.in_flight = np.zeros(max_num_seqs, dtype=np.int32)

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

    def sequence(self, slot: int) -> Sequence:
        """Who occupies `slot`."""
        sequence = self.sequences[slot]
        if sequence is None:
            raise RuntimeError(f"Slot {slot} is empty; something was scheduled that does not run.")
        return sequence

    def add(self, sequence: Sequence, capacity: int) -> int:
        """Give `sequence` a slot and run it, with pages for `capacity` tokens and no KV yet."""
        slot = self._free.pop()
        sequence.slot = slot
        sequence.state = RequestState.RUNNING
        request = sequence.request
        self.sequences[slot] = sequence
        self.alive[slot] = True
        self.arrival[slot] = sequence.arrival
        self.prompt_len[slot] = request.prompt_len
        self.limit[slot] = request.prompt_len + request.max_tokens
        self.known[slot] = sequence.num_tokens
        self.pending[slot] = 0
        self.last_token[slot] = sequence.tokens(sequence.num_tokens - 1, sequence.num_tokens)[0]
        self.scheduled[slot] = self.completed[slot] = self.published[slot] = 0
        self.capacity[slot] = capacity
        self.in_flight[slot] = 0
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
        self.sequence(slot).state = RequestState.FINISHED
        self.alive[slot] = False

    def remove(self, slot: int) -> None:
        """Free `slot`."""
        self.sequence(slot).slot = -1
        self.sequences[slot] = None
        self.alive[slot] = self.restoring[slot] = False
        self._free.append(slot)

    def ready(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the requests that can go on now: those that decode, those in their prefill."""
        slots = np.flatnonzero(self.alive & ~self.restoring)
        slots = slots[np.argsort(self.arrival[slots])].astype(np.int32)
        total = self.known[slots] + self.pending[slots]
        goes_on = total < self.limit[slots]
        decodes = (self.scheduled[slots] == total - 1) & (total > self.prompt_len[slots])
        return slots[goes_on & decodes], slots[goes_on & ~decodes]

    def latest_after(self, slot: int, *, idle: bool = False) -> int | None:
        """Slot of the request that arrived last, if later than the one in `slot`.

        Args:
            slot: whose followers are looked at.
            idle: look only at those that no iteration in flight contains.
        """
        later = self.alive & (self.arrival > self.arrival[slot])
        if idle:
            later &= self.in_flight == 0
        slots = np.flatnonzero(later)
        return int(slots[np.argmax(self.arrival[slots])]) if slots.size else None

    def form_batch(
        self, iteration: int, decodes: np.ndarray, chunks: list[tuple[int, int]]
    ) -> Batch:
        """Write down an iteration and count it as in flight.

        Args:
            iteration: its number.
            decodes: int32; slots that get their next token.
            chunks: (slot, new tokens) of the prefills.
        """
        num_decodes = len(decodes)
        slots = np.concatenate((decodes, np.array([slot for slot, _ in chunks], dtype=np.int32)))
        counts = np.ones(len(slots), dtype=np.int32)
        counts[num_decodes:] = [count for _, count in chunks]
        query_start = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        context_lens = self.scheduled[slots]
        sequences = [self.sequence(slot) for slot in slots.tolist()]

        token_ids = np.empty(query_start[-1], dtype=np.int32)
        token_ids[:num_decodes] = np.where(self.pending[decodes] > 0, -1, self.last_token[decodes])
        for row in range(num_decodes, len(slots)):
            start, stop = int(context_lens[row]), int(context_lens[row] + counts[row])
            token_ids[query_start[row] : query_start[row + 1]] = sequences[row].tokens(start, stop)

        self.scheduled[slots] += counts
        samples = self.scheduled[slots] == self.known[slots] + self.pending[slots]
        self.pending[slots] += samples
        self.in_flight[slots] += 1
        return Batch(
            iteration=iteration,
            request_ids=[sequence.request.request_id for sequence in sequences],
            slots=slots,
            num_decodes=num_decodes,
            query_start=query_start,
            context_lens=context_lens,
            token_ids=token_ids,
            samples=samples,
        )

"""Cross-checks of a scheduler's state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from nf_scheduler.batch import Batch
from nf_scheduler.request import RequestState
from nf_scheduler.running_set import RunningSet
from nf_scheduler.sequence import Sequence
from nf_scheduler.waiting_queue import WaitingQueue

_QUEUED = (RequestState.WAITING, RequestState.PREEMPTED)
_WAITS = RequestState.WAITING_FOR_RESTORE


def find_fault(
    sequences: Mapping[str, Sequence],
    queue: WaitingQueue,
    forks: list[Sequence],
    running: RunningSet,
    in_flight: Iterable[Batch],
) -> str | None:
    """The first invariant that does not hold, in words, or None.

    Args:
        sequences: all that have not finished, by request.
        queue: those that wait for pages.
        forks: those that wait for the prompt of another one.
        running: those that have pages.
        in_flight: uncommitted iterations.
    """
    faults = _faults(sequences, queue, forks, running, list(in_flight))
    return next(faults, None)


def _faults(
    sequences: Mapping[str, Sequence],
    queue: WaitingQueue,
    forks: list[Sequence],
    running: RunningSet,
    in_flight: list[Batch],
) -> Iterator[str]:
    waiting = [*queue, *forks]
    occupants = [sequence for sequence in running.sequences if sequence is not None]
    if {id(s) for s in sequences.values()} != {id(s) for s in waiting + occupants}:
        yield "the requests known are not exactly those that are queued or occupy a slot"
    if len(waiting) + len(occupants) != len(sequences):
        yield "a request is queued twice, or queued while it occupies a slot"
    if len(queue) != len(list(queue)):
        yield f"the queue counts {len(queue)} requests, and has {len(list(queue))}"
    if queue.num_prompt_tokens != sum(s.request.prompt_len for s in queue):
        yield f"the queue counts {queue.num_prompt_tokens} prompt tokens, and has others"
    last: dict[str, tuple[float, int]] = {}
    for sequence in queue:
        tenant = sequence.request.tenant
        if tenant in last and last[tenant] > sequence.place:
            yield f"{sequence.request_id!r} is queued behind others that come after it"
        last[tenant] = sequence.place
    for sequence in waiting:
        if sequence.state not in _QUEUED or sequence.slot != -1:
            yield f"{sequence.request_id!r} is queued as {sequence.state.name}"
    slots = [sequence.slot for sequence in sorted(occupants, key=lambda s: s.place)]
    if running.occupied.tolist() != slots:
        yield f"slots {slots} are occupied in order, but {running.occupied.tolist()} are listed"
    in_flight_of = np.zeros_like(running.in_flight)
    pending_of = np.zeros_like(running.pending)
    for batch in in_flight:
        in_flight_of[batch.slots] += 1
        pending_of[batch.slots] += batch.samples
    for slot, occupant in enumerate(running.sequences):
        if occupant is not None:
            yield from _slot_faults(running, slot, occupant, in_flight_of[slot], pending_of[slot])
        elif running.alive[slot] or running.restoring[slot] or in_flight_of[slot]:
            yield f"slot {slot} is empty, but counts as running, restoring or in flight"


def _slot_faults(
    running: RunningSet, slot: int, sequence: Sequence, in_flight: int, pending: int
) -> Iterator[str]:
    name = repr(sequence.request_id)
    if sequence.slot != slot:
        yield f"{name} occupies slot {slot}, but believes it has {sequence.slot}"
    if running.in_flight[slot] != in_flight:
        yield f"{name} counts {running.in_flight[slot]} iterations in flight, but is in {in_flight}"
    if (sequence.state in (RequestState.RUNNING, _WAITS)) != bool(running.alive[slot]):
        yield f"{name} is {sequence.state.name} in a slot with alive={running.alive[slot]}"
    waits = sequence.state is _WAITS
    if waits != bool(running.restoring[slot]) or waits != (sequence.restore_began is not None):
        yield (
            f"{name} is {sequence.state.name} in a slot with restoring={running.restoring[slot]}, "
            f"and its restore began at {sequence.restore_began}"
        )
    if waits and (in_flight or running.scheduled[slot]):
        yield f"{name} waits for a restore, but has been scheduled"
    if not running.alive[slot]:
        if in_flight == 0:
            yield f"{name} has finished and is in no iteration in flight, but keeps its slot"
        return
    if running.pending[slot] != pending:
        yield f"{name} awaits {running.pending[slot]} tokens, but {pending} are being sampled"
    if running.written[slot] != sequence.num_tokens:
        yield f"{name} has {sequence.num_tokens} tokens, but counts {running.written[slot]}"
    last = running.recent[slot, (running.known[slot] - 1) % running.recent.shape[1]]
    if last != running.last_token[slot]:
        yield (
            f"{name} knows {running.known[slot]} tokens, the last of which is {last}, "
            f"but its last token is {running.last_token[slot]}"
        )
    counts = [
        int(running.published[slot]),
        int(running.completed[slot]),
        int(running.scheduled[slot]),
        min(int(running.capacity[slot]), int(running.known[slot]) + pending - 1),
    ]
    if counts != sorted(counts):
        yield f"{name} has published, completed, scheduled and at most {counts} tokens"

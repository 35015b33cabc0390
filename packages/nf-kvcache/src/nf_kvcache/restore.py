"""Pages on their way up to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nf_kvcache.copier import Event
from nf_kvcache.disk_store import StoredRead

GROUP = 32
"""Pages in one read of the disk."""

_MAX_READS = 2
"""Reads of one restore that are under way at once: one lands while the next is on its way."""


@dataclass(slots=True)
class RestoreStep:
    """A page to bring up.

    Attributes:
        node: its place in the index; 0 for the tail of a preempted sequence.
        page: page of the device that it goes to.
        host: page of the host that it is in, or will be read into; -1 before that is chosen.
        slot: slot of the disk to read it from; -1 if it is on the host.
        ready: whether the page of the host is complete.
    """

    node: int
    page: int
    host: int
    slot: int
    ready: bool


@dataclass(slots=True)
class PendingRead:
    """A read and the pages of the host that it writes to."""

    read: StoredRead
    steps: list[RestoreStep]


class RestoreDevices(Protocol):
    """What a restore asks of the tiers."""

    def take_host_pages(self, count: int) -> list[int]:
        """Take up to `count` pages of the host."""

    def start_read(self, steps: Sequence[RestoreStep]) -> StoredRead:
        """Read slots of the disk into pages of the host."""

    def start_upload(self, steps: Sequence[RestoreStep]) -> Event:
        """Copy pages of the host to the device."""

    def landed(self, step: RestoreStep) -> None:
        """A page that was read is on the host now."""

    def arrived(self, step: RestoreStep) -> None:
        """A page is on the device now; its page of the host is not needed any more."""

    def dropped(self, step: RestoreStep) -> None:
        """A page of the host that was taken or held for a step is not needed any more."""

    def drain(self, pending: PendingRead) -> None:
        """Give back the pages of the host of a read that nobody waits for, once it has ended."""


class Restore:
    """Brings pages of one prefix to the device: disk to host to device, first page first.

    Pages arrive in order. It ends when all have arrived, or at the first that cannot: damaged,
    without room on the host, or later than the deadline. What was on the device by then stays.

    Args:
        owner: the sequence that it is for.
        steps: the pages, in order of the prefix; those on the host are held there already.
        started: time of the clock that `advance` is given.
        timeout: seconds from then on.

    Attributes:
        owner: as given.
        steps: as given.
        waiters: sequences that wait for it. It gives up when there are none.
        num_arrived: leading pages that are on the device.
        end: pages that it still tries to bring; lowered when it fails.
    """

    def __init__(
        self, owner: str, steps: list[RestoreStep], started: float, timeout: float
    ) -> None:
        self.owner = owner
        self.steps = steps
        self.waiters = {owner}
        self.num_arrived = 0
        self.end = len(steps)
        self._deadline = started + timeout
        self._num_fetched = 0  # steps whose page is on the host or being read
        self._num_issued = 0  # steps whose copy to the device was ordered
        self._reads: deque[PendingRead] = deque()
        self._uploads: deque[tuple[Event, list[RestoreStep]]] = deque()

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way any more."""
        return self.num_arrived >= self.end and not self._uploads

    @property
    def last_event(self) -> Event | None:
        """The last copy to the device that is under way."""
        return self._uploads[-1][0] if self._uploads else None

    def advance(self, devices: RestoreDevices, now: float) -> None:
        """Take notice of what has happened, and start what can be started."""
        if now >= self._deadline or not self.waiters:
            self._cut(devices, self._num_issued)
        self._take_arrivals(devices)
        self._take_reads(devices)
        self._fetch(devices)
        self._issue(devices)

    def _fetch(self, devices: RestoreDevices) -> None:
        """Start reads of the disk."""
        while self._num_fetched < self.end and len(self._reads) < _MAX_READS:
            if self.steps[self._num_fetched].ready:
                self._num_fetched += 1
                continue
            group = []
            for step in self.steps[self._num_fetched : min(self.end, self._num_fetched + GROUP)]:
                if step.ready:
                    break
                group.append(step)
            pages = devices.take_host_pages(len(group))
            if not pages:
                if not self._reads and self.num_arrived == self._num_issued == self._num_fetched:
                    self._cut(devices, self._num_fetched)  # nothing of ours will make room
                return
            group = group[: len(pages)]
            for step, page in zip(group, pages, strict=True):
                step.host = page
            self._reads.append(PendingRead(devices.start_read(group), group))
            self._num_fetched += len(group)

    def _take_reads(self, devices: RestoreDevices) -> None:
        """Let pages that were read land on the host."""
        while self._reads and self._reads[0].read.done:
            pending = self._reads.popleft()
            good = pending.read.num_good
            for step in pending.steps[:good]:
                step.ready = True
                devices.landed(step)
            for step in pending.steps[good:]:
                devices.dropped(step)
                step.host = -1
            if good < len(pending.steps):
                self._cut(devices, self.steps.index(pending.steps[good]))

    def _issue(self, devices: RestoreDevices) -> None:
        """Order the copy to the device of what is on the host and next in line."""
        stop = self._num_issued
        while stop < self.end and self.steps[stop].ready:
            stop += 1
        if stop > self._num_issued:
            steps = self.steps[self._num_issued : stop]
            self._uploads.append((devices.start_upload(steps), steps))
            self._num_issued = stop

    def _take_arrivals(self, devices: RestoreDevices) -> None:
        """Take notice of copies to the device that have ended."""
        while self._uploads and self._uploads[0][0].done:
            event, steps = self._uploads.popleft()
            if event.failed:
                self._cut(devices, self._num_issued)
                self.end = self.num_arrived
            if self.num_arrived >= self.end:
                for step in steps:
                    devices.dropped(step)
                continue
            for step in steps:
                devices.arrived(step)
            self.num_arrived += len(steps)

    def _cut(self, devices: RestoreDevices, position: int) -> None:
        """Give up the pages at and after `position`, unless their copy was ordered already."""
        position = max(position, self._num_issued)
        if position >= self.end:
            return
        for pending in self._reads:
            pending.read.cancel()
            devices.drain(pending)
        self._reads.clear()
        for step in self.steps[position : self.end]:
            if step.ready:
                devices.dropped(step)
        self.end = position

"""Host and disk below the pages of a device: what goes down, and what comes up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from nf_kvcache.copier import Copier, Event
from nf_kvcache.device_pages import DevicePages
from nf_kvcache.disk_copies import DiskCopies
from nf_kvcache.disk_store import DiskStore, StoredRead
from nf_kvcache.host_pages import HostPages
from nf_kvcache.host_tier import HostTier
from nf_kvcache.index import PrefixIndex
from nf_kvcache.offload import HostArrival, IterationOffload, LayerOrder
from nf_kvcache.prefix_match import Tail
from nf_kvcache.restore import PendingRead, Restore, RestoreStep
from nf_kvcache.stats import LowerTierStats
from nf_kvcache.tier import Tier


class LowerTiers:
    """The host tier, with a disk tier or without.

    Pages go down when they become full and come up when a sequence needs them. Whatever fails here
    is a page that is not found, and is counted; nothing here stops the owner. Not thread-safe.

    Args:
        device: pages of the device.
        index: of all tiers.
        host: pages in the memory of the host.
        disk: pages on disk.
        copier: between device and host.
        watch: as `KVCache`.
        restore_seconds: after which a page that has not come is computed instead.
        clock: seconds.

    Attributes:
        incoming: by node, the page of the device that it is on its way to, and what brings it.
        skipped_pages: pages that became full while the host had no room for them.
        uploaded_pages: pages brought to the device.
        downloaded_pages: pages brought to the host.
        restores_cut: restores that ended early: damaged, too late, without room.
    """

    def __init__(
        self,
        device: DevicePages,
        index: PrefixIndex,
        host: HostTier,
        disk: DiskStore | None,
        copier: Copier,
        *,
        watch: Callable[[Event], Event],
        restore_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = HostPages(host, index)
        self._disk = None if disk is None else DiskCopies(disk, index, self._host)
        self.copier = copier
        self._watch = watch
        self.incoming: dict[int, tuple[int, Restore]] = {}
        self.skipped_pages = 0
        self.uploaded_pages = 0
        self.downloaded_pages = 0
        self.restores_cut = 0
        self._device = device
        self._index = index
        self._restore_seconds = restore_seconds
        self._clock = clock
        self._order = LayerOrder(copier, len(device.layers))
        self._arrivals: deque[HostArrival] = deque()
        self._restores: list[Restore] = []
        self._draining: list[PendingRead] = []

    # Down

    def begin_iteration(self, pages: Sequence[int]) -> tuple[IterationOffload, list[HostArrival]]:
        """Prepare the way down of pages that an iteration is about to fill.

        Returns:
            What the owner calls for every layer; and an arrival for each of the first pages, as
            many as the host has room for. Each has to be handed to `expect` in the end.
        """
        targets = self._host.take(len(pages))
        self.skipped_pages += len(pages) - len(targets)
        offload = IterationOffload(
            self._device.layers,
            list(pages[: len(targets)]),
            targets,
            host=self._host.tier,
            copier=self.copier,
            order=self._order,
        )
        copy = self._watch(offload)
        return offload, [HostArrival(copy, page) for page in targets]

    def expect(self, arrival: HostArrival, node: int = 0, salt: bytes = b"") -> None:
        """Say what the page of the host will hold: the KV of `node`, or nothing of use."""
        arrival.node, arrival.salt = node, salt
        if node:
            self._index.hold(node)
        self._arrivals.append(arrival)

    def keep_preempted(
        self,
        seq: str,
        path: Sequence[tuple[int, int]],
        salt: bytes,
        tail: tuple[int, int, np.ndarray],
    ) -> None:
        """Copy down what a sequence that gives way has on the device and the host lacks.

        Args:
            seq: its name.
            path: (node, page of the device) of its full pages, in order.
            salt: of their root.
            tail: the node that its partly filled page follows, that page of the device, and the
                tokens in it, int32; no tokens if there is none.
        """
        expected = {arrival.node for arrival in self._arrivals if arrival.tail is None}
        missing = [
            (node, source)
            for node, source in path
            if node not in expected and self._index.page(node, Tier.HOST) < 0
        ]
        node, page, tokens = tail
        sources = [source for _, source in missing] + ([page] if len(tokens) else [])
        targets = self._host.take(len(sources))
        if not targets:
            return
        download = self.copier.download(
            self._device.layers,
            sources[: len(targets)],
            [self._host.tier.page(target) for target in targets],
        )
        self._order.read_by(download.source_read)
        done = self._watch(download.done)
        for (full, _), target in zip(missing, targets, strict=False):
            self.expect(HostArrival(done, target), full, salt)
        if len(targets) > len(missing):
            kept = Tail(node, tokens, targets[-1])
            self.expect(HostArrival(done, targets[-1], tail=(seq, kept)), node, salt)

    def tail_of(self, seq: str) -> Tail | None:
        """What is kept of a preempted sequence beyond its full pages."""
        for arrival in self._arrivals:
            if arrival.tail is not None and arrival.tail[0] == seq:
                arrival.copy.wait()  # a copy in memory, which takes milliseconds
                self.poll()
                break
        return self._host.tail_of(seq)

    def forget_preempted(self, seq: str) -> None:
        """Drop what is kept for the return of a preempted sequence alone."""
        if self.tail_of(seq) is not None:
            self._host.forget_tail(seq)

    # Up

    def restore(self, seq: str, steps: list[RestoreStep]) -> Restore:
        """Begin to bring pages up for `seq`; their pages of the device are its own already."""
        self._host.pool.hold(step.host for step in steps if step.ready)
        self._device.pool.hold(step.page for step in steps)
        restore = Restore(seq, steps, self._clock(), self._restore_seconds)
        for step in steps:
            if step.node:
                self._index.hold(step.node)
                self.incoming[step.node] = (step.page, restore)
        self._restores.append(restore)
        self._advance_all()
        return restore

    def hold_all(self) -> None:
        """Let the computation wait until every page may be written to, in all layers."""
        for layer in range(len(self._device.layers)):
            self._order.hold(layer)

    def wait(self, timeout: float) -> None:
        """Wait until some restore has come further, `timeout` seconds at most."""
        for restore in self._restores:
            if restore.last_event is not None:
                restore.last_event.wait(timeout)
                return
        if self._restores and self._disk is not None:
            self._disk.disk.wait(timeout)

    # What a restore asks (`RestoreDevices`)

    def take_host_pages(self, count: int) -> list[int]:
        """Take up to `count` pages of the host; what they held is forgotten."""
        return self._host.take(count)

    def start_read(self, steps: Sequence[RestoreStep]) -> StoredRead:
        """Read slots of the disk into pages of the host."""
        if self._disk is None:
            raise RuntimeError("A page is on disk, but there is no disk tier.")
        return self._disk.disk.read(
            [step.slot for step in steps], [self._host.tier.slot(step.host) for step in steps]
        )

    def start_upload(self, steps: Sequence[RestoreStep]) -> Event:
        """Copy pages of the host to the device."""
        upload = self.copier.upload(
            self._device.layers,
            [step.page for step in steps],
            [self._host.tier.page(step.host) for step in steps],
        )
        return self._watch(upload)

    def landed(self, step: RestoreStep) -> None:
        """A page that was read is on the host now."""
        self._host.place(step.node, step.host)

    def arrived(self, step: RestoreStep) -> None:
        """A page is on the device now."""
        self.uploaded_pages += 1
        if step.node:
            self._device.place(step.node, step.page)
            self.incoming.pop(step.node, None)
        else:
            self._host.end_tail(step.host)  # a tail serves once
        self.dropped(step)

    def dropped(self, step: RestoreStep) -> None:
        """A page of the host that was taken or held for a step is not needed any more."""
        self._host.release(step.host)

    def drain(self, pending: PendingRead) -> None:
        """Give back the pages of the host of a read, once it has ended."""
        self._draining.append(pending)

    # Keeping up

    def poll(self) -> None:
        """Take notice of everything that has happened since the last call."""
        while self._arrivals and self._arrivals[0].copy.done:
            self._land(self._arrivals.popleft())
        if self._disk is not None:
            self._disk.poll()
        self._advance_all()
        for pending in [pending for pending in self._draining if pending.read.done]:
            self._draining.remove(pending)
            for step in pending.steps:
                self._host.release(step.host)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        if self._disk is not None and not self._disk.is_idle:
            return False
        return not (self._arrivals or self._restores or self._draining)

    def touch(self, nodes: Sequence[int]) -> None:
        """Count pages of a path as used now, in the lower tiers too."""
        for node in reversed(nodes):
            self._host.touch(node)
        if self._disk is not None:
            self._disk.touch(nodes)

    def flush(self, timeout: float) -> bool:
        """Wait until everything that goes down has come there; False if that takes too long."""
        deadline = time.monotonic() + timeout
        for arrival in self._arrivals:
            arrival.copy.wait(max(0.0, deadline - time.monotonic()))
        self.poll()
        if self._disk is None:
            return not self._arrivals
        while True:
            written = self._disk.disk.flush(max(0.0, deadline - time.monotonic()))
            self.poll()  # which gives the disk more to do, if some is left
            if self._disk.is_idle or time.monotonic() >= deadline:
                return written and self._disk.is_idle and not self._arrivals

    def close(self, timeout: float) -> None:
        """Write what is queued, `timeout` seconds at most, and end."""
        self.flush(timeout)
        self.copier.close()
        if self._disk is not None:
            self._disk.disk.close()
        self._host.tier.close()

    def device_pages_held(self) -> list[int]:
        """Pages of the device that something on its way up will be written to."""
        return [step.page for restore in self._restores for step in restore.steps]

    def nodes_held(self) -> list[int]:
        """Nodes of the index that something on its way keeps alive, as often as it does."""
        steps = [step for restore in self._restores for step in restore.steps]
        nodes = [arrival.node for arrival in self._arrivals]
        nodes += [step.node for step in steps]
        nodes += self._host.nodes_held()
        if self._disk is not None:
            nodes += self._disk.nodes_held()
        return [node for node in nodes if node]

    def stats(self) -> LowerTierStats:
        """Pages of the host by state, and what happened so far."""
        pool = self._host.pool
        page_bytes = self._host.tier.page_bytes
        return LowerTierStats(
            host_pages_total=pool.num_pages,
            host_pages_used=pool.num_used,
            host_pages_cached=pool.num_idle,
            host_pages_free=pool.num_free,
            host_evictions=pool.evictions,
            host_placement=self._host.tier.placement,
            downloaded_bytes=self.downloaded_pages * page_bytes,
            download_seconds=self.copier.download_seconds,
            uploaded_bytes=self.uploaded_pages * page_bytes,
            upload_seconds=self.copier.upload_seconds,
            skipped_pages=self.skipped_pages,
            unwritten_pages=0 if self._disk is None else self._disk.unwritten_pages,
            restores_under_way=len(self._restores),
            restores_cut=self.restores_cut,
            disk=None if self._disk is None else self._disk.disk.stats(),
        )

    def check_integrity(self) -> None:
        """Compare the pages of host and disk with the index.

        Raises:
            RuntimeError: names what does not agree.
        """
        self._host.check_integrity()
        if self._disk is not None:
            self._disk.check_integrity()
        if self.is_idle and self._host.pool.num_used:
            raise RuntimeError(
                f"The KV cache is broken: {self._host.pool.num_used} pages of the host are in use, "
                "and nothing is under way."
            )
        if self.is_idle and self.incoming:
            raise RuntimeError("The KV cache is broken: a page is expected, and nothing brings it.")

    def _advance_all(self) -> None:
        """Let all restores go on, and forget those that have ended."""
        for restore in self._restores:
            self._advance(restore)
        self._restores = [restore for restore in self._restores if not restore.ended]

    def _advance(self, restore: Restore) -> None:
        """Let a restore go on, and put things in order where it has ended."""
        was = restore.end
        restore.advance(self, self._clock())
        for step in restore.steps[restore.end : was]:
            self.incoming.pop(step.node, None)
        if restore.ended:
            self.restores_cut += restore.end < len(restore.steps)
            self._device.pool.release(
                [step.page for step in reversed(restore.steps)], keep=self._device.nodes
            )
            for step in reversed(restore.steps):
                if step.node:
                    self._index.unhold(step.node)

    def _land(self, arrival: HostArrival) -> None:
        """A page of the host is complete, or has failed."""
        failed = arrival.copy.failed
        self.downloaded_pages += not failed
        if arrival.tail is not None and not failed:
            seq, tail = arrival.tail
            self._host.keep_tail(seq, tail)
        node = arrival.node
        if node and not failed and arrival.tail is None:
            self._host.place(node, arrival.page)
            if self._disk is not None:
                self._disk.add(node, arrival.salt)
        self._host.release(arrival.page)
        if node:
            self._index.unhold(node)

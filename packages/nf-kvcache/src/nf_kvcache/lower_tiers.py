"""Host and disk below the pages of a device: what goes down, and what comes up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from nf_kvcache.copier import Copier, Event
from nf_kvcache.device_pages import DevicePages
from nf_kvcache.disk import DiskRead, DiskTier
from nf_kvcache.host_tier import HostTier
from nf_kvcache.index import PrefixIndex
from nf_kvcache.offload import HostArrival, IterationOffload, LayerOrder
from nf_kvcache.prefix_match import Tail
from nf_kvcache.restore import PendingRead, Restore, RestoreStep
from nf_kvcache.stats import LowerTierStats
from nf_kvcache.tier import Tier

_MAX_UNWRITTEN = 64
"""Pages of one path that are queued for the disk at once, the lowest included."""


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
        disk: DiskTier | None,
        copier: Copier,
        *,
        restore_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = host
        self.disk = disk
        self.copier = copier
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
        self._host_nodes: dict[int, int] = {}
        self._disk_nodes: dict[int, int] = {}
        self._arrivals: deque[HostArrival] = deque()
        self._tails: dict[str, Tail] = {}
        self._tail_owners: dict[int, str] = {}  # by page of the host
        self._writes: dict[int, int] = {}  # by slot: the page of the host that it is written from
        self._restores: list[Restore] = []
        self._draining: list[PendingRead] = []
        host.pool.on_evict = self._forget_host_page
        if disk is not None:
            self._load(disk)

    # Down

    def begin_iteration(self, pages: Sequence[int]) -> tuple[IterationOffload, list[HostArrival]]:
        """Prepare the way down of pages that an iteration is about to fill.

        Returns:
            What the owner calls for every layer; and an arrival for each of the first pages, as
            many as the host has room for. Each has to be handed to `expect` in the end.
        """
        targets = self.take_host_pages(len(pages))
        self.skipped_pages += len(pages) - len(targets)
        offload = IterationOffload(
            self._device.layers,
            list(pages[: len(targets)]),
            targets,
            host=self.host,
            copier=self.copier,
            order=self._order,
        )
        return offload, [HostArrival(offload, page) for page in targets]

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
        targets = self.take_host_pages(len(sources))
        if not targets:
            return
        download = self.copier.download(
            self._device.layers,
            sources[: len(targets)],
            [self.host.page(target) for target in targets],
        )
        self._order.read_by(download.source_read)
        for (full, _), target in zip(missing, targets, strict=False):
            self.expect(HostArrival(download.done, target), full, salt)
        if len(targets) > len(missing):
            kept = Tail(node, tokens, targets[-1])
            self.expect(HostArrival(download.done, targets[-1], tail=(seq, kept)), node, salt)

    def tail_of(self, seq: str) -> Tail | None:
        """What is kept of a preempted sequence beyond its full pages."""
        for arrival in self._arrivals:
            if arrival.tail is not None and arrival.tail[0] == seq:
                arrival.copy.wait()  # a copy in memory, which takes milliseconds
                self.poll()
                break
        return self._tails.get(seq)

    def forget_preempted(self, seq: str) -> None:
        """Drop what is kept for the return of a preempted sequence alone."""
        if self.tail_of(seq) is not None:
            self._forget_tail(seq)

    # Up

    def restore(self, seq: str, steps: list[RestoreStep]) -> Restore:
        """Begin to bring pages up for `seq`; their pages of the device are its own already."""
        self.host.pool.hold(step.host for step in steps if step.ready)
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
        if self._restores and self.disk is not None:
            self.disk.wait(timeout)

    # What a restore asks (`RestoreDevices`)

    def take_host_pages(self, count: int) -> list[int]:
        """Take up to `count` pages of the host; what they held is forgotten."""
        pool = self.host.pool
        return pool.take(min(count, pool.num_free + pool.num_idle))

    def start_read(self, steps: Sequence[RestoreStep]) -> DiskRead:
        """Read slots of the disk into pages of the host."""
        if self.disk is None:
            raise RuntimeError("A page is on disk, but there is no disk tier.")
        return self.disk.read(
            [step.slot for step in steps], [self.host.slot(step.host) for step in steps]
        )

    def start_upload(self, steps: Sequence[RestoreStep]) -> Event:
        """Copy pages of the host to the device."""
        return self.copier.upload(
            self._device.layers,
            [step.page for step in steps],
            [self.host.page(step.host) for step in steps],
        )

    def landed(self, step: RestoreStep) -> None:
        """A page that was read is on the host now."""
        self._place_on_host(step.node, step.host)

    def arrived(self, step: RestoreStep) -> None:
        """A page is on the device now."""
        self.uploaded_pages += 1
        if step.node:
            self._device.place(step.node, step.page)
            self.incoming.pop(step.node, None)
        elif step.host in self._tail_owners:  # a tail serves once
            self._end_tail(step.host)
        self.dropped(step)

    def dropped(self, step: RestoreStep) -> None:
        """A page of the host that was taken or held for a step is not needed any more."""
        self._release_host_page(step.host)

    def drain(self, pending: PendingRead) -> None:
        """Give back the pages of the host of a read, once it has ended."""
        self._draining.append(pending)

    # Keeping up

    def poll(self) -> None:
        """Take notice of everything that has happened since the last call."""
        while self._arrivals and self._arrivals[0].copy.done:
            self._land(self._arrivals.popleft())
        if self.disk is not None:
            events = self.disk.poll()
            for slot in events.written:
                self._release_host_page(self._writes.pop(slot))
            for slot in events.failed:
                self._release_host_page(self._writes.pop(slot))
                self._forget_slot(slot)
            for slot in events.evicted:
                self._forget_slot(slot)
        self._advance_all()
        for pending in [pending for pending in self._draining if pending.read.done]:
            self._draining.remove(pending)
            for step in pending.steps:
                self._release_host_page(step.host)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._arrivals or self._writes or self._restores or self._draining)

    def touch(self, nodes: Sequence[int]) -> None:
        """Count pages of a path as used now, in the lower tiers too."""
        for node in reversed(nodes):
            page = self._index.page(node, Tier.HOST)
            if page >= 0:
                self.host.pool.touch(page)
        if self.disk is not None:
            slots = [self._index.page(node, Tier.DISK) for node in nodes]
            self.disk.touch([slot for slot in slots if slot >= 0 and slot not in self._writes])

    def flush(self, timeout: float) -> bool:
        """Wait until everything that goes down has come there; False if that takes too long."""
        deadline = time.monotonic() + timeout
        for arrival in self._arrivals:
            arrival.copy.wait(max(0.0, deadline - time.monotonic()))
        self.poll()
        written = self.disk is None or self.disk.flush(max(0.0, deadline - time.monotonic()))
        self.poll()
        return written and not self._arrivals

    def close(self, timeout: float) -> None:
        """Write what is queued, `timeout` seconds at most, and end."""
        self.flush(timeout)
        self.copier.close()
        if self.disk is not None:
            self.disk.close()
        self.host.close()

    def device_pages_held(self) -> list[int]:
        """Pages of the device that something on its way up will be written to."""
        return [step.page for restore in self._restores for step in restore.steps]

    def nodes_held(self) -> list[int]:
        """Nodes of the index that something on its way keeps alive, as often as it does."""
        steps = [step for restore in self._restores for step in restore.steps]
        nodes = [arrival.node for arrival in self._arrivals]
        nodes += [step.node for step in steps]
        nodes += [tail.node for tail in self._tails.values()]
        return [node for node in nodes if node]

    def stats(self) -> LowerTierStats:
        """Pages of the host by state, and what happened so far."""
        pool = self.host.pool
        page_bytes = self.host.page_bytes
        return LowerTierStats(
            host_pages_total=pool.num_pages,
            host_pages_used=pool.num_used,
            host_pages_cached=pool.num_idle,
            host_pages_free=pool.num_free,
            host_evictions=pool.evictions,
            host_placement=self.host.placement,
            downloaded_bytes=self.downloaded_pages * page_bytes,
            download_seconds=self.copier.download_seconds,
            uploaded_bytes=self.uploaded_pages * page_bytes,
            upload_seconds=self.copier.upload_seconds,
            skipped_pages=self.skipped_pages,
            restores_under_way=len(self._restores),
            restores_cut=self.restores_cut,
            disk=None if self.disk is None else self.disk.stats(),
        )

    def check_integrity(self) -> None:
        """Compare the pages of host and disk with the index.

        Raises:
            RuntimeError: names what does not agree.
        """
        self.host.pool.check_integrity()
        for tier, nodes in ((Tier.HOST, self._host_nodes), (Tier.DISK, self._disk_nodes)):
            for page, node in nodes.items():
                if not self._index.is_alive(node) or self._index.page(node, tier) != page:
                    raise RuntimeError(
                        f"The KV cache is broken: page {page} of the {tier.label} is not what its "
                        "prefix says."
                    )
        if self.is_idle and self.host.pool.num_used:
            raise RuntimeError(
                f"The KV cache is broken: {self.host.pool.num_used} pages of the host are in use, "
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
            self._forget_tail(seq)
            self._tails[seq] = tail
            self._tail_owners[tail.page] = seq
            self._index.hold(tail.node)
        node = arrival.node
        if node and not failed and arrival.tail is None:
            self._place_on_host(node, arrival.page)
            self._write(node, arrival.salt)
        self._release_host_page(arrival.page)
        if node:
            self._index.unhold(node)

    def _write(self, node: int, salt: bytes) -> None:
        """Queue a page of the host for the disk, after those before it that are missing there."""
        if self.disk is None:
            return
        path: list[tuple[int, int]] = []
        top = node
        while (above := self._index.parent(top)) and self._index.page(top, Tier.DISK) < 0:
            page = self._index.page(top, Tier.HOST)
            if page < 0 or len(path) == _MAX_UNWRITTEN:
                return
            path.append((top, page))
            top = above
        slot = self._index.page(top, Tier.DISK) if above else -1
        for node, page in reversed(path):
            written = self.disk.write(slot, salt, self._index.tokens(node), self.host.slot(page))
            if written is None:
                return
            slot = written
            self.host.pool.hold([page])
            self._writes[slot] = page
            self._index.place(node, Tier.DISK, slot)
            self._disk_nodes[slot] = node

    def _place_on_host(self, node: int, page: int) -> None:
        if self._index.page(node, Tier.HOST) < 0:
            self._index.place(node, Tier.HOST, page)
            self._host_nodes[page] = node

    def _release_host_page(self, page: int) -> None:
        keep = page in self._host_nodes or page in self._tail_owners
        self.host.pool.release([page], keep=(page,) if keep else ())

    def _forget_host_page(self, page: int) -> None:
        """A page of the host is about to hold something else."""
        node = self._host_nodes.pop(page, None)
        if node is not None:
            self._index.displace(node, Tier.HOST)
        if page in self._tail_owners:
            self._end_tail(page)

    def _forget_tail(self, seq: str) -> None:
        """Drop what is kept of an earlier preemption."""
        tail = self._tails.get(seq)
        if tail is not None:
            self._end_tail(tail.page)
            self.host.pool.discard(tail.page)

    def _end_tail(self, page: int) -> None:
        """Forget the tail in a page of the host."""
        tail = self._tails.pop(self._tail_owners.pop(page))
        self._index.unhold(tail.node)

    def _forget_slot(self, slot: int) -> None:
        """A slot of the disk holds its page no more."""
        self._index.displace(self._disk_nodes.pop(slot), Tier.DISK)

    def _load(self, disk: DiskTier) -> None:
        """Enter into the index what an earlier process has left on disk."""
        for stored in disk.pages():
            above = (
                self._index.root(stored.salt)
                if stored.parent_slot < 0
                else self._disk_nodes[stored.parent_slot]
            )
            node = self._index.extend(above, stored.tokens)
            self._index.place(node, Tier.DISK, stored.slot)
            self._disk_nodes[stored.slot] = node

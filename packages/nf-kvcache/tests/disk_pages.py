"""Pages whose content follows from their tokens, and a tier to keep them, for tests.

Run as a program it is a process that writes such pages until it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nf_kvcache.disk import BlockIO, BlockRequest, DiskTier, ThreadIO, UringIO, aligned_buffers
from nf_kvcache.disk.capacity import Capacity
from nf_kvcache.disk.format import Meta
from nf_kvcache.fingerprint import Fingerprint

PAGE_SIZE = 4
PAGE_BYTES = (
    4 * 2 * 2 * 2 * PAGE_SIZE * 56
)  # float32, 2 layers, K and V, 2 heads; two blocks, nearly
FINGERPRINT = Fingerprint(
    weights="w0",
    dtype="float32",
    page_size=PAGE_SIZE,
    num_layers=2,
    num_kv_heads=2,
    head_dim=56,
    rope="r0",
)
META = Meta.of(FINGERPRINT, PAGE_BYTES)

Prefix = tuple[bytes, tuple[int, ...]]  # salt, and a number per page


def room_for(num_slots: int) -> int:
    """max_bytes for so many slots."""
    return Capacity.of(num_slots, META).total_bytes


def open_tier(directory: Path, num_slots: int = 64, **options: Any) -> DiskTier:
    return DiskTier(
        directory,
        FINGERPRINT,
        page_bytes=PAGE_BYTES,
        page_size=PAGE_SIZE,
        max_bytes=room_for(num_slots),
        **options,
    )


def tokens_of(number: int) -> npt.NDArray[np.int32]:
    return np.arange(PAGE_SIZE, dtype=np.int32) + 1000 * number


def content(prefix: Prefix) -> npt.NDArray[np.uint8]:
    """The only right bytes of the last page of a prefix: uint8 [slot_bytes], aligned."""
    salt, numbers = prefix
    data = aligned_buffers(1, META.slot_bytes)[0]
    seed = np.random.SeedSequence([*salt, 256, *numbers])
    data[:] = np.random.default_rng(seed).integers(0, 256, META.slot_bytes, dtype=np.uint8)
    return data


class Owner:
    """Does what the owner of a tier does, and knows which prefix is in which slot."""

    def __init__(self, tier: DiskTier) -> None:
        self.tier = tier
        self.slots: dict[Prefix, int] = {}  # on the disk
        self.queued: dict[int, Prefix] = {}
        self.lent: dict[int, npt.NDArray[np.uint8]] = {}
        self.evicted: list[Prefix] = []
        self.failed: list[Prefix] = []
        prefix_by_slot: dict[int, Prefix] = {}
        for page in tier.pages():
            number, rest = divmod(int(page.tokens[0]), 1000)
            assert rest == 0
            assert np.array_equal(page.tokens, tokens_of(number))
            before = (page.salt, ()) if page.parent_slot < 0 else prefix_by_slot[page.parent_slot]
            assert before[0] == page.salt
            prefix_by_slot[page.slot] = prefix = (page.salt, (*before[1], number))
            assert prefix not in self.slots
            self.slots[prefix] = page.slot

    def write(self, prefix: Prefix) -> int | None:
        salt, numbers = prefix
        parent = -1
        if len(numbers) > 1:
            before = (salt, numbers[:-1])
            queued = [slot for slot, other in self.queued.items() if other == before]
            parent = queued[0] if queued else self.slots[before]
        data = content(prefix)
        slot = self.tier.write(parent, salt, tokens_of(numbers[-1]), data)
        if slot is not None:
            assert slot not in self.queued
            assert slot not in self.slots.values()
            self.queued[slot] = prefix
            self.lent[slot] = data
        return slot

    def write_path(self, salt: bytes, numbers: Sequence[int]) -> list[int | None]:
        """Write a conversation, as far as its pages are accepted; those there are stay."""
        slots: list[int | None] = []
        for stop in range(1, len(numbers) + 1):
            prefix = (salt, tuple(numbers[:stop]))
            if prefix not in self.slots:
                slots.append(self.write(prefix))
                if slots[-1] is None:
                    break
        return slots

    def poll(self) -> list[Prefix]:
        """Take note of what happened; what is on the disk since."""
        events = self.tier.poll()
        reported = [*events.written, *events.failed, *events.evicted]
        assert len(set(reported)) == len(reported)
        for slot in events.written:
            del self.lent[slot]
            self.slots[self.queued.pop(slot)] = slot
        for slot in events.failed:
            del self.lent[slot]
            self.failed.append(self.queued.pop(slot))
        prefix_by_slot = {slot: prefix for prefix, slot in self.slots.items()}
        for slot in events.evicted:
            prefix = prefix_by_slot[slot]
            self.evicted.append(prefix)
            del self.slots[prefix]
        for salt, numbers in self.slots:
            assert len(numbers) == 1 or (salt, numbers[:-1]) in self.slots, "not prefix-closed"
        return [prefix for prefix, slot in self.slots.items() if slot in set(events.written)]

    def settle(self, timeout: float = 10.0) -> None:
        """Until nothing is queued any more."""
        deadline = time.monotonic() + timeout
        while self.queued and time.monotonic() < deadline:
            self.tier.wait(0.1)
            self.poll()
        assert not self.queued

    def flush(self) -> bool:
        is_clean = self.tier.flush(10)
        self.poll()
        return is_clean

    def read(self, prefixes: Sequence[Prefix]) -> int:
        """Read pages, compare what came with what is right, and say how many came."""
        buffers = aligned_buffers(len(prefixes), META.slot_bytes)
        read = self.tier.read([self.slots[prefix] for prefix in prefixes], list(buffers))
        deadline = time.monotonic() + 10
        while not read.done and time.monotonic() < deadline:
            self.tier.wait(0.1)
            self.poll()
        assert read.done
        self.poll()
        for prefix, buffer in zip(prefixes[: read.num_good], buffers, strict=False):
            expected = content(prefix)[:PAGE_BYTES]
            assert np.array_equal(buffer[:PAGE_BYTES], expected), "a page of something else"
        return read.num_good

    def read_each(self) -> tuple[int, int]:
        """Read all pages, one by one: how many came intact, and how many did not.

        What goes meanwhile, because room is made or what it builds on is damaged, is neither.
        """
        results = [self.read([prefix]) for prefix in sorted(self.slots) if prefix in self.slots]
        return sum(results), len(results) - sum(results)


class FaultyIO:
    """A `BlockIO` that fails, waits or kills its process on request."""

    name = "faulty"

    def __init__(self) -> None:
        self._io: BlockIO = ThreadIO()
        self.write_error = 0
        self.read_error = 0
        self.sync_error = 0
        self.delay = 0.0
        self.writes_until_kill: int | None = None
        self.syncs_until_kill: int | None = None

    def read_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        time.sleep(self.delay)
        if self.read_error:
            return [self.read_error] * len(requests)
        return self._io.read_many(requests)

    def write_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        time.sleep(self.delay)
        if self.write_error:
            return [self.write_error] * len(requests)
        if self.writes_until_kill is not None:
            for request in requests:
                self.writes_until_kill -= 1
                if self.writes_until_kill < 0:
                    os.pwrite(request.fd, aligned_half(request), request.offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                self._io.write_many([request])
            return [0] * len(requests)
        return self._io.write_many(requests)

    def sync(self, fd: int) -> int:
        if self.syncs_until_kill is not None:
            self.syncs_until_kill -= 1
            if self.syncs_until_kill < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.sync_error or self._io.sync(fd)

    def close(self) -> None:
        self._io.close()


def aligned_half(request: BlockRequest) -> memoryview:
    """The first blocks of a page, so that it is torn; of a page of one block, its bytes mixed."""
    half = len(request.buffer) // 2 // 4096 * 4096
    if half:
        return request.buffer.data[:half]
    torn = aligned_buffers(1, len(request.buffer))[0]
    torn[: len(torn) // 2] = request.buffer[: len(torn) // 2]
    return torn.data


def main(directory: str, num_slots: str, writes: str, syncs: str, io_name: str) -> None:
    """Write pages for ever. A line for each that is there (+) or no more (-): seconds, prefix."""
    faulty = FaultyIO()
    faulty.writes_until_kill = int(writes) if writes else None
    faulty.syncs_until_kill = int(syncs) if syncs else None
    io = {"faulty": lambda: faulty, "io_uring": UringIO, "threads": ThreadIO}[io_name]()
    owner = Owner(open_tier(Path(directory), int(num_slots), io=io))
    conversation = max((numbers[0] for _, numbers in owner.slots), default=-1)
    while True:
        conversation += 1
        owner.write_path(b"salt", [conversation, 1, 2, 3])
        time.sleep(0.01)
        lines = [("+", prefix) for prefix in owner.poll()]
        lines += [("-", prefix) for prefix in owner.evicted]
        owner.evicted = []
        for sign, (salt, numbers) in lines:
            print(sign, time.monotonic(), salt.decode(), *numbers)
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

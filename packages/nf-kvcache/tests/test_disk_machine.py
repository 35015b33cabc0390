"""Random operations on a DiskTier over real files, against a dict of what has to be there."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

from disk_pages import META, FaultyIO, Owner, Prefix, open_tier, room_for
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

NUM_SLOTS = 12
numbers = st.integers(0, 2)
# What is there depends on threads; what is drawn must not.
indices = st.integers(0, 999)


class DiskTierMachine(RuleBasedStateMachine):
    """`Owner` checks each page that is read, that the set stays prefix-closed, and each report."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="kv-disk-"))
        self.damaged: set[Prefix] = set()

    @initialize()
    def open(self) -> None:
        self.io = FaultyIO()
        tier = open_tier(
            self.directory, NUM_SLOTS, io=self.io, max_queued_pages=6, retry_seconds=0.0
        )
        self.owner = Owner(tier)

    def pick(self, index: int) -> Prefix:
        prefixes = sorted(self.owner.slots)
        return prefixes[index % len(prefixes)]

    @rule(salt=st.sampled_from([b"", b"a"]), path=st.lists(numbers, min_size=1, max_size=6))
    def write(self, salt: bytes, path: list[int]) -> None:
        before = len(self.owner.queued)
        for stop in range(1, len(path) + 1):
            prefix = (salt, tuple(path[:stop]))
            if prefix in self.owner.slots or prefix in self.owner.queued.values():
                continue
            if self.owner.write(prefix) is None:
                event("write dropped")
                break
        assert len(self.owner.queued) <= max(6, before)

    @rule()
    def poll(self) -> None:
        self.owner.poll()

    @rule()
    def settle(self) -> None:
        self.owner.settle()
        self.damaged &= set(self.owner.slots)

    @rule(index=indices)
    def read(self, index: int) -> None:
        if not self.owner.slots:
            return
        salt, path = self.pick(index)
        prefixes = [(salt, path[: i + 1]) for i in range(len(path))]
        intact = next(
            (i for i, prefix in enumerate(prefixes) if prefix in self.damaged), len(prefixes)
        )
        assert self.owner.read(prefixes) == intact
        if intact < len(prefixes):
            event("damage found")
            assert prefixes[intact] not in self.owner.slots
        self.damaged &= set(self.owner.slots)

    @rule(index=indices)
    def touch(self, index: int) -> None:
        if not self.owner.slots:
            return
        salt, path = self.pick(index)
        path_slots = [self.owner.slots[(salt, path[: i + 1])] for i in range(len(path))]
        self.owner.tier.touch(path_slots)

    @rule(index=indices, offset=st.integers(0, META.page_bytes - 1))
    def damage(self, index: int, offset: int) -> None:
        if not self.owner.slots or self.pick(index) in self.damaged:
            return
        prefix = self.pick(index)
        (file,) = self.owner.tier._directory.path.glob("segment-*.kv")
        with open(file, "r+b") as segment:
            segment.seek(self.owner.slots[prefix] * META.slot_bytes + offset)
            (byte,) = segment.read(1)
            segment.seek(-1, 1)
            segment.write(bytes([byte ^ 1]))
        self.damaged.add(prefix)

    @rule(error=st.sampled_from([0, 0, 0, errno.EIO]))
    def fail_writes(self, error: int) -> None:
        self.io.write_error = error

    @rule()
    def restart(self) -> None:
        self.owner.settle()
        assert self.owner.flush()
        before = set(self.owner.slots)
        self.owner.tier.close()
        self.open()
        after = set(self.owner.slots)
        assert after == before
        self.damaged &= after
        event("restarted with pages" if after else "restarted empty")

    def teardown(self) -> None:
        if hasattr(self, "owner"):
            if self.owner.tier.stats().evictions:
                event("evicted")
            self.owner.settle()
            self.damaged &= set(self.owner.slots)
            for prefix in sorted(set(self.owner.slots) - self.damaged):
                if prefix in self.owner.slots:
                    assert self.owner.read([prefix]) == 1
            size = sum(file.stat().st_size for file in self.owner.tier._directory.path.iterdir())
            assert size <= room_for(NUM_SLOTS)
            self.owner.tier.close()
        shutil.rmtree(self.directory)


TestDiskTierMachine = DiskTierMachine.TestCase
TestDiskTierMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)

"""Random operations on a cache with lower tiers, whose copies and whose disk fail now and then."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from disk_pages import FaultyIO
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from toy_kv_engine import LAYOUT, PAGE, ToyEngine

from nf_kvcache import KVCache
from nf_kvcache.copier import CpuCopier
from nf_kvcache.disk import DiskTier
from nf_kvcache.disk.capacity import Capacity
from nf_kvcache.disk.format import Meta
from nf_kvcache.fingerprint import Fingerprint

NUM_PAGES = 7
FINGERPRINT = Fingerprint(
    weights="w",
    dtype="float32",
    page_size=LAYOUT.page_size,
    num_layers=LAYOUT.num_layers,
    num_kv_heads=LAYOUT.num_kv_heads,
    head_dim=LAYOUT.head_dim,
    rope="none",
)
places = st.integers(0, 1 << 20)  # in a file
picks = st.integers(0, 99).map(lambda n: lambda names: sorted(names)[n % len(names)])


class UnreliableCopier(CpuCopier):
    """Copies to the device that fail for a while."""

    fails = False

    def upload(self, layers, pages, sources):
        if self.fails:
            return self._thread.submit(lambda: 1 / 0)
        return super().upload(layers, pages, sources)


class TiersMachine(RuleBasedStateMachine):
    """Sequences begin, grow, fork, give way, come back and end; every number is looked at.

    The model is the toy engine: whatever a sequence finds has to be what was written for exactly
    its tokens. Copies end when they like, and now and then one fails.
    """

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self):
        super().__init__()
        self.count = 0
        self.preempted: dict[str, list[int]] = {}
        self.open()

    def open(self, **options) -> None:
        self.copier = UnreliableCopier()
        cache = KVCache(
            LAYOUT,
            NUM_PAGES,
            host_bytes=6 * PAGE,
            copier=self.copier,
            restore_seconds=20,
            **options,
        )
        self.engine = ToyEngine(cache)

    def name(self) -> str:
        self.count += 1
        return f"s{self.count}"

    def grow(self, seq: str, tokens: list[int]) -> bool:
        cache = self.engine.cache
        total = len(self.engine.tokens[seq]) + len(tokens)
        if not cache.can_reserve(seq, total):
            return False
        cache.reserve(seq, total)
        self.engine.run((seq, tokens))
        return True

    @rule(text=st.integers(0, 2), length=st.integers(2, 17))
    def begin(self, text, length):
        tokens = [text if i > 2 * text else 9 for i in range(length)]
        self.start(self.name(), tokens, resume=False)

    @rule(text=st.integers(0, 2), length=st.integers(5, 17))
    def come_and_go(self, text, length):
        """A sequence from beginning to end, so that there is something to find."""
        seq = self.name()
        if self.start(seq, [text if i > 2 * text else 9 for i in range(length)], resume=False):
            self.engine.end(seq)
            self.engine.cache.flush(20)

    def start(self, seq: str, tokens: list[int], *, resume: bool) -> bool:
        cache = self.engine.cache
        match = cache.match(np.array(tokens[:-1], np.int32), seq=seq if resume else "")
        if not cache.can_reserve(seq, len(tokens), match):
            return False
        self.seen["from disk"] += match.tokens_by_tier.get("disk", 0) > 0
        found = self.engine.start(seq, tokens, resume=resume)
        self.seen["tail"] += found % LAYOUT.page_size > 0
        self.seen["short"] += found < match.num_tokens
        self.engine.run((seq, tokens[found:]))
        return True

    @precondition(lambda self: self.engine.tokens)
    @rule(pick=picks, more=st.integers(1, 6), token=st.integers(0, 2))
    def append(self, pick, more, token):
        self.grow(pick(self.engine.tokens), [token] * more)

    @precondition(lambda self: self.engine.tokens)
    @rule(pick=picks)
    def fork(self, pick):
        seq, child = pick(self.engine.tokens), self.name()
        self.engine.cache.fork(seq, child)
        self.engine.tokens[child] = list(self.engine.tokens[seq])
        self.seen["fork"] += 1

    @precondition(lambda self: self.engine.tokens)
    @rule(pick=picks)
    def preempt(self, pick):
        seq = pick(self.engine.tokens)
        self.engine.check(seq)
        self.engine.cache.preempt(seq)
        self.preempted[seq] = self.engine.tokens.pop(seq)

    @precondition(lambda self: self.preempted)
    @rule(pick=picks, extra=st.integers(1, 3))
    def come_back(self, pick, extra):
        seq = pick(self.preempted)
        if self.start(seq, self.preempted[seq] + [1] * extra, resume=True):
            del self.preempted[seq]

    @precondition(lambda self: self.preempted)
    @rule(pick=picks)
    def end_while_preempted(self, pick):
        seq = pick(self.preempted)
        self.engine.cache.release(seq)
        del self.preempted[seq]
        with pytest.raises(KeyError, match="released before"):
            self.engine.cache.release(seq)

    @precondition(lambda self: self.engine.tokens)
    @rule(pick=picks)
    def end(self, pick):
        self.engine.end(pick(self.engine.tokens))

    @precondition(lambda self: self.engine.tokens)
    @rule(pick=picks, tokens=st.integers(1, 9))
    def fail_an_iteration(self, pick, tokens):
        """What an iteration that fails has copied is not found later."""
        seq = pick(self.engine.tokens)
        cache = self.engine.cache
        total = len(self.engine.tokens[seq]) + tokens
        if cache.can_reserve(seq, total):
            cache.reserve(seq, total)
            offload = cache.begin_iteration([seq], np.array([total - tokens]), np.array([tokens]))
            offload.before_append(0)
            offload.after_append(0)
            offload.abandon()
            cache.release(seq)
            del self.engine.tokens[seq]

    @rule(fails=st.booleans())
    def copies_fail(self, fails):
        self.copier.fails = fails

    @rule()
    def flush(self):
        assert self.engine.cache.flush(20)

    @invariant()
    def nothing_is_lost(self):
        self.engine.cache.check_integrity()

    def end_all(self) -> None:
        """End all sequences, and see that nothing is in use."""
        for seq in list(self.engine.tokens):
            self.engine.end(seq)
        for seq in list(self.preempted):
            self.engine.cache.release(seq)
            del self.preempted[seq]
        deadline = time.monotonic() + 20
        while self.engine.cache.poll():
            assert time.monotonic() < deadline, "something is under way for ever"
            self.engine.cache.flush(0.1)
        self.engine.cache.check_integrity()
        stats = self.engine.cache.stats()
        assert stats.pages_used == 0
        assert stats.lower.host_pages_used == 0
        self.seen["upload"] += stats.lower.uploaded_bytes > 0
        self.seen["eviction"] += stats.lower.host_evictions > 0

    def teardown(self):
        self.end_all()
        self.engine.cache.close()


class DiskMachine(TiersMachine):
    """The same with a disk that refuses, forgets and lies, and with restarts."""

    def __init__(self):
        self.directory = Path(tempfile.mkdtemp(prefix="kv-tiers-"))
        super().__init__()

    def open(self) -> None:
        self.io = FaultyIO()
        disk = DiskTier(
            self.directory,
            FINGERPRINT,
            page_bytes=LAYOUT.bytes_per_page,
            page_size=LAYOUT.page_size,
            max_bytes=Capacity.of(9, Meta.of(FINGERPRINT, LAYOUT.bytes_per_page)).total_bytes,
            max_queued_pages=4,
            retry_seconds=0.02,
            io=self.io,
        )
        super().open(disk=disk)

    @rule()
    def flush(self):
        self.engine.cache.flush(20)  # False where the disk refuses

    @rule()
    def restart(self):
        self.end_all()
        lower = self.engine.cache.stats().lower
        self.seen["damage"] += lower.disk.pages_damaged > 0
        self.seen["disk eviction"] += lower.disk.evictions > 0
        self.engine.cache.close()
        self.open()
        self.seen["warm"] += self.engine.cache.stats().lower.disk.pages_found > 0

    @rule(what=st.sampled_from(["writes", "reads", "bit", "file", "nothing", "nothing"]), at=places)
    def break_the_disk(self, what, at):
        self.io.write_error = (errno.EIO, errno.ENOSPC)[at % 2] if what == "writes" else 0
        self.io.read_error = errno.EIO if what == "reads" else 0
        for path in self.directory.rglob("segment-*.kv"):
            if what == "file":
                path.unlink()
            elif what == "bit":
                with open(path, "r+b") as file:
                    file.seek(at % path.stat().st_size)
                    (byte,) = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte ^ 4]))

    def teardown(self):
        super().teardown()
        shutil.rmtree(self.directory)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (TiersMachine, ("upload", "tail", "short", "fork", "eviction")),
        (
            DiskMachine,
            ("upload", "short", "eviction", "from disk", "damage", "warm", "disk eviction"),
        ),
    ],
)
def test_random_operations_lose_nothing_and_mix_nothing_up(machine, expected):
    machine.seen = Counter()
    for _ in range(6):  # until everything has happened that is to be seen
        run_state_machine_as_test(
            machine,
            settings=settings(max_examples=60, stateful_step_count=40, deadline=None),
        )
        if all(machine.seen[what] > 0 for what in expected):
            return
    pytest.fail(f"not all of {expected} happened: {machine.seen}")

"""What a DiskTier promises when nothing goes wrong."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_pages import (
    FINGERPRINT,
    META,
    PAGE_BYTES,
    PAGE_SIZE,
    FaultyIO,
    Owner,
    content,
    open_tier,
    room_for,
    tokens_of,
)

from nf_kvcache.disk import CacheInUse, DiskTier, ThreadIO, UringIO, aligned_buffers

Open = Callable[..., Owner]


@pytest.fixture
def open_owner(tmp_path: Path) -> Iterator[Open]:
    tiers: list[DiskTier] = []

    def open_owner(num_slots: int = 64, directory: Path = tmp_path, **options: Any) -> Owner:
        tiers.append(open_tier(directory, num_slots, **options))
        return Owner(tiers[-1])

    yield open_owner
    for tier in tiers:
        tier.close()


def path_of(*numbers: int, salt: bytes = b"") -> list[tuple[bytes, tuple[int, ...]]]:
    return [(salt, numbers[: i + 1]) for i in range(len(numbers))]


def reopened(owner: Owner, open_owner: Open, num_slots: int = 64, **options: Any) -> Owner:
    owner.tier.close()
    owner.tier.close = lambda: None  # type: ignore[method-assign]
    return open_owner(num_slots, **options)


@pytest.mark.parametrize("make_io", [ThreadIO, UringIO])
def test_what_was_written_is_read_also_by_the_next_process(
    open_owner: Open, make_io: type[ThreadIO | UringIO]
) -> None:
    try:
        io = make_io()
    except (ImportError, OSError) as error:
        pytest.skip(f"no io_uring here: {error}")
    owner = open_owner(io=io)
    owner.write_path(b"a", [1, 2, 3])
    owner.write_path(b"b", [1, 2])
    owner.settle()
    assert owner.read(path_of(1, 2, 3, salt=b"a")) == 3
    assert owner.read(path_of(1, 2, salt=b"b")) == 2
    stats = owner.tier.stats()
    assert (stats.io, stats.pages_written, stats.pages_read) == (io.name, 5, 5)
    assert stats.bytes_written == stats.bytes_read == 5 * META.slot_bytes

    owner = reopened(owner, open_owner)
    assert set(owner.slots) == {*path_of(1, 2, 3, salt=b"a"), *path_of(1, 2, salt=b"b")}
    assert owner.read_each() == (5, 0)
    assert owner.tier.stats().pages_found == 5
    owner.write((b"a", (1, 2, 3, 4)))
    owner.settle()
    assert reopened(owner, open_owner).read_each() == (6, 0)


def test_padding_is_neither_checked_nor_returned_as_content(open_owner: Open) -> None:
    owner = open_owner()
    slot = owner.write((b"", (1,)))
    assert slot is not None
    owner.settle()
    (file,) = owner.tier._directory.path.glob("segment-*.kv")
    with open(file, "r+b") as segment:
        segment.seek(slot * META.slot_bytes + PAGE_BYTES)
        segment.write(b"\xff" * (META.slot_bytes - PAGE_BYTES))
    assert owner.read(path_of(1)) == 1


def test_the_least_recently_used_page_that_nothing_builds_on_is_evicted(open_owner: Open) -> None:
    owner = open_owner(16)
    for number in range(5):
        owner.write_path(b"", [number, 1, 2])  # 15 of 16 slots
        owner.settle()
    assert owner.evicted == []
    owner.tier.touch([owner.slots[prefix] for prefix in path_of(0, 1, 2)])
    owner.write((b"", (9,)))
    owner.settle()
    assert owner.evicted == [(b"", (1, 1, 2))]
    for number in range(10, 14):
        owner.write((b"", (number,)))
        owner.settle()
    # One conversation after the other, from its end; what was touched stays to the last.
    assert owner.evicted == [
        (b"", (1, 1, 2)),
        (b"", (1, 1)),
        (b"", (1,)),
        (b"", (2, 1, 2)),
        (b"", (2, 1)),
    ]
    assert owner.tier.stats().evictions == 5
    assert owner.read_each() == (15, 0)


def test_what_was_used_last_is_known_after_a_restart(open_owner: Open) -> None:
    owner = open_owner(16)
    for number in range(15):
        owner.write((b"", (number,)))
    owner.settle()
    owner.tier.touch([owner.slots[(b"", (0,))]])
    owner = reopened(owner, open_owner, 16)
    owner.write((b"", (99,)))
    owner.settle()
    assert owner.evicted == [(b"", (1,))]


def test_pages_that_are_read_are_not_evicted(open_owner: Open) -> None:
    io = FaultyIO()
    owner = open_owner(16, io=io)
    for number in range(15):
        owner.write((b"", (number,)))
    owner.settle()
    io.delay = 0.3
    oldest = path_of(0)[0]
    slot = owner.slots[oldest]
    (buffer,) = aligned_buffers(1, META.slot_bytes)
    read = owner.tier.read([slot], [buffer])
    owner.write((b"", (20,)))
    assert not read.done
    owner.settle()
    assert owner.evicted == [(b"", (1,))]
    while not read.done:
        owner.tier.wait(1)
        owner.poll()
    assert read.num_good == 1
    assert np.array_equal(buffer[:PAGE_BYTES], content(oldest)[:PAGE_BYTES])


def test_a_cancelled_read_ends_and_lets_go_of_its_pages(open_owner: Open) -> None:
    io = FaultyIO()
    owner = open_owner(128, io=io, max_queued_pages=128)
    numbers = list(range(100))
    owner.write_path(b"", numbers)
    owner.settle()
    io.delay = 0.05
    buffers = aligned_buffers(100, META.slot_bytes)
    read = owner.tier.read([owner.slots[p] for p in path_of(*numbers)], list(buffers))
    read.cancel()
    while not read.done:
        owner.tier.wait(1)
    assert read.num_good <= 64
    owner.poll()
    io.delay = 0
    for number in range(200, 320):  # every page of the first conversation can go
        owner.write((b"", (number,)))
        owner.settle()
    assert path_of(0)[0] in owner.evicted


def test_what_cannot_be_taken_is_dropped_and_counted(open_owner: Open) -> None:
    io = FaultyIO()
    owner = open_owner(16, io=io, max_queued_pages=4)
    io.delay = 0.2
    assert owner.write_path(b"", [1, 2, 3, 4, 5]) == [0, 1, 2, 3, None]
    assert owner.tier.stats().writes_dropped == {"queue full": 1}
    io.delay = 0
    owner.settle()
    assert owner.tier.write(9, b"", tokens_of(1), content((b"", (1,)))) is None
    assert owner.tier.stats().writes_dropped == {"queue full": 1, "no parent": 1}

    # Without a poll there is nobody to tell what was evicted, and so nothing is.
    owner = open_owner(16, io=FaultyIO(), replica=1)
    slots = [owner.write((b"", (number,))) for number in range(17)]
    assert slots == [*range(16), None]
    assert owner.tier.stats().writes_dropped == {"no slot": 1}
    owner.settle()
    assert owner.write((b"", (17,))) == 0
    # The owner was told of this page and that it gave way in one breath.
    assert [*owner.failed, *owner.evicted] == [(b"", (0,))]


@pytest.mark.parametrize("num_slots", [16, 300])
def test_the_files_never_take_more_than_they_may(open_owner: Open, num_slots: int) -> None:
    owner = open_owner(num_slots)
    directory = owner.tier._directory.path
    most = 0
    for number in itertools.count():
        owner.write_path(b"", [number, *range(number % 7)])
        owner.tier.wait(0.01)
        owner.poll()
        if number % 5 == 0:
            owner.tier.touch(list(owner.slots.values()))
        most = max(most, sum(file.stat().st_size for file in directory.iterdir()))
        if owner.tier.stats().evictions > 3 * num_slots:
            break
    owner.settle()
    assert owner.tier.num_slots == num_slots
    assert num_slots * META.slot_bytes < most <= room_for(num_slots)
    assert owner.read_each()[1] == 0


def test_a_smaller_bound_gives_room_back(open_owner: Open) -> None:
    owner = open_owner(100)
    for number in range(25):
        owner.write_path(b"", [number, 1, 2, 3][: 1 + number % 4])
        owner.settle()
    owner = reopened(owner, open_owner, 20)
    assert 10 < len(owner.slots) <= 20
    assert owner.read_each()[1] == 0
    directory = owner.tier._directory.path
    assert sum(file.stat().st_size for file in directory.iterdir()) <= room_for(20)
    owner = reopened(owner, open_owner, 100)
    assert owner.read_each()[1] == 0


def test_a_second_claimant_of_the_same_directory_is_refused(
    open_owner: Open, tmp_path: Path
) -> None:
    owner = open_owner()
    with pytest.raises(CacheInUse, match=r"replica-0-rank-0 is in use by process \d+"):
        open_owner()
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        f"from disk_pages import *; open_tier(Path({str(tmp_path)!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "CacheInUse" in result.stderr
    assert str(owner.tier._directory.path) in result.stderr
    open_owner(replica=1)
    open_owner(rank=1)
    reopened(owner, open_owner)


@pytest.mark.parametrize(
    "change", [{"weights": "w1"}, {"dtype": "int32"}, {"rope": "r1"}, {"parallelism": "tp2"}]
)
def test_the_pages_of_another_model_are_left_alone(
    open_owner: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, str]
) -> None:
    owner = open_owner()
    owner.write_path(b"", [1, 2])
    owner.settle()
    owner.tier.flush(5)
    caplog.clear()
    with caplog.at_level(logging.INFO, "nf_kvcache.disk"):
        other = DiskTier(
            tmp_path,
            dataclasses.replace(FINGERPRINT, **change),
            page_bytes=PAGE_BYTES,
            page_size=PAGE_SIZE,
            max_bytes=room_for(16),
            io=ThreadIO(),
        )
    assert other.pages() == []
    other.close()
    (line,) = [r.getMessage() for r in caplog.records if "other models" in r.getMessage()]
    assert owner.tier._directory.path.parent.name in line
    assert owner.read_each() == (2, 0)


def test_pages_bypass_the_page_cache_where_the_file_system_lets_them(
    open_owner: Open, tmp_path: Path
) -> None:
    owner = open_owner()
    owner.write((b"", (1,)))
    owner.settle()
    assert owner.tier.stats().is_direct


def test_wrong_arguments_are_refused(open_owner: Open, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="page_size is 5; expected 4"):
        DiskTier(tmp_path, FINGERPRINT, page_bytes=PAGE_BYTES, page_size=5, max_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"max_bytes is 8192, .* expected at least \d+"):
        DiskTier(tmp_path, FINGERPRINT, page_bytes=PAGE_BYTES, page_size=4, max_bytes=8192)
    tier = open_owner().tier  # and what failed left no lock behind
    with pytest.raises(ValueError, match="rank is -1"):
        open_owner(rank=-1)
    data = content((b"", (1,)))
    with pytest.raises(ValueError, match="multiple of 4096"):
        tier.write(-1, b"", tokens_of(1), aligned_buffers(2, META.slot_bytes).reshape(-1)[8:8200])
    with pytest.raises(ValueError, match=r"uint8 \[100\]; expected contiguous uint8 \[8192\]"):
        tier.write(-1, b"", tokens_of(1), data[:100])
    with pytest.raises(ValueError, match=r"tokens is int64 \[4\]"):
        tier.write(-1, b"", tokens_of(1).astype(np.int64), data)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="salt has 65 bytes"):
        tier.write(-1, b"s" * 65, tokens_of(1), data)
    with pytest.raises(ValueError, match="A slot is 64; expected 0 to 63"):
        tier.write(64, b"", tokens_of(1), data)
    with pytest.raises(KeyError, match="Slot 3 holds no page"):
        tier.read([3], [data])
    with pytest.raises(KeyError, match="Slot 3 holds no page"):
        tier.touch([3])
    with pytest.raises(ValueError, match="buffers has 0 entries; expected 1"):
        tier.read([3], [])
    assert tier.read([], []).done


def test_nobody_else_may_read_the_tokens(open_owner: Open) -> None:
    path = open_owner().tier._directory.path
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0

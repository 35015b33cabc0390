"""Whatever happens to the disk: no wrong page is read, nothing is raised, and it is counted."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_pages import META, FaultyIO, Owner, content, open_tier, room_for, tokens_of

from nf_kvcache.disk import DiskTier, aligned_buffers
from nf_kvcache.disk.health import DiskHealth

Open = Callable[..., Owner]
RETRY = 0.3
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which needs root")


@pytest.fixture
def open_owner(tmp_path: Path) -> Iterator[Open]:
    tiers: list[DiskTier] = []

    def open_owner(num_slots: int = 64, directory: Path = tmp_path, **options: Any) -> Owner:
        options = {"retry_seconds": RETRY} | options
        tiers.append(open_tier(directory, num_slots, **options))
        return Owner(tiers[-1])

    yield open_owner
    for tier in tiers:
        tier.close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    mounted: list[Path] = []

    def mount(*arguments: str) -> Path:
        path = tmp_path / f"mount-{len(mounted)}"
        path.mkdir()
        command = ["mount", *arguments, str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"{' '.join(command)}: {result.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(owner: Owner, conversations: range) -> None:
    for number in conversations:
        owner.write_path(b"", [number, 1, 2])
        owner.settle()


def close(owner: Owner) -> Path:
    """Close the tier; the directory of its files."""
    owner.tier.close()
    owner.tier.close = lambda timeout=0: None  # type: ignore[method-assign]
    return owner.tier._directory.path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EACCES", "EROFS", "EMFILE"])
def test_errors_of_writes_keep_away_from_the_disk_for_a_while(
    open_owner: Open, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    io = FaultyIO()
    owner = open_owner(io=io)
    fill(owner, range(2))
    io.write_error = getattr(errno, name)
    owner.write_path(b"", [7, 1, 2])
    owner.settle()
    stats = owner.tier.stats()
    assert stats.is_degraded
    assert stats.errors[name] >= 1
    assert stats.writes_failed == 3
    assert owner.write((b"", (8,))) is None
    assert owner.tier.stats().writes_dropped == {"degraded": 1}
    assert owner.read_each() == (6, 0)  # what is there can be read

    time.sleep(RETRY)
    assert owner.write((b"", (8,))) is not None  # the next attempt, which fails as well
    owner.settle()
    assert owner.write((b"", (8,))) is None
    io.write_error = 0
    time.sleep(RETRY)
    fill(owner, range(8, 9))
    assert not owner.tier.stats().is_degraded
    first, second = warnings(caplog)  # one line for each change, not for each error
    assert os.strerror(getattr(errno, name)) in first
    assert "written again" in second
    assert close(owner)
    assert open_owner().read_each() == (9, 0)


def test_the_page_after_a_page_that_failed_fails(open_owner: Open) -> None:
    io = FaultyIO()
    owner = open_owner(io=io)
    io.delay = 0.2
    io.write_error = errno.EIO
    assert owner.write((b"", (1,))) is not None
    time.sleep(0.1)  # its write has begun
    assert owner.write((b"", (1, 2))) is not None
    time.sleep(0.15)
    io.write_error = 0
    owner.settle()
    assert owner.failed == [(b"", (1,)), (b"", (1, 2))]
    assert owner.tier.stats().pages_stored == 0
    close(owner)
    assert open_owner().slots == {}


@pytest.mark.parametrize("name", ["EIO", "EACCES", "EMFILE"])
def test_errors_of_reads_are_misses(open_owner: Open, name: str) -> None:
    io = FaultyIO()
    owner = open_owner(io=io)
    fill(owner, range(2))
    io.read_error = getattr(errno, name)
    assert owner.read([(b"", (0,)), (b"", (0, 1))]) == 0
    assert owner.tier.stats().errors == {name: 1}
    io.read_error = 0
    if name == "EIO":  # that page is gone, and what builds on it
        assert owner.evicted == [(b"", (0,)), (b"", (0, 1)), (b"", (0, 1, 2))]
        assert owner.read_each() == (3, 0)
    else:
        assert owner.evicted == []
        assert owner.read_each() == (6, 0)


def test_pages_that_cannot_be_synced_are_gone(open_owner: Open) -> None:
    io = FaultyIO()
    owner = open_owner(io=io)
    fill(owner, range(2))
    assert owner.flush()
    io.sync_error = errno.EIO
    fill(owner, range(2, 3))
    owner.flush()
    assert len(owner.evicted) == 3
    assert owner.tier.stats().errors["EIO"] >= 1
    close(owner)
    assert open_owner().read_each() == (6, 0)


@pytest.mark.parametrize("stage", ["write", "read"])
def test_errors_that_nobody_thought_of_are_not_raised_either(
    open_owner: Open, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    io = FaultyIO()
    owner = open_owner(io=io)
    fill(owner, range(1))

    def fail(requests: object) -> list[int]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(io, f"{stage}_many", fail)
    if stage == "write":
        owner.write((b"", (5,)))
        owner.settle()
        assert owner.failed == [(b"", (5,))]
    else:
        assert owner.read([(b"", (0,))]) == 0
    assert owner.tier.stats().is_degraded
    monkeypatch.undo()
    time.sleep(RETRY)
    fill(owner, range(6, 7))
    assert owner.read_each() == (6, 0)


def test_a_disk_that_stands_still_blocks_nobody(open_owner: Open) -> None:
    io = FaultyIO()
    owner = open_owner(io=io, max_queued_pages=8)
    fill(owner, range(1))
    io.delay = 1.0
    (buffer,) = aligned_buffers(1, META.slot_bytes)
    slowest = 0.0
    pages = [((b"", (100 + i,)), content((b"", (100 + i,)))) for i in range(50)]
    started = time.perf_counter()
    read = owner.tier.read([owner.slots[(b"", (0,))]], [buffer])
    for (_, numbers), data in pages:
        call_started = time.perf_counter()
        slot = owner.tier.write(-1, b"", tokens_of(numbers[-1]), data)
        owner.tier.poll()
        owner.tier.touch([owner.slots[(b"", (0,))]])
        owner.tier.stats()
        slowest = max(slowest, time.perf_counter() - call_started)
        if slot is not None:
            owner.queued[slot], owner.lent[slot] = (b"", numbers), data
    assert len(owner.queued) == 8
    assert owner.tier.stats().writes_dropped == {"queue full": 42}
    assert not read.done
    read.cancel()
    assert slowest < 0.1
    assert time.perf_counter() - started < 0.5
    io.delay = 0
    owner.settle()
    assert owner.read_each() == (11, 0)


def test_close_gives_up_on_a_disk_that_stands_still(
    open_owner: Open, caplog: pytest.LogCaptureFixture
) -> None:
    io = FaultyIO()
    owner = open_owner(io=io)
    io.delay = 1.0
    owner.write((b"", (1,)))
    time.sleep(0.1)
    started = time.perf_counter()
    owner.tier.close(timeout=0.2)
    assert time.perf_counter() - started < 0.7
    assert "what was queued is lost" in caplog.text


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def segment(owner: Owner, number: int = 0) -> Path:
    return owner.tier._directory.path / f"segment-{number:05d}.kv"


@pytest.mark.parametrize("restart", [False, True])
def test_a_flipped_bit_costs_the_page_and_what_builds_on_it(
    open_owner: Open, restart: bool
) -> None:
    owner = open_owner()
    fill(owner, range(3))
    if restart:
        close(owner)
    flip(segment(owner), owner.slots[(b"", (1, 1))] * META.slot_bytes + 777)
    if restart:
        owner = open_owner()
    assert owner.read([(b"", (1,)), (b"", (1, 1)), (b"", (1, 1, 2))]) == 1
    assert owner.evicted == [(b"", (1, 1)), (b"", (1, 1, 2))]
    assert owner.tier.stats().pages_damaged == 2
    owner.write_path(b"", [1, 1, 2])  # computed again
    owner.settle()
    assert owner.read_each() == (9, 0)
    close(owner)
    assert open_owner().read_each() == (9, 0)


@pytest.mark.parametrize("restart", [False, True])
def test_a_truncated_segment_costs_what_was_in_its_end(open_owner: Open, restart: bool) -> None:
    owner = open_owner()
    fill(owner, range(4))
    if restart:
        close(owner)
    os.truncate(segment(owner), 5 * META.slot_bytes + 100)
    if restart:
        owner = open_owner()
        assert len(owner.slots) == 5
    good, bad = owner.read_each()
    assert (good, bad) == ((5, 0) if restart else (5, 3))
    fill(owner, range(4))
    assert owner.read_each() == (12, 0)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("noticed_by", ["reader", "writer"])
def test_a_deleted_file_costs_its_pages_once(
    open_owner: Open, caplog: pytest.LogCaptureFixture, restart: bool, noticed_by: str
) -> None:
    owner = open_owner()
    fill(owner, range(3))
    if restart:
        close(owner)
    segment(owner).unlink()
    if restart:
        owner = open_owner()
        assert owner.slots == {}
    else:
        if noticed_by == "reader":
            assert owner.read([(b"", (0,))]) == 0
        else:
            owner.write((b"", (9,)))
            owner.settle()
        assert len(owner.evicted) == 9
        assert len([line for line in warnings(caplog) if "was deleted, and" in line]) == 1
        assert owner.tier.stats().errors == {"ENOENT": 1}
    fill(owner, range(3))
    assert owner.read_each()[1] == 0
    close(owner)
    assert open_owner().read_each()[0] >= 9


def test_a_deleted_directory_costs_everything(
    open_owner: Open, caplog: pytest.LogCaptureFixture
) -> None:
    owner = open_owner()
    fill(owner, range(3))
    shutil.rmtree(owner.tier._directory.path)
    owner.write((b"", (9,)))
    owner.settle()
    assert owner.failed == [(b"", (9,))]
    assert owner.tier.stats().is_degraded
    owner.read_each()
    assert owner.slots == {}
    close(owner)
    assert open_owner().slots == {}


def test_a_deleted_index_is_noticed(open_owner: Open, caplog: pytest.LogCaptureFixture) -> None:
    owner = open_owner()
    fill(owner, range(3))
    for file in owner.tier._directory.path.glob("index*"):
        file.unlink()
    fill(owner, range(3, 4))
    assert not owner.flush()
    owner.poll()
    assert owner.tier.stats().is_degraded
    assert "the index was deleted" in caplog.text
    assert owner.read_each() == (12, 0)
    close(owner)
    owner = open_owner()
    assert owner.slots == {}
    fill(owner, range(3))
    assert owner.read_each() == (9, 0)


def test_a_stale_index_never_leads_to_wrong_pages(open_owner: Open, tmp_path: Path) -> None:
    owner = open_owner(16)
    fill(owner, range(5))
    path = close(owner)
    shutil.copy(path / "index.sqlite", tmp_path / "old")
    owner = open_owner(16)
    fill(owner, range(5, 8))
    close(owner)
    shutil.copy(tmp_path / "old", path / "index.sqlite")
    owner = open_owner(16)
    assert len(owner.slots) >= 14
    good, bad = owner.read_each()
    assert good > 0
    assert bad > 0
    fill(owner, range(5, 8))
    assert owner.read_each()[1] == 0


def damage_index(path: Path, how: str) -> None:
    index = path / "index.sqlite"
    match how:
        case "garbage":
            index.write_bytes(os.urandom(20_000))
        case "empty":
            index.write_bytes(b"")
        case "torn":
            data = bytearray(index.read_bytes())
            data[4096:] = os.urandom(len(data) - 4096)
            index.write_bytes(data)
        case "other":
            index.unlink()
            with sqlite3.connect(index) as connection:
                connection.execute("CREATE TABLE page (id INTEGER, recipe TEXT)")
        case "newer":
            with sqlite3.connect(index) as connection:
                connection.execute("PRAGMA user_version = 2")
        case "types":
            with sqlite3.connect(index) as connection:
                connection.execute("UPDATE page SET tokens = 7 WHERE id = 3")
    if how in ("other", "newer", "types"):
        connection.close()


@pytest.mark.parametrize("how", ["garbage", "empty", "torn", "other", "newer", "types"])
def test_an_index_that_cannot_be_read_is_set_aside(
    open_owner: Open, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    owner = open_owner(300)
    fill(owner, range(3))
    path = close(owner)
    caplog.clear()
    damage_index(path, how)
    owner = open_owner(300)
    assert owner.slots == {}
    if how != "empty":
        (line,) = warnings(caplog)
        assert "cannot be read" in line
        assert (path / "index.sqlite.damaged").exists()
    fill(owner, range(4, 7))
    assert owner.read_each() == (9, 0)
    assert sum(file.stat().st_size for file in path.iterdir()) <= room_for(300)
    close(owner)
    assert open_owner(300).read_each() == (9, 0)


@pytest.mark.parametrize("column", ["tokens", "parent", "salt", "checksum", "slot"])
def test_a_wrong_value_in_the_index_never_leads_to_wrong_pages(
    open_owner: Open, column: str
) -> None:
    owner = open_owner()
    fill(owner, range(3))
    path = close(owner)
    statement = {
        "tokens": ("UPDATE page SET tokens = ? WHERE id = 5", (tokens_of(8).tobytes(),)),
        "parent": ("UPDATE page SET parent = ? WHERE id = 5", (1,)),
        "salt": ("UPDATE page SET salt = ? WHERE id = 4", (b"theirs",)),
        "checksum": ("UPDATE page SET checksum = checksum + ? WHERE id = 5", (1,)),
        "slot": ("UPDATE page SET slot = ? WHERE id = 5", (40,)),
    }
    with sqlite3.connect(path / "index.sqlite") as connection:
        assert connection.execute(*statement[column]).rowcount == 1
    connection.close()
    owner = open_owner()
    left = len(owner.slots)
    good, bad = owner.read_each()
    assert bad > 0 or left < 9
    assert good >= 6
    assert len(owner.slots) == good


@pytest.mark.parametrize("text", [None, "", "{}", "other"])
def test_a_cache_without_a_valid_description_begins_empty(
    open_owner: Open, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    owner = open_owner()
    fill(owner, range(3))
    path = close(owner) / "meta.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace("w0", "w1") if text == "other" else text)
    caplog.clear()
    owner = open_owner()
    assert owner.slots == {}
    (line,) = warnings(caplog)
    assert "The cache is emptied" in line
    fill(owner, range(2))
    assert owner.read_each() == (6, 0)


@as_root
def test_a_disk_that_is_full_at_once(open_owner: Open, mount: Callable[..., Path]) -> None:
    disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    owner = open_owner(1000, directory=disk)
    owner.write_path(b"", [1, 2])
    owner.settle()
    assert len(owner.failed) == 2
    assert owner.tier.stats().is_degraded
    assert owner.tier.stats().errors["ENOSPC"] >= 1
    assert not segment(owner).exists()


@as_root
def test_a_disk_that_is_full_before_the_bound_is_reached(
    open_owner: Open, mount: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = mount("-t", "tmpfs", "-o", "size=100m", "tmpfs")
    data = content((b"", (1,)))

    def write(owner: Owner, numbers: range) -> None:
        for number in numbers:
            slot = owner.tier.write(-1, b"", tokens_of(number), data)
            if slot is not None:
                owner.queued[slot], owner.lent[slot] = (b"", (number,)), data
            if number % 32 == 0:
                owner.settle()
        owner.settle()

    per_segment = META.slots_per_segment
    owner = open_owner(3 * per_segment, directory=disk)
    write(owner, range(per_segment + 100))
    assert not owner.tier.stats().is_degraded
    assert owner.tier.stats().errors["ENOSPC"] >= 1
    (line,) = warnings(caplog)
    assert f"the disk is full; the cache makes do with room for {per_segment} pages" in line
    before = owner.tier.stats()
    write(owner, range(per_segment + 100, per_segment + 300))  # old pages give way to new ones
    assert owner.tier.stats().evictions > before.evictions
    assert (b"", (per_segment + 299,)) in owner.slots
    assert [file.name for file in segment(owner).parent.glob("segment-*")] == ["segment-00000.kv"]

    subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
    time.sleep(RETRY)
    write(owner, range(10_000, 10_000 + 200))
    assert segment(owner, 1).exists()
    owner.slots = {}


@as_root
def test_a_disk_that_becomes_read_only(
    open_owner: Open, mount: Callable[..., Path], tmp_path: Path
) -> None:
    # An error makes ext4 read-only under whoever is writing, as a failing disk does.
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    disk = mount("-o", "loop,errors=remount-ro", str(image))
    device = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE", str(disk)], capture_output=True, text=True, check=True
    ).stdout.strip()
    owner = open_owner(directory=disk)
    fill(owner, range(3))
    assert owner.flush()
    Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("1")
    with pytest.raises(OSError, match="Read-only"):
        (disk / "x").touch()
    for number in range(5, 9):
        owner.write_path(b"", [number, 1])
        owner.settle()
        owner.flush()
        time.sleep(RETRY)
    stats = owner.tier.stats()
    assert stats.is_degraded
    assert stats.errors
    assert owner.read([(b"", (0,)), (b"", (0, 1)), (b"", (0, 1, 2))]) == 3
    close(owner)


@as_root
def test_a_file_system_without_direct_access(
    open_owner: Open, mount: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = mount("-t", "ramfs", "ramfs")
    owner = open_owner(directory=disk)
    fill(owner, range(3))
    assert not owner.tier.stats().is_direct
    (line,) = warnings(caplog)
    assert "no O_DIRECT" in line
    assert owner.read_each() == (9, 0)
    close(owner)
    assert open_owner(directory=disk).read_each() == (9, 0)


def test_a_directory_that_cannot_be_made_is_said_at_once(open_owner: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_owner(directory=tmp_path / "file")


def test_a_reader_that_never_ends_does_not_let_the_log_grow(open_owner: Open) -> None:
    owner = open_owner(300)
    fill(owner, range(3))
    assert owner.flush()
    path = owner.tier._directory.path
    reader = sqlite3.connect(path / "index.sqlite")
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM page").fetchone()
    for number in range(10, 400):
        owner.write_path(b"", [number, 1, 2])
        owner.tier.flush(5)
        owner.poll()
        if owner.tier.stats().is_degraded:
            break
    assert owner.tier.stats().errors == {"EBUSY": 1}
    assert sum(file.stat().st_size for file in path.iterdir()) <= room_for(300)
    reader.close()
    time.sleep(RETRY)
    fill(owner, range(500, 502))
    assert owner.flush()
    assert owner.read_each()[1] == 0


def test_health_says_each_change_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    health = DiskHealth(tmp_path, 30.0, clock=lambda: now)
    assert health.may_write
    health.trouble(errno.EIO, "x")
    health.success()  # of a write that began before
    assert not health.may_write
    now = 29.0
    health.trouble(errno.EIO, "x")
    now = 58.0
    assert not health.may_write
    now = 59.0
    assert health.may_write
    assert health.is_degraded
    health.success()
    assert not health.is_degraded
    assert len(warnings(caplog)) == 2
    assert health.errors == {"EIO": 2}
    health.full(10)
    assert not health.may_grow_again()
    now = 89.0
    assert health.may_grow_again()
    assert not health.may_grow_again()
    health.full(10)
    now = 119.0
    assert health.may_grow_again()
    assert len(warnings(caplog)) == 3

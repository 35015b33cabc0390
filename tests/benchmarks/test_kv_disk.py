"""How near the disk tier of nf-kvcache comes to what fio moves: same disk, block size and depth.

Both write and read through O_DIRECT, in turns, because a shared disk changes from second to second.
The tier's times are those of its owner: from the first call until all pages are in the index, or
all are read and verified.
"""

import itertools
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nf_kvcache.disk import DiskTier, aligned_buffers
from nf_kvcache.fingerprint import Fingerprint

pytestmark = pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")

PAGE_SIZE = 16
PAGE_BYTES = 384 << 10  # of a model with 24 layers, 8 heads of K, head_dim 32 and bfloat16, say
QUEUED_PAGES = 64
NUM_PAGES = 2048  # per round: 768 MiB
ROUNDS = 7
FINGERPRINT = Fingerprint("w", "bfloat16", PAGE_SIZE, 24, 8, 32, "r")


class Disk:
    """A tier, and the file of fio beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tier = DiskTier(
            directory / "tier",
            FINGERPRINT,
            page_bytes=PAGE_BYTES,
            page_size=PAGE_SIZE,
            max_bytes=(NUM_PAGES + 256) * PAGE_BYTES,
            max_queued_pages=QUEUED_PAGES,
        )
        # No two pages alike: whoever provides the disk may keep those once.
        self.pages = aligned_buffers(NUM_PAGES, PAGE_BYTES)
        generator = np.random.default_rng(0)
        for page in self.pages:
            page[:] = np.frombuffer(generator.bytes(PAGE_BYTES), dtype=np.uint8)
        self.numbers = itertools.count()
        self.slots: list[int] = []

    def write(self) -> float:
        """Write pages through the tier; seconds."""
        tier, lent = self.tier, 0
        self.slots = []
        pages = list(self.pages)
        for page in pages:  # other content than the last time
            page[:8] = np.frombuffer(next(self.numbers).to_bytes(8, "little"), dtype=np.uint8)
        started = time.perf_counter()
        while pages or lent:
            while pages:
                tokens = np.full(PAGE_SIZE, next(self.numbers), dtype=np.int32)
                if tier.write(-1, b"", tokens, pages[-1]) is None:
                    break
                pages.pop()
                lent += 1
            tier.wait(1.0)
            events = tier.poll()
            assert not events.failed
            lent -= len(events.written)
            self.slots += events.written
        assert tier.flush(60)
        return time.perf_counter() - started

    def read(self) -> float:
        """Read all pages that were written last; seconds."""
        started = time.perf_counter()
        read = self.tier.read(self.slots, list(self.pages))
        while not read.done:
            self.tier.wait(1.0)
        seconds = time.perf_counter() - started
        assert read.num_good == NUM_PAGES
        self.tier.poll()
        return seconds

    def fio(self, direction: str) -> float:
        """The same with fio; seconds."""
        if direction == "read":  # the very same data; a size would make fio change the files
            files = ":".join(map(str, sorted(self.directory.glob("tier/**/segment-*.kv"))))
            options = ["--readonly", "--file_service_type=sequential"]
        else:
            files = str(self.directory / "fio")
            options = [f"--size={NUM_PAGES * PAGE_BYTES}", "--end_fsync=1"]
        command = [
            "fio", "--name=fio", f"--filename={files}", f"--rw={direction}",
            f"--bs={PAGE_BYTES}", "--direct=1", "--iodepth=32",
            f"--io_size={NUM_PAGES * PAGE_BYTES}",
            "--ioengine=io_uring" if self.tier.stats().io == "io_uring" else "--ioengine=libaio",
            "--output-format=json", *options,
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        report = json.loads(result.stdout)["jobs"][0][direction]
        assert report["io_bytes"] == NUM_PAGES * PAGE_BYTES
        return report["io_bytes"] / report["bw_bytes"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    disk = Disk(tmp_path_factory.mktemp("disk"))
    # Files are written for the first time here, which is slower.
    disk.write()
    disk.fio("write")
    yield disk
    stats = disk.tier.stats()
    assert stats.pages_damaged == 0
    assert not stats.errors
    disk.tier.close()
    shutil.rmtree(disk.directory)


@pytest.mark.parametrize("direction", ["write", "read"])
def test_disk_tier_beside_fio(disk: Disk, benchmark, direction: str) -> None:
    mine, fio = [], []

    def measure() -> None:
        fio.append(disk.fio(direction))
        mine.append(disk.write() if direction == "write" else disk.read())

    benchmark.pedantic(measure, rounds=ROUNDS)
    total = NUM_PAGES * PAGE_BYTES
    ratio = statistics.median(theirs / ours for theirs, ours in zip(fio, mine, strict=True))
    stats = disk.tier.stats()
    benchmark.extra_info |= {
        "block_bytes": PAGE_BYTES,
        "io": stats.io,
        "direct": stats.is_direct,
        "tier_gb_per_s": round(total / statistics.median(mine) / 1e9, 2),
        "fio_gb_per_s": round(total / statistics.median(fio) / 1e9, 2),
        "share_of_fio": round(ratio, 3),
    }
    assert ratio >= 0.8

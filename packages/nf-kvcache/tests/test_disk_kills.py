"""A process that writes pages is killed, at chosen instants and at any; the next one reads them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_pages import Owner, Prefix, open_tier

from nf_kvcache.disk import UringIO

PROGRAM = Path(__file__).with_name("disk_pages.py")
NUM_SLOTS = 200

# Kills its process inside the n-th write to the index's log, after the first half of the bytes.
KILL_IN_COMMIT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef ssize_t (*pwrite_fn)(int, const void *, size_t, off_t);

static ssize_t intercept(const char *symbol, int fd, const void *data, size_t size, off_t offset) {
  static int left = -1;
  pwrite_fn real = (pwrite_fn)dlsym(RTLD_NEXT, symbol);
  char link[64], path[512] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  const char *name = getenv("KILL_IN_FILE");
  const ssize_t start = length - (ssize_t)strlen(name);
  if (start >= 0 && strcmp(path + start, name) == 0) {
    if (left < 0) left = atoi(getenv("KILL_AT_WRITE"));
    if (--left < 0) {
      real(fd, data, size / 2, offset);
      kill(getpid(), SIGKILL);
    }
  }
  return real(fd, data, size, offset);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  return intercept("pwrite", fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) {
  return intercept("pwrite64", fd, data, size, offset);
}
"""


class WriterProcess:
    """A process that writes pages, and what it has acknowledged."""

    def __init__(
        self,
        directory: Path,
        num_slots: int = NUM_SLOTS,
        writes_until_kill: int | None = None,
        syncs_until_kill: int | None = None,
        io: str = "faulty",
        **environment: str,
    ) -> None:
        options = ["" if n is None else str(n) for n in (writes_until_kill, syncs_until_kill)]
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(directory), str(num_slots), *options, io],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.acknowledged: dict[Prefix, float] = {}  # and not evicted; when
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                sign, seconds, salt, *numbers = line.split()
                prefix = (salt.encode(), tuple(map(int, numbers)))
                if sign == "+":
                    self.acknowledged[prefix] = float(seconds)
                else:
                    self.acknowledged.pop(prefix, None)  # an earlier process may have written it

    def wait_for_pages(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.acknowledged) < count:
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.01)

    def kill(self) -> float:
        """Kill it now; when that was."""
        killed_at = time.monotonic()
        self.process.send_signal(signal.SIGKILL)
        self.wait()
        return killed_at

    def wait(self) -> None:
        """Until it has killed itself, or was killed."""
        assert self.process.wait(60) == -signal.SIGKILL
        self._thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[WriterProcess]]:
    writers: list[WriterProcess] = []
    yield writers
    for writer in writers:
        if writer.process.poll() is None:
            writer.kill()


def read_what_is_left(directory: Path, num_slots: int = NUM_SLOTS) -> Owner:
    """Open the cache; every page that it claims to have must be what was written for its tokens."""
    owner = Owner(open_tier(directory, num_slots))
    _, bad = owner.read_each()
    assert bad == 0, "a page that the index speaks of is not there"
    assert owner.tier.stats().pages_damaged == 0
    return owner


@pytest.mark.parametrize("writes", [0, 1, 7, NUM_SLOTS + 5, NUM_SLOTS * 3 + 2])
def test_killed_inside_a_write(writers: list[WriterProcess], tmp_path: Path, writes: int) -> None:
    writers.append(WriterProcess(tmp_path, writes_until_kill=writes))
    writers[0].wait()
    owner = read_what_is_left(tmp_path)
    if writes > NUM_SLOTS:
        assert len(owner.slots) > 0
    owner.tier.close()


@pytest.mark.parametrize("syncs", [0, 1, 3])
def test_killed_inside_fsync(writers: list[WriterProcess], tmp_path: Path, syncs: int) -> None:
    writers.append(WriterProcess(tmp_path, syncs_until_kill=syncs))
    writers[0].wait()
    owner = read_what_is_left(tmp_path)
    assert bool(owner.slots) == (syncs > 0)
    owner.tier.close()


@pytest.fixture(scope="module")
def kill_in_commit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    directory = tmp_path_factory.mktemp("preload")
    (directory / "kill.c").write_text(KILL_IN_COMMIT)
    library = directory / "kill.so"
    command = [compiler, "-O1", "-shared", "-fPIC", str(directory / "kill.c"), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True)
    return library


@pytest.mark.parametrize(
    ("file", "write"),
    [("index.sqlite-wal", n) for n in (0, 5, 12, 25, 60)] + [("index.sqlite", n) for n in (0, 2)],
)
def test_killed_inside_a_commit_or_checkpoint(
    writers: list[WriterProcess], tmp_path: Path, kill_in_commit: Path, file: str, write: int
) -> None:
    if file == "index.sqlite":
        # It is written in the beginning, and at checkpoints.
        owner = Owner(open_tier(tmp_path, NUM_SLOTS))
        owner.write_path(b"salt", [0, 1])
        assert owner.flush()
        owner.tier.close()
    environment = {"KILL_IN_FILE": file, "KILL_AT_WRITE": str(write)}
    writers.append(WriterProcess(tmp_path, LD_PRELOAD=str(kill_in_commit), **environment))
    writers[0].wait()
    owner = read_what_is_left(tmp_path)
    if write >= 25 or file == "index.sqlite":
        assert owner.slots
    owner.tier.close()


@pytest.fixture(params=["io_uring", "threads"])
def io(request: pytest.FixtureRequest) -> str:
    if request.param == "io_uring":
        try:
            UringIO().close()
        except (ImportError, OSError) as error:
            pytest.skip(f"needs io_uring: {error}")
    return str(request.param)


def kill_at_random(writers: list[WriterProcess], directory: Path, rounds: int, io: str) -> None:
    pauses = random.Random(0)
    for _ in range(rounds):
        writer = WriterProcess(directory, num_slots=700, io=io)
        writers.append(writer)
        writer.wait_for_pages(50)
        time.sleep(1.1 + pauses.random() * 0.5)
        killed_at = writer.kill()
        owner = read_what_is_left(directory, num_slots=700)
        old = [prefix for prefix, seconds in writer.acknowledged.items() if seconds < killed_at - 1]
        warm = sum(prefix in owner.slots for prefix in old)
        assert len(old) > 20
        assert warm >= 0.9 * len(old), f"{warm} of {len(old)} pages are warm"
        owner.tier.close()


def test_killed_at_random_moments(writers: list[WriterProcess], tmp_path: Path, io: str) -> None:
    kill_at_random(writers, tmp_path, 2, io)


@pytest.mark.long
def test_killed_at_many_random_moments(
    writers: list[WriterProcess], tmp_path: Path, io: str
) -> None:
    kill_at_random(writers, tmp_path, 50, io)

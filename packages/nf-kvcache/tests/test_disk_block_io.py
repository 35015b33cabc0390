"""Batches of blocks: by io_uring and by threads, with the same results."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nf_kvcache.disk import (
    BlockIO,
    BlockRequest,
    ThreadIO,
    UringIO,
    aligned_buffers,
    default_block_io,
)

BLOCK = 4096


@pytest.fixture(params=["threads", "io_uring"])
def io(request: pytest.FixtureRequest) -> Iterator[BlockIO]:
    if request.param == "threads":
        io: BlockIO = ThreadIO()
    else:
        try:
            io = UringIO()
        except (ImportError, OSError) as error:
            pytest.skip(f"no io_uring here: {error}")
    assert io.name == request.param
    yield io
    io.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "blocks", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_a_batch_longer_than_the_queue_comes_back_in_order(io: BlockIO, fd: int) -> None:
    buffers = aligned_buffers(100, BLOCK)
    buffers[:] = np.random.default_rng(0).integers(0, 256, buffers.shape)
    order = np.random.default_rng(1).permutation(100)
    requests = [BlockRequest(fd, int(i) * BLOCK, buffers[i]) for i in order]
    assert io.write_many(requests) == [0] * 100
    assert io.sync(fd) == 0
    assert os.pread(fd, 100 * BLOCK, 0) == buffers.tobytes()

    back = aligned_buffers(100, BLOCK)
    assert io.read_many([BlockRequest(fd, i * BLOCK, back[i]) for i in range(100)]) == [0] * 100
    assert np.array_equal(back, buffers)


def test_each_request_has_its_own_error(io: BlockIO, fd: int, tmp_path: Path) -> None:
    os.ftruncate(fd, 2 * BLOCK + 100)
    read_only = os.open(tmp_path / "blocks", os.O_RDONLY)
    buffers = aligned_buffers(4, BLOCK)
    try:
        requests = [
            BlockRequest(fd, 0, buffers[0]),
            BlockRequest(10_000, 0, buffers[1]),
            BlockRequest(fd, 2 * BLOCK, buffers[2]),
            BlockRequest(fd, 9 * BLOCK, buffers[3]),
        ]
        assert io.read_many(requests) == [0, errno.EBADF, errno.ENODATA, errno.ENODATA]
        requests = [BlockRequest(read_only, 0, buffers[0]), BlockRequest(fd, 0, buffers[1])]
        assert io.write_many(requests) == [errno.EBADF, 0]
        assert io.sync(10_000) == errno.EBADF
    finally:
        os.close(read_only)


def test_an_empty_batch(io: BlockIO) -> None:
    assert io.read_many([]) == []
    assert io.write_many([]) == []


def test_threads_take_over_where_the_extension_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nf_kvcache._uring", None)
    with caplog.at_level(logging.INFO, "nf_kvcache.disk"):
        io = default_block_io()
    assert io.name == "threads"
    assert len(caplog.records) == 1
    assert "in threads" in caplog.text
    io.close()


def test_threads_take_over_where_the_kernel_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uring = pytest.importorskip("nf_kvcache._uring")

    def refuse(depth: int) -> None:
        raise PermissionError(errno.EPERM, "io_uring_setup failed")

    monkeypatch.setattr(uring, "Ring", refuse)
    with caplog.at_level(logging.INFO, "nf_kvcache.disk"):
        io = default_block_io()
    assert io.name == "threads"
    assert "io_uring_setup failed" in caplog.text
    io.close()


def test_a_ring_refuses_what_it_cannot_transfer(fd: int) -> None:
    uring = pytest.importorskip("nf_kvcache._uring")
    with pytest.raises(OSError, match="io_uring_setup failed"):
        uring.Ring(1 << 30)
    try:
        ring = uring.Ring(4)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    rows = np.zeros((4, BLOCK), dtype=np.uint8)
    with pytest.raises(ValueError, match="one contiguous row"):
        ring.run(True, [(fd, 0, rows[:, 0])])
    with pytest.raises(ValueError, match="offset is -1"):
        ring.run(True, [(fd, -1, rows[0])])
    rows.flags.writeable = False
    assert ring.run(True, [(fd, 0, rows[0])]) == [0]
    with pytest.raises(ValueError, match="read-only"):
        ring.run(False, [(fd, 0, rows[0])])

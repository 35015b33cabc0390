"""A cache with all three tiers: warm after a restart, and wrong about nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nf_kvcache import KVCache, KVLayout
from nf_kvcache.disk import BlockIO, BlockRequest, DiskTier, ThreadIO
from nf_kvcache.fingerprint import Fingerprint
from nf_kvcache.tier import Tier

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype=torch.float32, page_size=4)
TOKENS = np.arange(17, dtype=np.int32)
HOST_BYTES = 16 * 4096


def open_disk(
    directory: Path,
    weights: str = "some weights",
    io: BlockIO | None = None,
    max_queued_pages: int = 64,
) -> DiskTier:
    fingerprint = Fingerprint(
        weights=weights,
        dtype="float32",
        page_size=LAYOUT.page_size,
        num_layers=LAYOUT.num_layers,
        num_kv_heads=LAYOUT.num_kv_heads,
        head_dim=LAYOUT.head_dim,
        rope="none",
    )
    return DiskTier(
        directory,
        fingerprint,
        page_bytes=LAYOUT.bytes_per_page,
        page_size=LAYOUT.page_size,
        max_bytes=16 << 20,
        io=io,
        max_queued_pages=max_queued_pages,
    )


def open_cache(directory: Path, **options: Any) -> KVCache:
    return KVCache(LAYOUT, 8, host_bytes=HOST_BYTES, disk=open_disk(directory, **options))


def compute(cache: KVCache, seq: str, start: int, salt: str = "") -> None:
    """Write K and V of TOKENS from `start` on: numbers that say which token and layer."""
    if start == 0:
        match = cache.match(TOKENS[:0], cache_salt=salt)
        cache.reserve(seq, len(TOKENS), match)
    offload = cache.begin_iteration([seq], np.array([start]), np.array([len(TOKENS) - start]))
    assert offload is not None
    table = cache.page_tables([seq])[0]
    for layer, (keys, values) in enumerate(cache.layers):
        offload.before_append(layer)
        for token in TOKENS[start:].tolist():
            page, slot = table[token // 4], token % 4
            keys[page, :, slot] = 100 * layer + token
            values[page, :, slot] = -100 * layer - token
        offload.after_append(layer)
    cache.commit(seq, TOKENS[start:])


def restore(cache: KVCache, seq: str, salt: str = "") -> int:
    """Begin a sequence with what is found of TOKENS, and look at every number that came."""
    match = cache.match(TOKENS[:-1], cache_salt=salt)
    cache.reserve(seq, len(TOKENS), match)
    while (came := cache.restored(seq)) is None:
        cache.wait(0.05)
    table = cache.page_tables([seq])[0]
    for token in range(came.num_tokens):
        for layer, (keys, values) in enumerate(cache.layers):
            page, slot = table[token // 4], token % 4
            assert (keys[page, :, slot] == 100 * layer + token).all()
            assert (values[page, :, slot] == -100 * layer - token).all()
    return came.num_tokens


class ClosedGate(ThreadIO):
    """Nothing is written before the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write_many(self, requests: Sequence[BlockRequest]) -> list[int]:
        self.gate.wait(30)
        return super().write_many(requests)


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A directory that a process has left with all full pages of TOKENS."""
    cache = open_cache(tmp_path)
    compute(cache, "a", 0)
    assert cache.flush(10)
    cache.release("a")
    cache.check_integrity()
    cache.close()
    return tmp_path


def test_the_next_process_finds_what_this_one_computed(warm: Path) -> None:
    cache = open_cache(warm)
    assert cache.match(TOKENS[:-1]).tokens_by_tier == {"disk": 16}
    assert restore(cache, "b") == 16
    assert cache.match(TOKENS[:-1]).tokens_by_tier == {"device": 16}
    cache.release("b")
    cache.check_integrity()
    stats = cache.stats()
    assert stats.hit_tokens_by_tier == {"device": 0, "host": 0, "disk": 16}
    cache.close()


def test_another_model_finds_nothing(warm: Path) -> None:
    cache = open_cache(warm, weights="other weights")
    assert restore(cache, "b") == 0
    cache.close()


def test_another_tenant_finds_nothing(warm: Path) -> None:
    cache = open_cache(warm)
    assert restore(cache, "b", salt="tenant") == 0
    cache.close()


def test_a_flipped_bit_is_a_page_to_compute(warm: Path) -> None:
    """The page is dropped with all that builds on it; what came before it is still good."""
    (segment,) = warm.rglob("segment-*")
    data = bytearray(segment.read_bytes())
    value = np.float32(8).tobytes()  # the first key of the third page
    data[data.index(value * 8)] ^= 1
    segment.write_bytes(data)

    cache = open_cache(warm)
    assert restore(cache, "b") == 8
    compute(cache, "b", 8)
    assert cache.flush(10)
    cache.release("b")
    cache.check_integrity()
    lower = cache.stats().lower
    assert lower is not None
    assert lower.restores_cut == 1
    cache.close()

    cache = open_cache(warm)  # what was computed again is on disk again
    assert restore(cache, "c") == 16
    cache.close()


def test_a_prefix_longer_than_the_host_comes_up_in_parts(warm: Path) -> None:
    cache = KVCache(LAYOUT, 8, host_bytes=2 * 4096, disk=open_disk(warm))
    assert restore(cache, "b") == 16
    cache.release("b")
    cache.check_integrity()
    cache.close()


def test_a_prefix_is_found_again_while_it_is_queued_for_the_disk(tmp_path: Path) -> None:
    """Its slots hold nothing yet; being used, they are not to be asked for it."""
    io = ClosedGate()
    cache = open_cache(tmp_path, io=io)
    compute(cache, "a", 0)
    deadline = time.monotonic() + 30
    while cache.match(TOKENS[:-1]).pages[:, Tier.HOST].min() < 0:  # which lets the copies land
        assert time.monotonic() < deadline
    cache.release("a")
    lower = cache.stats().lower
    assert lower is not None
    assert lower.disk is not None
    assert lower.disk.pages_queued == 4
    assert restore(cache, "b") == 16
    io.gate.set()
    assert cache.flush(30)
    cache.check_integrity()
    cache.close()


def test_more_pages_than_the_disk_takes_at_once_all_get_there(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, max_queued_pages=1)
    compute(cache, "a", 0)
    assert cache.flush(30)
    lower = cache.stats().lower
    assert lower is not None
    assert lower.disk is not None
    assert (lower.disk.pages_stored, lower.unwritten_pages) == (4, 0)
    assert not lower.disk.writes_dropped
    cache.check_integrity()
    cache.close()


def test_what_leaves_the_host_before_the_disk_takes_it_is_counted(tmp_path: Path) -> None:
    """A disk that stands still holds up neither the host nor the sequences."""
    io = ClosedGate()
    disk = open_disk(tmp_path, io=io, max_queued_pages=1)
    cache = KVCache(LAYOUT, 8, host_bytes=3 * 4096, disk=disk)
    for number in range(4):  # twelve more pages than the host has room for
        salt = f"tenant {number}"
        compute(cache, salt, 0, salt)
        assert not cache.flush(0.2)
        cache.release(salt)
        cache.check_integrity()
    io.gate.set()
    assert cache.flush(30)
    lower = cache.stats().lower
    assert lower is not None
    assert lower.disk is not None
    assert lower.unwritten_pages > 0
    assert lower.disk.pages_stored + lower.unwritten_pages + lower.skipped_pages == 16
    cache.check_integrity()
    cache.close()


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    with pytest.raises(ValueError, match="host_bytes is 0, and there is a disk tier"):
        KVCache(LAYOUT, 8, disk=disk)
    other = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, page_size=4)
    with pytest.raises(ValueError, match=r"disk has pages of 1024 bytes and 4 .* expected 1536"):
        KVCache(other, 8, host_bytes=HOST_BYTES, disk=disk)
    disk.close()

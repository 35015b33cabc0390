"""Pages go to the host layer by layer and come back; the ordering matters and is tested."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from toy_kv_engine import LAYOUT, PAGE, crowd_out, make

from nf_kvcache import KVCache
from nf_kvcache.copier import CpuCopier, Download
from nf_kvcache.host_tier import HostTier
from nf_kvcache.numa import bind, node_of_pci_device


@pytest.fixture(params=["native", "python"])
def native(request) -> bool:
    return request.param == "native"


def test_a_prefix_comes_back_from_the_host(native):
    engine = make(native_index=native)
    prompt = list(range(17))
    engine.fill("a", prompt)
    engine.end("a")
    assert engine.cache.flush(10)
    crowd_out(engine, 8)
    match = engine.cache.match(np.array(prompt, dtype=np.int32))
    assert match.tokens_by_tier == {"host": 16}
    assert engine.fill("b", prompt) == 16
    engine.end("b")
    engine.cache.check_integrity()
    stats = engine.cache.stats()
    assert stats.hit_tokens_by_tier == {"device": 0, "host": 16, "disk": 0}
    assert stats.lower is not None
    assert stats.lower.uploaded_bytes == 4 * LAYOUT.bytes_per_page
    engine.cache.close()


def test_a_prefix_may_be_partly_on_the_device():
    engine = make(num_pages=6)
    prompt = list(range(17))
    engine.fill("a", prompt)
    engine.end("a")
    assert engine.cache.flush(10)
    crowd_out(engine, 4)  # the end of the prefix goes before its beginning
    match = engine.cache.match(np.array(prompt, dtype=np.int32))
    assert match.tokens_by_tier == {"device": 8, "host": 8}
    assert engine.fill("b", prompt) == 16
    engine.end("b")
    engine.cache.check_integrity()
    engine.cache.close()


def test_layers_are_on_their_way_before_the_iteration_ends():
    """What the executor calls per layer starts a copy then and there, not when all is done."""
    engine = make()
    seen = []

    class Watching(CpuCopier):
        def download(self, layers, pages, targets):
            seen.append((len(layers), len(pages)))
            return super().download(layers, pages, targets)

    engine = make(copier=Watching())
    engine.fill("a", list(range(9)))
    assert seen == [(1, 2)] * LAYOUT.num_layers
    engine.cache.close()


class SlowCopier(CpuCopier):
    """Downloads wait until they are let go. Without order, the computation does not wait."""

    def __init__(self, *, ordered: bool):
        super().__init__(inline_bytes=0)
        self.gate = threading.Event()
        self.ordered = ordered

    def download(self, layers, pages, targets):
        self._thread.submit(lambda: self.gate.wait(20))
        return super().download(layers, pages, targets)

    def hold(self, event):
        if self.ordered:
            self.gate.set()
            super().hold(event)


def overwrite_while_copying(*, ordered: bool) -> None:
    copier = SlowCopier(ordered=ordered)
    engine = make(num_pages=4, copier=copier)
    prompt = list(range(9))
    engine.fill("a", prompt)
    engine.end("a")
    engine.fill("crowd", list(range(100, 116)))  # takes all pages of `a`, still being copied
    copier.gate.set()
    engine.end("crowd")
    assert engine.cache.flush(10)
    found = engine.start("b", prompt)  # looks at every number that came back
    assert found == 8
    engine.cache.close()


def test_a_page_is_not_overwritten_while_it_is_copied():
    overwrite_while_copying(ordered=True)


def test_without_the_ordering_event_the_copy_is_corrupt():
    with pytest.raises(AssertionError, match="'b', "):
        overwrite_while_copying(ordered=False)


def test_two_sequences_share_what_is_on_its_way_up():
    class Slow(CpuCopier):
        def upload(self, layers, pages, sources):
            self._thread.submit(lambda: time.sleep(0.05))
            return super().upload(layers, pages, sources)

    engine = make(num_pages=8, copier=Slow())
    prompt = list(range(17))
    engine.fill("a", prompt)
    engine.end("a")
    assert engine.cache.flush(10)
    crowd_out(engine, 8)
    tokens = np.array(prompt[:-1], dtype=np.int32)
    for seq in ("b", "c"):
        engine.cache.reserve(seq, 17, engine.cache.match(tokens))
    assert engine.cache.restored("b") is None
    assert engine.cache.restored("c") is None
    tables = engine.cache.page_tables(["b", "c"])
    assert tables[0, :4].tolist() == tables[1, :4].tolist()
    engine.cache.check_integrity()
    engine.cache.release("b")  # who began it goes; the other still gets it
    while (came := engine.cache.restored("c")) is None:
        engine.cache.wait(0.01)
    assert came.num_tokens == 16
    engine.tokens["c"] = prompt[:-1]
    engine.end("c")
    engine.cache.check_integrity()
    engine.cache.close()


def test_a_restore_that_nobody_waits_for_ends():
    engine = make()
    prompt = list(range(17))
    engine.fill("a", prompt)
    engine.end("a")
    assert engine.cache.flush(10)
    crowd_out(engine, 8)
    engine.cache.reserve("b", 17, engine.cache.match(np.array(prompt, dtype=np.int32)))
    engine.cache.release("b")
    engine.fill("c", list(range(50, 60)))
    engine.end("c")
    engine.cache.check_integrity()
    assert engine.cache.stats().pages_used == 0
    engine.cache.close()


def test_a_late_restore_gives_way_to_computing():
    """The deadline has passed before the copy could be ordered."""
    now = [0.0]
    engine = make(clock=lambda: now[0], restore_seconds=0.0)
    prompt = list(range(17))
    engine.fill("a", prompt)
    engine.end("a")
    assert engine.cache.flush(10)
    crowd_out(engine, 8)
    assert engine.fill("b", prompt) == 0
    engine.end("b")
    assert engine.cache.stats().lower.restores_cut == 1
    engine.cache.check_integrity()
    engine.cache.close()


@pytest.mark.parametrize("length", [4, 5, 7, 8, 11])
def test_a_preempted_sequence_goes_on_without_computing_again(length):
    engine = make()
    tokens = list(range(length))
    engine.start("a", tokens)
    engine.run(("a", tokens[:-1]))  # the last one was sampled and is not computed yet
    engine.cache.preempt("a")
    crowd_out(engine, 8)
    assert engine.start("a", tokens, resume=True) == length - 1
    engine.run(("a", tokens[-1:]))
    engine.end("a")
    engine.cache.check_integrity()
    engine.cache.close()


def test_a_tail_serves_only_who_has_the_same_tokens():
    engine = make()
    engine.start("a", list(range(8)))
    engine.run(("a", list(range(7))))
    engine.cache.preempt("a")
    assert engine.start("a", [0, 1, 2, 3, 4, 5, 99, 100], resume=True) == 4
    engine.cache.close()


def test_who_ends_while_preempted_leaves_nothing_of_its_own():
    engine = make()
    tokens = list(range(7))
    engine.fill("a", tokens)
    engine.cache.preempt("a")
    engine.tokens.clear()
    engine.cache.release("a")
    stats = engine.cache.stats()
    assert (stats.pages_used, stats.lower.host_pages_used) == (0, 0)
    assert stats.lower.host_pages_cached == 1  # the full one; the other is of use to nobody
    with pytest.raises(KeyError, match="released before"):
        engine.cache.release("a")
    assert engine.start("a", [*tokens, 7], resume=True) == 4
    engine.cache.check_integrity()
    engine.cache.close()


def test_a_forked_sequence_writes_to_a_page_of_its_own():
    engine = make()
    prompt = list(range(6))
    engine.start("a", prompt, total=6)
    engine.run(("a", prompt))
    engine.cache.fork("a", "b")
    engine.tokens["b"] = list(prompt)
    for seq, token in (("a", 70), ("b", 80)):
        engine.cache.reserve(seq, 7)
        engine.run((seq, [token]))
    tables = engine.cache.page_tables(["a", "b"])
    assert tables[0, 0] == tables[1, 0]
    assert tables[0, 1] != tables[1, 1]
    engine.cache.check_integrity()
    engine.end("a")
    engine.end("b")
    engine.cache.check_integrity()
    engine.cache.close()


def test_a_host_that_is_full_keeps_what_was_used_last():
    engine = make(num_pages=8, host_pages=4)
    for number in range(4):
        engine.fill("a", [100 * number + i for i in range(9)])
        engine.end("a")
        assert engine.cache.flush(10)
    crowd_out(engine, 4, token=2000)  # of 8 pages of the device and 4 of the host
    assert engine.cache.flush(10)
    crowd_out(engine, 4, token=3000)
    stats = engine.cache.stats().lower
    assert stats.host_evictions > 0
    assert stats.host_pages_total == 4
    engine.cache.check_integrity()
    engine.cache.close()


def test_salts_keep_tenants_apart():
    engine = make()
    tokens = np.arange(9, dtype=np.int32)
    match = engine.cache.match(tokens, cache_salt="one")
    engine.cache.reserve("a", 9, match)
    engine.tokens["a"] = []
    engine.run(("a", tokens.tolist()))
    assert engine.cache.match(tokens, cache_salt="one").num_tokens == 8
    assert engine.cache.match(tokens, cache_salt="two").num_tokens == 0
    assert engine.cache.match(tokens).num_tokens == 0
    engine.cache.close()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="host_bytes is 100, and a page takes 4096"):
        KVCache(LAYOUT, 4, host_bytes=100)
    with pytest.raises(ValueError, match="host_bytes is -1"):
        KVCache(LAYOUT, 4, host_bytes=-1)
    with pytest.raises(ValueError, match="prefix_caching is False and host_bytes"):
        KVCache(LAYOUT, 4, host_bytes=PAGE, prefix_caching=False)


def test_memory_of_the_host_is_aligned_and_bounded():
    tier = HostTier(LAYOUT, 10 * PAGE + 1, device=torch.device("cpu"))
    assert tier.pool.num_pages == 10
    assert tier.slot(3).ctypes.data % 4096 == 0
    tier.page(3)[...] = 7
    assert tier.slot(3)[: LAYOUT.bytes_per_page].tolist() == [7] * LAYOUT.bytes_per_page
    assert "the device is the CPU" in tier.placement


def test_numa_nodes_are_read_from_the_system(tmp_path):
    (tmp_path / "0000:65:00.0").mkdir()
    (tmp_path / "0000:65:00.0" / "numa_node").write_text("1\n")
    assert node_of_pci_device("0000:65:00.0", tmp_path) == 1
    (tmp_path / "0000:65:00.0" / "numa_node").write_text("-1\n")
    assert node_of_pci_device("0000:65:00.0", tmp_path) is None
    assert node_of_pci_device("0000:66:00.0", tmp_path) is None


def test_memory_is_bound_to_a_node_that_exists_only():
    storage = torch.empty(4 * 4096 + 4096, dtype=torch.uint8)
    start = -storage.data_ptr() % 4096
    storage = storage[start : start + 4 * 4096]
    assert bind(storage, 0) is None
    assert "refused" in (bind(storage, 900) or "")


def test_a_copy_that_fails_is_a_page_that_is_not_there(caplog):
    class Failing(CpuCopier):
        def download(self, layers, pages, targets):
            failed = self._thread.submit(lambda: 1 / 0)
            return Download(failed, failed)

    engine = make(copier=Failing())
    prompt = list(range(9))
    engine.fill("a", prompt)
    engine.end("a")
    assert engine.cache.flush(10)
    assert "A copy of KV pages failed" in caplog.text
    crowd_out(engine, 8)
    assert engine.fill("b", prompt) == 0
    engine.end("b")
    engine.cache.check_integrity()
    engine.cache.close()

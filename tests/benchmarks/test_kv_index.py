"""What finding a prefix costs with a million pages indexed, and what handing out pages costs."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nf_kvcache import KVCache, KVLayout
from nf_kvcache.index import PrefixIndex, make_index
from nf_kvcache.page_pool import PagePool
from nf_kvcache.tier import Tier

PAGE_SIZE = 16
PROMPT_PAGES = 512  # 8192 tokens
PROMPTS = 1954  # 1,000,448 pages
SALT = b"salt"


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def fill(index: PrefixIndex, prompts: np.ndarray) -> None:
    """All first pages, then all second ones: pages of a prompt lie far from each other."""
    nodes = [index.root(SALT)] * len(prompts)
    for page in range(PROMPT_PAGES):
        tokens = prompts[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        for i, node in enumerate(nodes):
            nodes[i] = index.extend(node, tokens[i])
            index.place(nodes[i], Tier.DEVICE, page * len(prompts) + i)


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    shape = (PROMPTS, PROMPT_PAGES * PAGE_SIZE)
    return np.random.default_rng(0).integers(0, 32000, shape, dtype=np.int32)


def measure_match(benchmark: object, index: PrefixIndex, prompts: np.ndarray) -> float:
    """Median microseconds. Every round takes another prompt, so no cache has it from before."""
    order = iter(np.random.default_rng(1).permutation(PROMPTS).tolist())

    def walk(tokens: np.ndarray) -> None:
        nodes, _ = index.walk(SALT, tokens)
        assert len(nodes) == PROMPT_PAGES

    benchmark.pedantic(
        walk, setup=lambda: ((prompts[next(order)],), {}), rounds=500, warmup_rounds=5
    )
    us = benchmark.stats.stats.median * 1e6
    benchmark.extra_info.update({"pages indexed": len(index) - 1, "us": round(us, 1)})
    return us


def test_match(benchmark: object, prompts: np.ndarray) -> None:
    before = resident_bytes()
    started = time.perf_counter()
    index = make_index(PAGE_SIZE)
    fill(index, prompts)
    us_per_page = (time.perf_counter() - started) / len(index) * 1e6
    bytes_per_page = (resident_bytes() - before) / len(index)
    us = measure_match(benchmark, index, prompts)
    benchmark.extra_info.update(
        {
            "us at most": 100,
            "bytes per page": round(bytes_per_page),
            "bytes per page at most": 150,
            "us per page to extend and place": round(us_per_page, 2),
        }
    )
    assert len(index) > 1_000_000
    assert us <= 100
    assert bytes_per_page <= 150


def test_match_without_native_code(benchmark: object, prompts: np.ndarray) -> None:
    index = make_index(PAGE_SIZE, native=False)
    fill(index, prompts)
    measure_match(benchmark, index, prompts)


def sequence_lengths(rng: np.random.Generator) -> list[int]:
    """In pages, of 10,000 sequences."""
    return rng.integers(1, 64, 10_000).tolist()


def us_per_page(benchmark: object, run: Callable[[], None], pages: int) -> float:
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    us = benchmark.stats.stats.median / pages * 1e6
    benchmark.extra_info["us per page"] = round(us, 3)
    return us


def test_take_and_release_pages(benchmark: object) -> None:
    """64 sequences at a time, the oldest goes when another one comes."""
    lengths = sequence_lengths(np.random.default_rng(0))
    pool = PagePool(64 * 64, on_evict=lambda page: None)

    def run() -> None:
        taken: list[list[int]] = []
        for i, length in enumerate(lengths):
            if i >= 64:
                pool.release(taken[i - 64], keep=())
            taken.append(pool.take(length))
        for pages in taken[-64:]:
            pool.release(pages, keep=())

    assert us_per_page(benchmark, run, sum(lengths)) <= 1.0


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_reserve_and_release_sequences(benchmark: object, prefix_caching: bool) -> None:
    """The same through KVCache; with prefix caching every page is committed, and evicted later."""
    rng = np.random.default_rng(0)
    lengths = sequence_lengths(rng)
    texts = rng.integers(0, 32000, (len(lengths), 64 * PAGE_SIZE), dtype=np.int32)
    layout = KVLayout(1, 1, 8, torch.float32, page_size=PAGE_SIZE)
    cache = KVCache(layout, 64 * 64, prefix_caching=prefix_caching)
    names = [f"s{i}" for i in range(len(lengths))]

    def run() -> None:
        for i, length in enumerate(lengths):
            if i >= 64:
                cache.release(names[i - 64])
            tokens = texts[i, : length * PAGE_SIZE]
            cache.reserve(names[i], len(tokens))
            if prefix_caching:
                cache.commit(names[i], tokens)
        for name in names[-64:]:
            cache.release(name)

    us = us_per_page(benchmark, run, sum(lengths))
    assert prefix_caching or us <= 1.0

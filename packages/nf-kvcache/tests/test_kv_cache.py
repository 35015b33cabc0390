"""What a KVCache promises, case by case."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nf_kvcache import KVCache, KVCacheStats, KVLayout, OutOfPages

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype=torch.bfloat16, page_size=4)


def make(num_pages: int = 8, **kwargs) -> KVCache:
    return KVCache(LAYOUT, num_pages, **kwargs)


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def fill(cache: KVCache, name: str, tokens: np.ndarray) -> None:
    """Begin a sequence as an engine does, and compute all of `tokens`."""
    match = cache.match(tokens)
    cache.reserve(name, max(1, len(tokens)), match)
    cache.commit(name, tokens[match.num_tokens :])


def pages(cache: KVCache, name: str) -> list[int]:
    return cache.page_tables([name])[0].tolist()


def test_layers_are_zeroed_pages_of_k_and_v():
    cache = make(5)
    assert len(cache.layers) == 2
    for k, v in cache.layers:
        for tensor in (k, v):
            assert tensor.shape == (5, 3, 4, 8)
            assert tensor.dtype == torch.bfloat16
            assert tensor.device == torch.device("cpu")
            assert tensor.is_contiguous()
            assert not tensor.any()
    assert (cache.page_size, cache.num_pages) == (4, 5)


def test_bytes_per_page_are_what_the_tensors_take():
    cache = make(5)
    taken = sum(tensor.nbytes for layer in cache.layers for tensor in layer)
    assert taken == 5 * LAYOUT.bytes_per_page == 5 * (2 * 2 * 3 * 4 * 8) * 2


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "page_size"])
def test_layout_refuses_sizes_below_one(name):
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "page_size": 16, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        KVLayout(dtype=torch.float32, **sizes)


def test_layout_refuses_integers():
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; expected a floating-point type"):
        KVLayout(1, 1, 8, torch.int8)


def test_a_cache_has_a_page():
    with pytest.raises(ValueError, match="num_pages is 0"):
        make(0)


def test_full_pages_are_shared_and_partial_ones_never():
    cache = make()
    fill(cache, "a", np.arange(10, dtype=np.int32))
    match = cache.match(np.arange(10, dtype=np.int32))
    assert (match.num_tokens, match.pages[:, 0].tolist()) == (
        8,
        pages(cache, "a")[:2],
    )
    cache.reserve("b", 10, match)
    assert pages(cache, "b")[:2] == pages(cache, "a")[:2]
    assert pages(cache, "b")[2] != pages(cache, "a")[2]
    assert cache.stats().pages_used == 4


def test_a_page_is_found_only_after_the_same_tokens():
    cache = make()
    fill(cache, "a", ids(1, 1, 1, 1, 2, 2, 2, 2))
    assert cache.match(ids(2, 2, 2, 2)).num_tokens == 0
    assert cache.match(ids(3, 3, 3, 3, 2, 2, 2, 2)).num_tokens == 0
    assert cache.match(ids(1, 1, 1, 1, 3, 2, 2, 2)).num_tokens == 4
    assert cache.match(ids(1, 1, 1, 1, 2, 2, 2, 2, 2)).num_tokens == 8
    assert cache.match(ids(1, 1, 1)).num_tokens == 0
    assert cache.match(ids()).num_tokens == 0


def test_tokens_may_be_committed_one_by_one():
    cache = make()
    cache.reserve("a", 9)
    for token in range(9):
        assert cache.match(np.arange(9)).num_tokens == token // 4 * 4
        cache.commit("a", ids(token))
    assert cache.match(np.arange(9)).num_tokens == 8


def test_released_pages_are_found_until_they_are_needed_least_recently_used_first():
    cache = make(4)
    old, new = ids(1, 1, 1, 1, 1), ids(2, 2, 2, 2, 2)
    fill(cache, "old", old)
    fill(cache, "new", new)
    cache.release("old")
    cache.release("new")
    stats = cache.stats()
    assert (stats.pages_used, stats.pages_cached, stats.pages_free) == (0, 2, 2)
    fill(cache, "again", old)  # now `new` is the one not used for longest
    cache.release("again")
    cache.reserve("big", 3 * 4)
    assert cache.stats().evictions == 1
    assert cache.match(new).num_tokens == 0
    assert cache.match(old).num_tokens == 4


def test_a_prefix_outlives_what_builds_on_it():
    cache = make(4)
    tokens = np.arange(16, dtype=np.int32)
    fill(cache, "a", tokens)
    cache.release("a")
    for taken in range(1, 5):
        cache.reserve(f"b{taken}", 4)
        assert cache.match(tokens).num_tokens == 16 - 4 * taken
    cache.check_integrity()


def test_the_page_of_a_running_sequence_is_never_taken():
    cache = make(3)
    fill(cache, "a", np.arange(8, dtype=np.int32))
    assert cache.can_reserve("b", 4)
    assert not cache.can_reserve("b", 5)
    with pytest.raises(OutOfPages, match="2 pages of KV were asked for, and 1 of 3 are available"):
        cache.reserve("b", 5)
    cache.check_integrity()
    assert cache.match(np.arange(8)).num_tokens == 8


def test_a_match_is_not_counted_as_room_for_the_rest():
    """Matched pages that nobody refers to can be taken, but not by the sequence that uses them."""
    cache = make(3)
    tokens = np.arange(8, dtype=np.int32)
    fill(cache, "a", tokens)
    cache.release("a")
    match = cache.match(tokens)
    assert cache.can_reserve("b", 12, match)
    assert not cache.can_reserve("b", 13, match)
    with pytest.raises(OutOfPages):
        cache.reserve("b", 13, match)
    assert cache.match(tokens).pages.tolist() == match.pages.tolist()  # nothing has changed
    cache.reserve("b", 12, match)
    assert pages(cache, "b")[:2] == match.pages[:, 0].tolist()
    assert cache.stats().evictions == 0


def test_a_match_out_of_date_is_refused():
    cache = make(2)
    tokens = np.arange(8, dtype=np.int32)
    fill(cache, "a", tokens)
    cache.release("a")
    match = cache.match(tokens)
    cache.reserve("thief", 4)
    for call in (cache.can_reserve, cache.reserve):
        with pytest.raises(ValueError, match="out of date"):
            call("b", 8, match)
    cache.commit("thief", ids(7, 7, 7, 7))  # the page can be found again, but under another name
    with pytest.raises(ValueError, match="out of date"):
        cache.reserve("b", 8, match)


def test_a_recomputed_prefix_makes_longer_ones_findable_again():
    """Two sequences compute the same page; the copy that can be found goes, then comes back."""
    cache = make(4)
    first, second = ids(1, 1, 1, 1), ids(2, 2, 2, 2)
    cache.reserve("a", 4)
    cache.reserve("b", 8)
    cache.commit("a", first)
    cache.commit("b", first)  # a copy; that of `a` stays the one to find
    cache.commit("b", second)
    both = np.concatenate((first, second))
    assert cache.match(both).pages[:, 0].tolist() == [*pages(cache, "a"), pages(cache, "b")[1]]
    cache.release("a")
    cache.reserve("c", 8)  # takes the free page and that of `a`
    assert cache.match(both).num_tokens == 0
    cache.check_integrity()
    cache.release("c")
    fill(cache, "d", first)
    assert cache.match(both).num_tokens == 8
    cache.check_integrity()


def test_a_sequence_goes_on_after_the_page_that_stands_for_its_prefix_was_taken():
    """As above, but the copy goes before anything builds on it."""
    cache = make(4)
    first, second = ids(1, 1, 1, 1), ids(2, 2, 2, 2)
    cache.reserve("a", 4)
    cache.reserve("b", 8)
    cache.commit("a", first)
    cache.commit("b", first)
    cache.release("a")
    cache.reserve("c", 8)
    cache.commit("b", second)
    cache.check_integrity()
    cache.release("c")
    fill(cache, "d", first)
    assert cache.match(np.concatenate((first, second))).num_tokens == 8


def test_a_match_is_out_of_date_when_any_of_its_pages_is():
    cache = make(4)
    first, second = ids(1, 1, 1, 1), ids(2, 2, 2, 2)
    cache.reserve("a", 4)
    cache.reserve("b", 8)
    cache.commit("a", first)
    cache.commit("b", first)
    cache.commit("b", second)
    cache.release("a")
    match = cache.match(np.concatenate((first, second)))  # the page of `a`, then one of `b`
    cache.reserve("c", 8)  # takes that of `a`
    with pytest.raises(ValueError, match="out of date"):
        cache.reserve("d", 8, match)


def test_copies_that_cannot_be_found_are_free_after_release():
    cache = make(4)
    for name in ("a", "b"):
        cache.reserve(name, 4)
    for name in ("a", "b"):
        cache.commit(name, ids(1, 1, 1, 1))
    cache.release("b")
    assert cache.stats().pages_cached == 0
    cache.release("a")
    assert cache.stats().pages_cached == 1
    cache.check_integrity()


def test_without_prefix_caching_nothing_is_found_or_kept():
    cache = make(prefix_caching=False)
    fill(cache, "a", np.arange(8, dtype=np.int32))
    assert cache.match(np.arange(8)).num_tokens == 0
    cache.release("a")
    stats = cache.stats()
    assert (stats.pages_cached, stats.pages_free, stats.queried_tokens) == (0, 8, 0)
    cache.check_integrity()


def test_stats_count_each_match_that_was_used():
    cache = make()
    tokens = np.arange(9, dtype=np.int32)
    fill(cache, "a", tokens)
    cache.match(tokens)  # looks, but takes nothing
    fill(cache, "b", tokens)
    assert cache.stats() == KVCacheStats(
        pages_total=8,
        pages_used=4,
        pages_cached=0,
        pages_free=4,
        queried_tokens=18,
        hit_tokens=8,
        hit_tokens_by_tier={"device": 8, "host": 0, "disk": 0},
        evictions=0,
    )


def test_reserve_never_takes_pages_away():
    cache = make()
    cache.reserve("a", 12)
    before = pages(cache, "a")
    cache.reserve("a", 1)
    assert pages(cache, "a") == before


def test_page_tables_grow_with_the_number_and_length_of_sequences():
    cache = KVCache(KVLayout(1, 1, 8, torch.float32, page_size=1), 4000)
    lengths = {f"s{index}": 1 + index * 7 % 53 for index in range(100)}
    for name in lengths:
        cache.reserve(name, 1)
    for name, length in lengths.items():
        cache.reserve(name, length)
    table = cache.page_tables(list(lengths))
    assert table.shape == (100, 53)
    assert table.dtype == np.int32
    assert table.flags.c_contiguous
    taken = [
        page for row, length in zip(table, lengths.values(), strict=True) for page in row[:length]
    ]
    assert len(set(taken)) == len(taken) == sum(lengths.values())
    for row, length in zip(table, lengths.values(), strict=True):
        assert not row[length:].any()
    for name in lengths:
        cache.release(name)
    cache.reserve("fresh", 2)
    assert cache.page_tables(["fresh"]).shape == (1, 2)
    assert cache.page_tables([]).shape == (0, 0)


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((1, 2), dtype=np.int32),  # too narrow
        np.zeros((2, 3), dtype=np.int32),  # too many rows
        np.zeros((1, 3), dtype=np.int64),
        np.zeros(3, dtype=np.int32),
    ],
)
def test_page_tables_refuse_an_array_that_does_not_fit(out):
    cache = make()
    cache.reserve("a", 12)
    with pytest.raises(ValueError, match=r"expected int32 \(1, 3 or more\)"):
        cache.page_tables(["a"], out)


def test_unknown_sequences_are_refused():
    cache = make()
    for call in (
        lambda: cache.release("ghost"),
        lambda: cache.commit("ghost", ids(1)),
        lambda: cache.page_tables(["ghost"]),
    ):
        with pytest.raises(KeyError, match="No sequence 'ghost': it was released before, or never"):
            call()


def test_a_double_release_is_refused_and_harms_nobody():
    cache = make()
    fill(cache, "a", np.arange(8, dtype=np.int32))
    fill(cache, "b", np.arange(8, dtype=np.int32))
    cache.release("a")
    with pytest.raises(KeyError, match="released before"):
        cache.release("a")
    cache.check_integrity()
    assert cache.stats().pages_used == 2


def test_wrong_calls_say_what_is_wrong():
    cache = make()
    fill(cache, "a", np.arange(8, dtype=np.int32))
    match = cache.match(np.arange(8))
    with pytest.raises(ValueError, match="num_tokens of sequence 'b' is 0; expected at least 1"):
        cache.reserve("b", 0)
    with pytest.raises(ValueError, match="which has begun before"):
        cache.reserve("a", 12, match)
    with pytest.raises(ValueError, match="its match has 8 already"):
        cache.reserve("b", 7, match)
    with pytest.raises(ValueError, match="has filled 8 of 8 token slots; reserve more first"):
        cache.commit("a", ids(1))
    cache.check_integrity()


def test_integrity_check_finds_a_lost_reference():
    cache = make()
    fill(cache, "a", np.arange(8, dtype=np.int32))
    fill(cache, "b", np.arange(8, dtype=np.int32))
    page = pages(cache, "a")[0]
    cache._device.pool._references[page] -= 1
    with pytest.raises(RuntimeError, match=f"page {page} has 2 holders, but 1 references"):
        cache.check_integrity()


def test_integrity_check_finds_a_page_that_is_free_and_used():
    cache = make()
    cache.reserve("a", 4)
    cache._device.pool._free.append(pages(cache, "a")[0])
    with pytest.raises(RuntimeError, match="page pool is broken"):
        cache.check_integrity()


def test_integrity_check_finds_a_leaked_page():
    cache = make()
    cache._device.pool._free.pop()
    with pytest.raises(RuntimeError, match=r"page pool is broken: pages \[0\]"):
        cache.check_integrity()


def test_integrity_check_finds_a_prefix_that_is_not_held():
    cache = make()
    fill(cache, "a", np.arange(8, dtype=np.int32))
    cache._index.hold(cache._entries["a"].node)
    with pytest.raises(RuntimeError, match="a prefix has 1 holders, but counts 2"):
        cache.check_integrity()


def test_integrity_check_finds_an_index_that_points_elsewhere():
    cache = make()
    fill(cache, "a", np.arange(8, dtype=np.int32))
    first, second = pages(cache, "a")
    nodes = cache._device.nodes
    nodes[first], nodes[second] = nodes[second], nodes[first]
    with pytest.raises(RuntimeError, match=f"page {first} is not what its prefix says"):
        cache.check_integrity()


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("count", range(12))
def test_a_fork_may_begin_with_fewer_tokens_than_were_committed(count, prefix_caching):
    """As when another answer to a prompt begins after the first one has gone on."""
    cache = make(16, prefix_caching=prefix_caching)
    tokens = np.arange(11, dtype=np.int32)
    fill(cache, "a", tokens)
    cache.fork("a", "b", count)
    shared = count // 4
    assert pages(cache, "a")[:shared] == pages(cache, "b")[:shared]
    cache.reserve("b", 12)
    assert not set(pages(cache, "a")[shared:]) & set(pages(cache, "b")[shared:])
    other = np.append(tokens[:count], np.arange(50, 62 - count, dtype=np.int32))
    cache.commit("b", other[count:])
    cache.check_integrity()
    assert cache.match(other).num_tokens == (12 if prefix_caching else 0)
    assert cache.match(tokens).num_tokens == (8 if prefix_caching else 0)
    cache.reserve("a", 20)
    for name in "ab":
        cache.release(name)
    cache.check_integrity()
    assert cache.stats().pages_used == 0


def test_a_fork_of_more_than_there_is_is_refused():
    cache = make()
    fill(cache, "a", np.arange(6, dtype=np.int32))
    for count in (-1, 7):
        with pytest.raises(ValueError, match=f"fork of {count} tokens of sequence 'a'.* 6"):
            cache.fork("a", "b", count)
    assert cache.num_available == 6


@pytest.mark.parametrize("native_index", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_many_at_once_is_the_same_as_one_by_one(native_index, prefix_caching):
    """grow and commit_pages beside reserve and commit, some sequences with equal tokens."""
    rng = np.random.default_rng(0)
    options = {"native_index": native_index, "prefix_caching": prefix_caching}
    one, many = make(200, **options), make(200, **options)
    names = [f"s{number}" for number in range(6)]
    for name in names:
        first = rng.integers(0, 2, 4, dtype=np.int32)
        for cache in (one, many):
            fill(cache, name, first)
    for step in range(2, 8):
        tokens = rng.integers(0, 2, (len(names), 4), dtype=np.int32)
        for name, row in zip(names, tokens, strict=True):
            one.reserve(name, 4 * step)
            one.commit(name, row)
        many.grow(names)
        many.commit_pages(names, tokens)
        for cache in (one, many):
            cache.check_integrity()
        assert one.num_available == many.num_available
    assert np.array_equal(one.page_tables(names), many.page_tables(names))
    for length in (8, 12, 28):
        probe = rng.integers(0, 2, length, dtype=np.int32)
        assert one.match(probe).num_tokens == many.match(probe).num_tokens
    for cache in (one, many):
        for name in names:
            cache.release(name)
        cache.check_integrity()
    assert one.stats() == many.stats()


def test_many_at_once_all_or_nothing():
    cache = make(4)
    for name in "ab":
        fill(cache, name, np.arange(4, dtype=np.int32) + ord(name))
    with pytest.raises(OutOfPages):
        cache.grow(["a", "b", "a"])
    with pytest.raises(KeyError, match="No sequence 'c'"):
        cache.grow(["a", "c"])
    assert cache.num_available == 2
    cache.grow(["a"])
    page = np.zeros((2, 4), dtype=np.int32)
    with pytest.raises(ValueError, match="sequence 'b', which has no such page"):
        cache.commit_pages(["a", "b"], page)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \(2, 4\)"):
        cache.commit_pages(["a", "b"], page[:, :3])
    cache.commit("a", ids(1))
    with pytest.raises(ValueError, match="has filled a part of it"):
        cache.commit_pages(["a"], page[:1])
    with pytest.raises(KeyError, match="No sequence 'c'"):
        cache.page_tables(["a", "c"])
    cache.check_integrity()


def test_growing_a_forked_sequence_gives_it_a_page_of_its_own():
    cache = make(8)
    fill(cache, "a", np.arange(6, dtype=np.int32))
    cache.fork("a", "b")
    cache.grow(["a", "b"])
    assert pages(cache, "a")[0] == pages(cache, "b")[0]
    assert not set(pages(cache, "a")[1:]) & set(pages(cache, "b")[1:])
    cache.check_integrity()

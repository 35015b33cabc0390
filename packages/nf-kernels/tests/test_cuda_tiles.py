"""The table of tiles, and the choice among them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_kernels.cuda.tiles import SCHEDULES, Tile, all_tiles, best_tile, estimate_cycles, find_tile

SIZES = st.integers(1, 40000)
DECODE, PREFILL = 1, 2048
LLAMA_3_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # rows, columns of weight

each_tile = pytest.mark.parametrize("tile", all_tiles(), ids=str)


def test_names_are_unique_and_found():
    names = [tile.name for tile in all_tiles()]
    assert len(set(names)) == len(names)
    assert [find_tile(name, all_tiles()) for name in names] == list(all_tiles())


@each_tile
def test_a_tile_is_one_that_the_hardware_has(tile):
    assert tile.schedule in SCHEDULES
    first, second = (tile.columns, tile.rows) if tile.swapped else (tile.rows, tile.columns)
    # The tensor cores multiply 64 rows by a multiple of 8 columns; cooperative groups share two.
    assert first % (64 if tile.schedule == "pingpong" else 128) == 0
    assert second % 8 == 0
    assert second <= 256
    assert tile.depth % 64 == 0
    stage_bytes = 2 * (tile.rows + tile.columns) * tile.depth
    assert 3 * stage_bytes < 227 * 1024  # of shared memory


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"tile is '7x7'; expected one of 16x64x128_1x1_pingpong"):
        find_tile("7x7", all_tiles())


@given(m=SIZES, n=SIZES, k=SIZES, sm_count=st.integers(1, 132))
def test_no_estimate_beats_the_hardware(m, n, k, sm_count):
    for tile in all_tiles():
        if tile.cluster_size > sm_count:
            continue
        cycles = estimate_cycles(tile, m=m, n=n, k=k, sm_count=sm_count)
        assert cycles > 2 * m * n * k / (4096 * sm_count)
        assert cycles > 2 * (m * k + n * k + m * n) / 2600


@given(m=SIZES, n=SIZES, k=SIZES, sm_count=st.integers(1, 132))
def test_the_best_tile_is_no_worse_than_any_that_fits(m, n, k, sm_count):
    best = best_tile(all_tiles(), m=m, n=n, k=k, sm_count=sm_count)
    assert best.cluster_size <= sm_count
    cycles = estimate_cycles(best, m=m, n=n, k=k, sm_count=sm_count)
    for tile in all_tiles():
        if tile.cluster_size <= sm_count:
            assert cycles <= estimate_cycles(tile, m=m, n=n, k=k, sm_count=sm_count)


def test_an_estimate_by_hand():
    tile = Tile(128, 128, 64, (1, 1), "cooperative", swapped=False)
    # 2·3 tiles on 4 SMs are two rounds of 2 steps; a step multiplies for 512 cycles and loads for
    # 512; each round ends with 1500 cycles and the writing of 128·128·2 bytes.
    expected = 2 * 2 * (512 + 512 / 4) + 2 * (1500 + 512)
    assert estimate_cycles(tile, m=256, n=384, k=128, sm_count=4) == expected
    # Pingpong hides the writing of the first round.
    pingpong = dataclasses.replace(tile, schedule="pingpong")
    assert estimate_cycles(pingpong, m=256, n=384, k=128, sm_count=4) == expected - 2012
    # Shared by two SMs along the rows, half of weight is loaded.
    pair = dataclasses.replace(tile, cluster=(2, 1))
    assert estimate_cycles(pair, m=256, n=384, k=128, sm_count=4) == (
        2 * 2 * (512 + 384 / 4) + 2 * (1500 + 512)
    )


@pytest.mark.parametrize(("n", "k"), LLAMA_3_8B)
def test_few_rows_get_small_tiles_and_many_rows_large_ones(n, k):
    decode = best_tile(all_tiles(), m=DECODE, n=n, k=k, sm_count=132)
    prefill = best_tile(all_tiles(), m=PREFILL, n=n, k=k, sm_count=132)
    assert decode.rows == 16
    assert prefill.rows * prefill.columns == 128 * 256


def test_what_would_leave_sms_idle_is_cut_along_k():
    tile = best_tile(all_tiles(), m=128, n=4096, k=4096, sm_count=132)
    assert tile.schedule == "stream_k"


@pytest.mark.parametrize("size", ["m", "n", "k"])
def test_sizes_are_positive(size):
    with pytest.raises(ValueError, match=f"{size} is 0; expected 1 or more"):
        best_tile(all_tiles(), **({"m": 8, "n": 8, "k": 8, "sm_count": 8} | {size: 0}))


def test_too_few_sms_are_refused():
    with pytest.raises(ValueError, match="sm_count is 0; expected enough for one of 10 tiles"):
        best_tile(all_tiles(), m=8, n=8, k=8, sm_count=0)
    pair = find_tile("128x256x64_2x1_cooperative", all_tiles())
    with pytest.raises(ValueError, match=r"sm_count is 1; expected 2 or more, the cluster of 128x"):
        estimate_cycles(pair, m=8, n=8, k=8, sm_count=1)

"""A batch cut into nano-batches, beside what looking at one row after the other finds."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_plans import RandomBatch, batches

from nf_runtime.graph import Rows
from nf_runtime.pipeline.division import Division, divide
from nf_runtime.pipeline.plan import NanoBatch, Phase

SHARES = st.floats(0, 1, exclude_min=True)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[NanoBatch, ...]:
    if draw(st.booleans()):
        shares = draw(st.lists(SHARES, min_size=1, max_size=16))
        return tuple(NanoBatch(share=share) for share in shares)
    decodes = draw(st.lists(SHARES, min_size=1, max_size=8))
    prefills = draw(st.lists(SHARES, min_size=1, max_size=8))
    return (
        *(NanoBatch(share=share, phase=Phase.DECODE) for share in decodes),
        *(NanoBatch(share=share, phase=Phase.PREFILL) for share in prefills),
    )


def batch(num_decodes: int, *prefills: int) -> RandomBatch:
    lengths = np.array(prefills, dtype=np.int64)
    return RandomBatch(num_decodes, lengths, np.zeros(num_decodes + len(lengths), np.int64), 1)


def division_of(drawn: RandomBatch, nano_batches: tuple[NanoBatch, ...]) -> Division:
    return divide(nano_batches, drawn.num_decodes, drawn.prefills, selected=drawn.selected)


def halves(count: int = 2) -> tuple[NanoBatch, ...]:
    return (NanoBatch(),) * count


BY_PHASE = (NanoBatch(phase=Phase.DECODE), NanoBatch(phase=Phase.PREFILL))


@settings(deadline=None)
@given(batches(max_decodes=40, max_chunk=300), cuts())
@example(batch(0, 1), halves(16))
@example(batch(3), BY_PHASE)
@example(batch(0, 7), BY_PHASE)
@example(batch(0, 100_003), halves(3))
@example(batch(5, 5, 1, 1, 9), halves(4))
def test_a_division_is_what_its_rows_say(
    drawn: RandomBatch, nano_batches: tuple[NanoBatch, ...]
) -> None:
    division = division_of(drawn, nano_batches)
    count, decodes, tokens = len(nano_batches), drawn.num_decodes, drawn.num_tokens
    request = np.repeat(np.arange(len(drawn.prefills)), drawn.prefills)  # of each prefill row
    owner = np.repeat(np.arange(count), np.diff(division.bounds))  # nano-batch of each row

    # Bounds tile the batch.
    assert len(division.bounds) == count + 1
    assert division.bounds[0] == 0
    assert division.bounds[-1] == tokens
    assert all(low <= high for low, high in pairwise(division.bounds))
    assert division.num_occupied == len(np.unique(owner))
    # No nano-batch has rows of the other phase.
    for i, nano_batch in enumerate(nano_batches):
        if nano_batch.phase is Phase.DECODE:
            assert (np.flatnonzero(owner == i) < decodes).all()
        if nano_batch.phase is Phase.PREFILL:
            assert (np.flatnonzero(owner == i) >= decodes).all()

    # A segment is what one nano-batch has of one request; those of a nano-batch follow each other.
    starts, requests = division.segment_start, division.segment_request
    expected = list(dict.fromkeys(zip(owner[decodes:].tolist(), request.tolist(), strict=True)))
    assert starts[0] == 0
    assert starts[-1] == tokens - decodes
    assert (np.diff(starts) > 0).all()
    found = []
    for i in range(count):
        for segment in range(division.first_segment[i], division.first_segment[i + 1]):
            found.append((i, int(requests[segment])))
            rows = slice(starts[segment], starts[segment + 1])
            assert set(request[rows].tolist()) == {int(requests[segment])}
            assert set(owner[decodes:][rows].tolist()) == {i}
    assert found == expected
    assert len(requests) == len(expected) == len(starts) - 1

    # The structure.
    structure = division.structure
    assert structure.num_nano_batches == count
    assert structure.has_selected == (drawn.selected > 0)
    for i in range(count):
        mine = np.flatnonzero(owner == i)
        assert bool(structure.occupied >> 2 * i & 1) == bool((mine < decodes).any())
        assert bool(structure.occupied >> 2 * i + 1 & 1) == bool((mine >= decodes).any())
        of_mine = np.isin(request, request[owner[decodes:] == i])
        sources = owner[decodes:][of_mine]
        assert structure.context_from[i] == (sources.min() if len(sources) else i)
    assert structure.occupied < structure.selected


@settings(deadline=None)
@given(batches(max_decodes=40, max_chunk=300), cuts(), st.data())
def test_rows_and_requests_of_ranges(
    drawn: RandomBatch, nano_batches: tuple[NanoBatch, ...], data: st.DataObject
) -> None:
    division = division_of(drawn, nano_batches)
    first = data.draw(st.integers(0, len(nano_batches) - 1))
    end = data.draw(st.integers(first + 1, len(nano_batches)))
    rows = set(range(division.bounds[first], division.bounds[end]))
    decodes = {row for row in rows if row < drawn.num_decodes}
    assert set(range(*division.rows(Rows.ALL, first, end))) == rows
    assert set(range(*division.rows(Rows.DECODE, first, end))) == decodes
    assert set(range(*division.rows(Rows.PREFILL, first, end))) == rows - decodes
    assert set(range(*division.requests(Rows.DECODE, first, end))) == decodes
    segments = range(*division.requests(Rows.PREFILL, first, end))
    starts = (division.segment_start + drawn.num_decodes).tolist()
    found = {row for s in segments for row in range(starts[s], starts[s + 1])}
    assert found == rows - decodes
    structure = division.structure
    occupied = [i for i in range(first, end) if division.bounds[i] < division.bounds[i + 1]]
    cells = structure.cells(Rows.ALL, first, end)
    assert bool(cells & structure.occupied) == bool(occupied)
    assert cells == structure.cells(Rows.DECODE, first, end) | structure.cells(
        Rows.PREFILL, first, end
    )


@settings(deadline=None)
@given(batches(), cuts())
def test_shares_are_kept_to_half_a_token(
    drawn: RandomBatch, nano_batches: tuple[NanoBatch, ...]
) -> None:
    division = division_of(drawn, nano_batches)
    for phase in Phase:
        shares = [n.share for n in nano_batches if n.phase is phase]
        if not shares:
            continue
        rows = {
            Phase.ALL: (0, drawn.num_tokens),
            Phase.DECODE: (0, drawn.num_decodes),
            Phase.PREFILL: (drawn.num_decodes, drawn.num_tokens),
        }[phase]
        ends = [division.bounds[i + 1] for i, n in enumerate(nano_batches) if n.phase is phase]
        wanted = rows[0] + np.cumsum(shares) / np.sum(shares) * (rows[1] - rows[0])
        assert np.abs(ends - wanted).max() <= 0.5 + 1e-6


def test_the_later_part_of_a_prompt_attends_to_the_earlier_nano_batch() -> None:
    division = division_of(batch(2, 4, 10, 2), halves(3))
    assert division.bounds == (0, 6, 12, 18)
    assert division.segment_request.tolist() == [0, 1, 1, 2]
    assert division.segment_start.tolist() == [0, 4, 10, 14, 16]
    assert division.first_segment == (0, 1, 2, 4)
    assert division.structure.context_from == (0, 1, 1)


def test_more_nano_batches_than_tokens_leaves_some_empty() -> None:
    division = division_of(batch(1, 1), halves(8))
    assert division.num_occupied == 2
    assert bin(division.structure.occupied).count("1") == 2
    assert len(division.segment_request) == 1


def test_batches_alike_have_one_structure() -> None:
    mine = division_of(batch(3, 40), halves())
    other = division_of(batch(5, 90), halves())
    assert mine.structure == other.structure
    assert hash(mine.structure) == hash(other.structure)
    assert division_of(batch(3, 22, 18), halves()).structure == mine.structure
    assert division_of(batch(3, 18, 22), halves()).structure == mine.structure
    assert division_of(batch(3, 19, 22), halves()).structure != mine.structure


@pytest.mark.parametrize("nano_batches", [halves(1), halves(3), BY_PHASE])
def test_a_batch_without_prefills(nano_batches: tuple[NanoBatch, ...]) -> None:
    division = division_of(batch(7), nano_batches)
    assert division.segment_start.tolist() == [0]
    assert division.first_segment == (0,) * (len(nano_batches) + 1)
    assert division.structure.context_from == tuple(range(len(nano_batches)))

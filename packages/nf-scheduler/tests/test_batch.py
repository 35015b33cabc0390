"""Batches travel as bytes and arrive as they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nf_scheduler import Batch


def int32s(size: int):
    return hnp.arrays(np.int32, size)


@st.composite
def batches(draw):
    names = draw(st.lists(st.text(max_size=8), max_size=6))
    n = len(names)
    return Batch(
        iteration=draw(st.integers(0, 2**62)),
        request_ids=names,
        slots=draw(int32s(n)),
        num_decodes=draw(st.integers(0, n)),
        query_start=draw(int32s(n + 1)),
        context_lens=draw(int32s(n)),
        token_ids=draw(int32s(draw(st.integers(0, 40)))),
        samples=draw(hnp.arrays(np.bool_, n)),
    )


def example() -> Batch:
    return Batch(
        iteration=3,
        request_ids=["a", "prompt-é"],
        slots=np.array([1, 0], dtype=np.int32),
        num_decodes=1,
        query_start=np.array([0, 1, 4], dtype=np.int32),
        context_lens=np.array([9, 0], dtype=np.int32),
        token_ids=np.array([-1, 5, 6, 7], dtype=np.int32),
        samples=np.array([True, False]),
    )


@given(batch=batches())
def test_round_trip_is_exact(batch):
    copy = Batch.from_bytes(batch.to_bytes())
    assert copy == batch
    assert copy.to_bytes() == batch.to_bytes()
    for name in ("slots", "query_start", "context_lens", "token_ids", "samples"):
        assert getattr(copy, name).dtype == getattr(batch, name).dtype
        assert getattr(copy, name).flags.writeable


@given(cut=st.integers(0, len(example().to_bytes()) - 1))
def test_a_batch_cut_short_is_refused(cut):
    with pytest.raises(ValueError, match=r"cut short|do not begin with its header"):
        Batch.from_bytes(example().to_bytes()[:cut])


def test_other_bytes_are_refused():
    data = example().to_bytes()
    with pytest.raises(ValueError, match="do not begin with its header"):
        Batch.from_bytes(b"x" + data[1:])
    with pytest.raises(ValueError, match="format version 9; expected 1"):
        Batch.from_bytes(data[:4] + b"\x09" + data[5:])
    with pytest.raises(ValueError, match="1 bytes too many"):
        Batch.from_bytes(data + b"\0")


def test_the_format_does_not_change_by_accident():
    assert example().to_bytes().hex() == (
        "4e464254010000000300000000000000020000000100000004000000"
        "0100000000000000"
        "000000000100000004000000"
        "0900000000000000"
        "ffffffff050000000600000007000000"
        "0100"
        "0100000009000000"
        "61" + "prompt-é".encode().hex()
    )


@pytest.mark.parametrize(
    "field", ["iteration", "request_ids", "num_decodes", "slots", "query_start", "samples"]
)
def test_batches_differ_when_any_field_does(field):
    other = example()
    value = getattr(other, field)
    if isinstance(value, np.ndarray):
        value[0] = not value[0]
    else:
        setattr(other, field, value + value if isinstance(value, list) else value + 1)
    assert other != example()
    assert example() == example()
    assert example() != "a batch"


def test_size():
    assert (len(example()), example().num_tokens) == (2, 4)

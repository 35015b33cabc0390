"""Matrix products with packed weights, and rows of packed tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels import num_threads, set_num_threads
from nf_kernels.ops import REFERENCE, packing

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.one_of(st.integers(1, 200), st.sampled_from([32, 64, 65, 96, 256]))
PADS = st.sampled_from([0, 1, 8, 13])
SEEDS = st.integers(0, 2**20)
quick = settings(max_examples=100, deadline=None)


@given(SIZES, SIZES, DTYPES, SEEDS)
@quick
def test_packing_can_be_undone(out_features, in_features, dtype, seed):
    torch.manual_seed(seed)
    weight = torch.randn(out_features, in_features).to(dtype)
    packed = packing.pack(weight.clone())
    assert packed.shape == packing.packed_shape(out_features, in_features, dtype)
    assert torch.equal(packing.unpack(packed, out_features, in_features), weight)
    experts = torch.randn(3, out_features, 2 * in_features).to(dtype)
    packed = packing.pack(experts.clone())
    assert torch.equal(packing.unpack(packed, out_features, 2 * in_features), experts)


def test_a_weight_that_fills_its_blocks_is_packed_where_it_is():
    weight = torch.randn(64, 1000)
    assert packing.pack(weight).data_ptr() == weight.data_ptr()


def test_large_weights_are_packed_piece_by_piece(monkeypatch):
    weight = torch.randn(320, 100).bfloat16()
    whole = packing.pack(weight.clone())
    monkeypatch.setattr(packing, "_PIECE_BYTES", 3 * 32 * 100 * 2)
    assert torch.equal(packing.pack(weight.clone()), whole)


@given(
    rows=st.one_of(st.integers(0, 20), st.sampled_from([191, 192, 193, 400])),
    out_features=SIZES,
    in_features=SIZES,
    dtype=DTYPES,
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    pad=PADS,
    seed=SEEDS,
)
@quick
def test_linear(
    native,
    row_view,
    assert_only_view_written,
    rows,
    out_features,
    in_features,
    dtype,
    extras,
    pad,
    seed,
):
    torch.manual_seed(seed)
    has_bias, has_residual, in_place, float_out = extras
    x = row_view(torch.randn(rows, in_features).to(dtype), pad)
    weight = torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    residual = row_view(torch.randn(rows, out_features).to(dtype), pad) if has_residual else None
    exact = x.double() @ weight.double().t()
    exact += bias.double() if bias is not None else 0
    exact += residual.double() if residual is not None else 0
    out_dtype = torch.float32 if float_out else dtype
    fresh = row_view(torch.zeros(rows, out_features, dtype=out_dtype), pad)
    out = residual if residual is not None and in_place else fresh
    native["linear"](x=x, weight=native.pack(weight.clone()), bias=bias, residual=residual, out=out)
    # Against float64: float32 sums, and one rounding to the dtype.
    size = x.double().abs() @ weight.double().abs().t() + 2
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[out.dtype]
    assert ((out.double() - exact).abs() <= 1e-6 * size + unit * exact.abs() + 1e-7).all()
    assert_only_view_written(out, pad)


@given(st.integers(2, 50), st.integers(1, 100), SIZES, DTYPES, SEEDS, st.data())
@quick
def test_a_row_of_a_product_depends_on_that_row_alone(
    native, rows, out_features, in_features, dtype, seed, data
):
    torch.manual_seed(seed)
    x = torch.randn(rows, in_features).to(dtype)
    weight = native.pack(torch.randn(out_features, in_features).to(dtype))
    bias = torch.randn(out_features).to(dtype)
    whole = torch.empty(rows, out_features, dtype=dtype)
    native["linear"](x=x, weight=weight, bias=bias, out=whole)
    picked = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=30)))
    part = torch.empty(len(picked), out_features, dtype=dtype)
    native["linear"](x=x[picked], weight=weight, bias=bias, out=part)
    assert torch.equal(part, whole[picked])


def test_threads_change_no_product(native):
    x, weight = torch.randn(300, 500).bfloat16(), torch.randn(700, 500).bfloat16()
    packed = native.pack(weight)
    before, results = num_threads(), []
    for threads in (1, 2, 5):
        set_num_threads(threads)
        results.append(torch.empty(300, 700, dtype=torch.bfloat16))
        native["linear"](x=x, weight=packed, out=results[-1])
    set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "width"), [(70, 24), (64, 33), (1, 1)])
def test_rows_of_a_table(native, dtype, vocabulary, width):
    table = torch.randn(vocabulary, width).to(dtype)
    ids = torch.randint(vocabulary, (9,))
    expected = table[ids]
    for source in (table, native.pack(table.clone())):
        out = torch.zeros(9, width, dtype=dtype)
        native["embedding"](token_ids=ids, table=source, out=out)
        assert torch.equal(out, expected)
    wide = torch.zeros(9, width + 3, dtype=dtype)
    native["gather_rows"](x=table, index=ids, out=wide[:, 1:-2])
    assert torch.equal(wide[:, 1:-2], expected)
    assert not wide[:, 0].any()
    assert not wide[:, -2:].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.randn(40, 8)}, r"weight is \[40, 8\], not packed; expected \[2, 8, 32\]"),
        ({"weight": packing.pack(torch.randn(40, 9))}, r"weight is .*expected .*\[2, 8, 32\]"),
        ({"x": torch.randn(3, 8).bfloat16()}, "out is torch.float32|weight is torch.float32"),
        ({"out": torch.zeros(2, 40)}, r"out is .*expected .*\[3, any\]"),
        ({"bias": torch.zeros(39)}, "bias is"),
        ({"residual": torch.zeros(3, 39)}, "residual is"),
        ({"x": torch.randn(3, 16)[:, ::2]}, "x has stride 2"),
    ],
)
def test_wrong_arguments_of_a_product_are_refused(native, changed, message):
    arguments = {
        "x": torch.randn(3, 8),
        "weight": packing.pack(torch.randn(40, 8)),
        "out": torch.zeros(3, 40),
    }
    native["linear"](**arguments)
    arguments["out"].zero_()
    arguments |= changed
    with pytest.raises(ValueError, match=message):
        native["linear"](**arguments)
    assert not arguments["out"].any()


@pytest.mark.parametrize("wrong", [-1, 40])
def test_a_row_that_is_not_in_the_table_is_refused(native, wrong):
    out = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=rf"token_ids\[1\] is {wrong}; expected 0 to 39"):
        native["embedding"](token_ids=torch.tensor([3, wrong]), table=torch.randn(40, 8), out=out)
    with pytest.raises(ValueError, match=rf"index\[1\] is {wrong}; expected 0 to 39"):
        native["gather_rows"](index=torch.tensor([3, wrong]), x=torch.randn(40, 8), out=out)
    assert not out.any()


def test_reference_takes_weights_as_they_are():
    weight = torch.randn(5, 7)
    assert REFERENCE.pack(weight) is weight

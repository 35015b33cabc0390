"""Every native operation gives what the reference gives, whatever the shapes, views and pages.

Results in bfloat16 and float16 are compared with the reference in float32 on the same inputs, so
that nothing but the last rounding may differ.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels import num_threads, set_num_threads
from nf_kernels.ops import REFERENCE

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HEAD_DIMS = st.one_of(
    st.integers(1, 32).map(lambda n: 8 * n),
    st.sampled_from([64, 128]),  # compiled for this size
)
PADS = st.sampled_from([0, 1, 8, 13])
SEEDS = st.integers(0, 2**20)
quick = settings(max_examples=100, deadline=None)


@given(st.integers(1, 40), st.integers(1, 600), DTYPES, PADS, SEEDS)
@quick
def test_rms_norm(
    native, assert_close, row_view, assert_only_view_written, t, width, dtype, pad, s
):
    torch.manual_seed(s)
    x = row_view(3 * torch.randn(t, width).to(dtype), pad)
    weight = torch.randn(width).to(dtype)
    out = row_view(torch.zeros(t, width, dtype=dtype), pad)
    native["rms_norm"](x=x, weight=weight, eps=1e-5, out=out)
    expected = torch.empty(t, width, dtype=torch.float64)
    REFERENCE["rms_norm"](x=x.double(), weight=weight.double(), eps=1e-5, out=expected)
    assert_close(out, expected)
    assert_only_view_written(out, pad)


@given(st.integers(1, 40), st.integers(1, 600), DTYPES, PADS, SEEDS)
@quick
def test_swiglu(native, assert_close, row_view, assert_only_view_written, t, width, dtype, pad, s):
    torch.manual_seed(s)
    gate_up = row_view(5 * torch.randn(t, 2 * width).to(dtype), pad)
    out = row_view(torch.zeros(t, width, dtype=dtype), pad)
    native["swiglu"](gate_up=gate_up, out=out)
    expected = torch.empty(t, width, dtype=torch.float64)
    REFERENCE["swiglu"](gate_up=gate_up.double(), out=expected)
    assert_close(out, expected)
    assert_only_view_written(out, pad)


def test_swiglu_over_all_magnitudes(native):
    gate = torch.cat([torch.linspace(-120, 120, 24001), torch.tensor([-3e38, 3e38, 0.0])])
    out = torch.empty(1, len(gate))
    native["swiglu"](gate_up=torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0), out=out)
    exact = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(out[0].double(), exact, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(native, value):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(1, 40, dtype=dtype)
        x[0, 17] = value
        got, expected = torch.empty_like(x), torch.empty_like(x)
        for operations, out in ((native, got), (REFERENCE, expected)):
            operations["rms_norm"](x=x, weight=torch.ones(40, dtype=dtype), eps=0.0, out=out)
        assert torch.equal(got.isnan(), expected.isnan())
        gate_up = torch.cat([x, x], dim=1)
        for operations, out in ((native, got), (REFERENCE, expected)):
            operations["swiglu"](gate_up=gate_up, out=out)
        torch.testing.assert_close(got, expected, rtol=0.01, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_and_rounded_as_torch_does(native, dtype):
    up = torch.arange(2**16).to(torch.uint16).view(dtype)
    # silu of so large a gate is the gate; its product with a number is exact before it is rounded.
    gate = torch.linspace(100, 1000, len(up)).to(dtype)
    for scale in (gate, gate.flip(0), torch.full_like(gate, 128.0)):
        out = torch.empty(1, len(up), dtype=dtype)
        native["swiglu"](gate_up=torch.cat([scale, up]).unsqueeze(0), out=out)
        expected = (scale.float() * up.float()).to(dtype)
        torch.testing.assert_close(out[0], expected, rtol=0, atol=0, equal_nan=True)


@given(
    tokens=st.integers(1, 12),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    head_dim=HEAD_DIMS,
    page_size=st.sampled_from([1, 4, 16, 200]),
    norms=st.tuples(st.booleans(), st.booleans()),
    dtype=DTYPES,
    pad=PADS,
    seed=SEEDS,
)
@quick
def test_rope_append(
    native,
    assert_close,
    row_view,
    assert_only_view_written,
    tokens,
    heads,
    kv_heads,
    head_dim,
    page_size,
    norms,
    dtype,
    pad,
    seed,
):
    torch.manual_seed(seed)
    pages = 2 + tokens // page_size
    cache = torch.randn(pages, kv_heads, page_size, head_dim).to(dtype)
    qkv = row_view(torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype), pad)
    angles = torch.outer(torch.arange(50.0), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
    q_norm, k_norm = (torch.randn(head_dim).to(dtype) if on else None for on in norms)
    arguments = {
        "qkv": qkv,
        "positions": torch.randint(50, (tokens,)),
        "slots": torch.randperm(pages * page_size)[:tokens],
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": 1e-6,
    }
    out = row_view(torch.zeros(tokens, heads * head_dim, dtype=dtype), pad)
    k_cache, v_cache = cache.clone(), cache.clone()
    native["rope_append"](**arguments, k_cache=k_cache, v_cache=v_cache, out=out)

    wide = {
        n: a.double() if n in {"qkv", "q_norm", "k_norm"} and a is not None else a
        for n, a in arguments.items()
    }
    expected = torch.empty(out.shape, dtype=torch.float64)
    expected_k, expected_v = (cache.to(torch.float64, copy=True) for _ in range(2))
    REFERENCE["rope_append"](**wide, k_cache=expected_k, v_cache=expected_v, out=expected)
    assert_close(out, expected)
    assert_close(k_cache, expected_k)
    assert torch.equal(v_cache.double(), expected_v)
    assert_only_view_written(out, pad)
    untouched = torch.ones(pages * page_size, dtype=torch.bool)
    untouched[arguments["slots"]] = False
    by_slot = (k_cache.transpose(1, 2).flatten(0, 1), cache.transpose(1, 2).flatten(0, 1))
    assert torch.equal(by_slot[0][untouched], by_slot[1][untouched])


def check_attention(native, paged_case, assert_close, assert_only_view_written, name, **sizes):
    case = paged_case(**sizes)
    arguments, wide = case.arguments, case.as_float64()
    if name == "decode_attention":
        arguments, wide = (
            {k: v for k, v in a.items() if k != "query_start"} for a in (arguments, wide)
        )
    native[name](**arguments)
    REFERENCE[name](**wide)
    assert not arguments["out"].isnan().any(), "a slot that is not in use leaked"
    assert_close(arguments["out"], wide["out"])
    assert_only_view_written(arguments["out"], case.pad)


# Lengths about the multiples of a page, and any.
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 17, 31, 32, 33, 127, 128, 129]))
SHAPES = {
    "kv_heads": st.integers(1, 3),
    "group": st.one_of(st.integers(1, 8), st.sampled_from([32, 33, 40])),
    "head_dim": HEAD_DIMS,
    "page_size": st.sampled_from([1, 2, 7, 16, 32, 128, 129]),
    "window": st.one_of(st.just(0), st.integers(1, 40)),
    "dtype": DTYPES,
    "pad": PADS,
    "seed": SEEDS,
}


@given(
    st.lists(st.tuples(st.integers(1, 40), LENGTHS), min_size=1, max_size=3),
    st.fixed_dictionaries(SHAPES),
)
@quick
def test_prefill_attention(
    native, paged_case, assert_close, assert_only_view_written, lengths, sizes
):
    queries, contexts = (list(column) for column in zip(*lengths, strict=True))
    check_attention(
        native,
        paged_case,
        assert_close,
        assert_only_view_written,
        "prefill_attention",
        query_lens=queries,
        context_lens=contexts,
        **sizes,
    )


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.fixed_dictionaries(SHAPES))
@quick
def test_decode_attention(
    native, paged_case, assert_close, assert_only_view_written, contexts, sizes
):
    check_attention(
        native,
        paged_case,
        assert_close,
        assert_only_view_written,
        "decode_attention",
        query_lens=[1] * len(contexts),
        context_lens=contexts,
        **sizes,
    )


@pytest.mark.parametrize("sizes", [
    {"query_lens": [1], "context_lens": [0]},  # a single token that sees itself
    {"query_lens": [1, 1, 1], "context_lens": [14, 15, 16]},  # about the end of a page
    {"query_lens": [16, 32], "context_lens": [0, 16]},  # whole pages
    {"query_lens": [33, 5], "context_lens": [3, 200], "group": 1},  # beyond a block of rows
    {"query_lens": [7], "context_lens": [90], "window": 16},  # a window that begins with a page
    {"query_lens": [50], "context_lens": [0], "window": 1},  # each token sees itself alone
    {"query_lens": [3, 2], "context_lens": [5, 300], "group": 33},  # plain torch takes over
    {"query_lens": [3, 2], "context_lens": [5, 300], "page_size": 256},
    {"query_lens": [3, 2], "context_lens": [5, 30], "head_dim": 520},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_attention_at_the_edges(
    native, paged_case, assert_close, assert_only_view_written, sizes, dtype
):
    check_attention(
        native,
        paged_case,
        assert_close,
        assert_only_view_written,
        "prefill_attention",
        **{"page_size": 16, **sizes},
        dtype=dtype,
    )


@pytest.mark.parametrize("page_size", [16, 48, 7])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_attention_of_many_requests_on_any_number_of_threads(
    native, paged_case, assert_close, assert_only_view_written, page_size, window, head_dim
):
    """A task takes several KV heads where there are enough requests for all threads."""
    sizes = {
        "query_lens": [1] * 14 + [3, 40, 1],
        "context_lens": [0, 15, 16, 63, 64, 65, 127, 128, 129, 200, 1, 2, 3, 30, 70, 100, 150],
        "kv_heads": 5,
        "group": 4,
        "head_dim": head_dim,
        "page_size": page_size,
        "window": window,
        "dtype": torch.bfloat16,
        "pad": 3,
    }
    before, results = num_threads(), []
    for threads in (1, 2, 7):
        set_num_threads(threads)
        case = paged_case(**sizes)
        native["prefill_attention"](**case.arguments)
        results.append(case.arguments["out"])
    set_num_threads(before)
    wide = case.as_float64()
    REFERENCE["prefill_attention"](**wide)
    assert_close(results[0], wide["out"])
    assert_only_view_written(results[0], case.pad)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_attention_with_scores_of_any_size(native, paged_case, assert_close):
    for factor in (0.0, 1e-20, 1e3, 1e15):
        case = paged_case(query_lens=[9, 1], context_lens=[40, 70], head_dim=64, page_size=16)
        case.arguments["q"] *= factor
        wide = case.as_float64()
        native["prefill_attention"](**case.arguments)
        REFERENCE["prefill_attention"](**wide)
        # The largest scores are near 1e19: only the largest key counts, exactly.
        assert_close(case.arguments["out"], wide["out"], atol=1e-4 if factor == 1e3 else 1e-5)


def test_table_entries_past_the_end_of_a_request_are_not_read(native, paged_case):
    case = paged_case(query_lens=[3, 1], context_lens=[5, 30])
    native["prefill_attention"](**case.arguments)
    expected = case.arguments["out"].clone()
    case.arguments["page_table"][0, 2:] = 2**31 - 1
    case.arguments["page_table"][1, 8:] = -1
    case.arguments["out"].zero_()
    native["prefill_attention"](**case.arguments)
    assert torch.equal(case.arguments["out"], expected)

"""Soft-capped scores, the logarithm of their sum, and attention merged from two key sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels.ops import REFERENCE

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)
quick = settings(max_examples=60, deadline=None)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 150)), min_size=1, max_size=3),
    group=st.sampled_from([1, 2, 5, 32]),
    head_dim=st.sampled_from([8, 24, 64, 80, 96, 128, 256]),
    page_size=st.sampled_from([3, 16, 64, 100]),
    window=st.sampled_from([0, 1, 33, 70]),
    soft_cap=st.sampled_from([0.0, 0.5, 30.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
@quick
def test_soft_cap_and_lse(
    native, paged_case, assert_close, lengths, group, head_dim, page_size, window, soft_cap, dtype,
    seed,
):  # fmt: skip
    queries, contexts = (list(column) for column in zip(*lengths, strict=True))
    case = paged_case(
        query_lens=queries,
        context_lens=contexts,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        window=window,
        dtype=dtype,
        seed=seed,
    )
    heads = case.arguments["q"].shape[1] // head_dim
    lse = [torch.zeros(sum(queries), heads) for _ in range(2)]
    native["prefill_attention"](**case.arguments, soft_cap=soft_cap, lse=lse[0])
    expected = case.as_float64()
    REFERENCE["prefill_attention"](**expected, soft_cap=soft_cap, lse=lse[1])
    assert_close(case.arguments["out"], expected["out"])
    torch.testing.assert_close(lse[0], lse[1], rtol=5e-6, atol=5e-6)


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 90), DTYPES, SEEDS)
@quick
def test_merge_with_the_reference(native, assert_close, tokens, heads, head_dim, dtype, seed):
    torch.manual_seed(seed)
    a, b = (torch.randn(tokens, heads * head_dim).to(dtype) for _ in range(2))
    lse_a, lse_b = (20 * torch.randn(tokens, heads) for _ in range(2))
    if tokens > 2:
        lse_a[0, 0] = lse_a[1, 0] = lse_b[1, 0] = -torch.inf
        a[0, 0] = torch.nan  # what nobody has written
    results = []
    for operations, kind in ((native, dtype), (REFERENCE, torch.float64)):
        out, lse_out = torch.zeros_like(a, dtype=kind), torch.zeros_like(lse_a)
        operations["merge_attention"](
            a=a.to(kind), lse_a=lse_a, b=b.to(kind), lse_b=lse_b, out=out, lse_out=lse_out
        )
        results.append((out, lse_out))
    assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("split", [1, 16, 40, 99])
def test_two_halves_merge_into_the_whole(native, paged_case, split):
    whole = paged_case(query_lens=[1], context_lens=[99], group=3, head_dim=64, page_size=8)
    arguments = whole.arguments
    lse = torch.zeros(1, 6)
    native["prefill_attention"](**arguments, lse=lse)
    states = []
    sizes = [split, 100 - split]
    parts = zip(whole.keys[0].split(sizes), whole.values[0].split(sizes), strict=True)
    for key, value in parts:
        out, part = torch.zeros_like(arguments["out"]), torch.zeros(1, 6)
        native["prefill_attention"](
            q=arguments["q"],
            k_cache=key.transpose(0, 1).unsqueeze(0).contiguous(),
            v_cache=value.transpose(0, 1).unsqueeze(0).contiguous(),
            page_table=torch.zeros(1, 1, dtype=torch.int32),
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([len(key)], dtype=torch.int32),
            scale=arguments["scale"],
            window=0,
            out=out,
            lse=part,
        )
        states.append((out, part))
    (a, lse_a), (b, lse_b) = states
    native["merge_attention"](a=a, lse_a=lse_a, b=b, lse_b=lse_b, out=a, lse_out=lse_a)
    torch.testing.assert_close(a, arguments["out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse_a, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"soft_cap": -1.0}, "soft_cap is -1.0; expected 0"),
        ({"soft_cap": float("nan")}, "soft_cap is nan"),
        ({"lse": torch.zeros(3, 5)}, "lse is"),
        ({"lse": torch.zeros(3, 4, dtype=torch.float64)}, "lse is torch.float64"),
    ],
)
def test_wrong_arguments_are_refused(native, paged_case, changed, message):
    case = paged_case(query_lens=[3], context_lens=[4])
    with pytest.raises(ValueError, match=message):
        native["prefill_attention"](**case.arguments, **changed)
    assert not case.arguments["out"].any()

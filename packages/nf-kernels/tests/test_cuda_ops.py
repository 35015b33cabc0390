"""The CUDA operations above FlashInfer: signatures, and arguments as FlashInfer wants them.

What runs here is all but the kernels: a stand-in with FlashInfer's interface computes in torch on
the CPU, and refuses what the real functions refuse.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels.ops import CUDA, OPERATION_NAMES, REFERENCE, AttentionBatch
from nf_kernels.ops.cuda.arguments import Arguments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = st.sampled_from([BF16, FP16, FP32])
SEEDS = st.integers(0, 2**20)
PADS = st.sampled_from([0, 1, 8, 13])
quick = settings(max_examples=60, deadline=None)


# Interface


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_an_operation_has_the_arguments_of_the_reference(name):
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]

    expected = arguments(REFERENCE[name])
    assert arguments(CUDA[name]) == expected
    assert arguments(getattr(Arguments, name)) == expected  # of the checks


def test_an_empty_batch_asks_nobody(without_flashinfer):
    empty = torch.zeros(0, dtype=torch.int32)
    without_flashinfer["decode_attention"](
        q=torch.zeros(0, 64).to(BF16),
        k_cache=torch.zeros(1, 1, 16, 64).to(BF16),
        v_cache=torch.zeros(1, 1, 16, 64).to(BF16),
        page_table=torch.zeros(0, 3, dtype=torch.int32),
        seq_lens=empty,
        scale=1.0,
        window=0,
        out=torch.zeros(0, 64).to(BF16),
    )
    nothing = torch.zeros(0, 64).to(BF16)
    without_flashinfer["rms_norm"](x=nothing, weight=torch.ones(64).to(BF16), eps=0, out=nothing)


# Values: the arguments reach FlashInfer as it wants them


@given(st.integers(0, 9), st.integers(1, 12), DTYPES, PADS, st.booleans(), st.booleans(), SEEDS)
@quick
def test_rms_norm(
    stood_in, assert_close, row_view, assert_only_view_written, t, width, dtype, pad, add, same, s
):
    torch.manual_seed(s)
    width *= 4
    source, weight = 3 * torch.randn(t, width).to(dtype), torch.randn(width).to(dtype)
    x = row_view(source, pad)
    out = x if same else row_view(torch.zeros(t, width, dtype=dtype), pad)
    residual = row_view(torch.randn(t, width).to(dtype), pad) if add else None
    expected = torch.empty(t, width)
    expected_residual = residual.to(FP32, copy=True) if residual is not None else None
    REFERENCE["rms_norm"](
        x=source.float(), weight=weight.float(), eps=1e-5, out=expected, residual=expected_residual
    )
    stood_in["rms_norm"](x=x, weight=weight, eps=1e-5, out=out, residual=residual)
    unit = {FP32: 0.0, BF16: 2.0**-7, FP16: 2.0**-10}[dtype]  # the residual may be rounded before
    assert_close(out, expected, rtol=unit + 1e-5, atol=unit + 1e-5)
    assert_only_view_written(out, pad)
    if residual is not None:
        assert_close(residual, expected_residual)
        assert_only_view_written(residual, pad)


@given(st.integers(0, 9), st.integers(1, 40), DTYPES, PADS, SEEDS)
@quick
def test_swiglu(
    stood_in, assert_close, row_view, assert_only_view_written, t, width, dtype, pad, s
):
    torch.manual_seed(s)
    gate_up = row_view(5 * torch.randn(t, 2 * width).to(dtype), pad)
    out = row_view(torch.zeros(t, width, dtype=dtype), pad)
    stood_in["swiglu"](gate_up=gate_up, out=out)
    expected = torch.empty(t, width)
    REFERENCE["swiglu"](gate_up=gate_up.float(), out=expected)
    assert_close(out, expected)
    assert_only_view_written(out, pad)


@given(
    tokens=st.integers(0, 12),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([64, 96, 128]),
    page_size=st.sampled_from([1, 4, 16, 200]),
    norms=st.tuples(st.booleans(), st.booleans()),
    dtype=DTYPES,
    pad=PADS,
    seed=SEEDS,
)
@quick
def test_rope_append(
    stood_in, assert_close, row_view, assert_only_view_written, tokens, heads, kv_heads, head_dim,
    page_size, norms, dtype, pad, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    pages = 2 + tokens // page_size
    cache = torch.randn(pages, kv_heads, page_size, head_dim).to(dtype)
    source = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.outer(torch.arange(50.0), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
    q_norm, k_norm = (torch.randn(head_dim).to(dtype) if on else None for on in norms)
    arguments = {
        "qkv": row_view(source, pad),
        "positions": torch.randint(50, (tokens,)),
        "slots": torch.randperm(pages * page_size)[:tokens],
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": 1e-6,
    }
    out = row_view(torch.zeros(tokens, heads * head_dim, dtype=dtype), pad)
    k_cache, v_cache = cache.clone(), cache.clone()
    stood_in["rope_append"](**arguments, k_cache=k_cache, v_cache=v_cache, out=out)
    assert torch.equal(arguments["qkv"], source), "an input was written"

    wide = {
        n: a.float() if n in {"qkv", "q_norm", "k_norm"} and a is not None else a
        for n, a in arguments.items()
    }
    expected = torch.empty(out.shape)
    expected_k, expected_v = (cache.to(FP32, copy=True) for _ in range(2))
    REFERENCE["rope_append"](**wide, k_cache=expected_k, v_cache=expected_v, out=expected)
    unit = {FP32: 0.0, BF16: 2.0**-8, FP16: 2.0**-11}[dtype] if any(norms) else 0.0
    for got, want in ((out, expected), (k_cache, expected_k)):  # a norm is rounded once more
        assert_close(got, want, rtol=unit + 5e-6, atol=8 * unit + 5e-6)
    assert torch.equal(v_cache.float(), expected_v)
    assert_only_view_written(out, pad)


LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 17, 127, 128, 129]))


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), LENGTHS), min_size=1, max_size=4),
    sizes=st.fixed_dictionaries(
        {
            "kv_heads": st.integers(1, 3),
            "group": st.integers(1, 8),
            "head_dim": st.sampled_from([64, 80, 128]),
            "page_size": st.sampled_from([1, 7, 16, 128]),
            "window": st.one_of(st.just(0), st.integers(1, 40)),
            "dtype": DTYPES,
            "pad": PADS,
            "seed": SEEDS,
        }
    ),
    soft_cap=st.sampled_from([0.0, 0.5, 30.0]),
    decode=st.booleans(),
    host=st.booleans(),
)
@quick
def test_attention(
    stood_in, paged_case, assert_close, assert_only_view_written, lengths, sizes, soft_cap, decode,
    host,
):  # fmt: skip
    queries, contexts = (list(column) for column in zip(*lengths, strict=True))
    queries = [1] * len(queries) if decode else queries
    case = paged_case(query_lens=queries, context_lens=contexts, **sizes)
    name = "decode_attention" if decode else "prefill_attention"
    given_arguments = (case.arguments, case.as_float64())
    if decode:
        for arguments in given_arguments:
            del arguments["query_start"]
    arguments, wide = given_arguments
    heads = arguments["q"].shape[1] // sizes["head_dim"]
    lse = [torch.zeros(sum(queries), heads) for _ in range(2)]
    if host:
        arrays = [arguments[n] for n in ("page_table", "seq_lens")]
        start = arguments.get("query_start")
        copies = [array.clone() for array in arrays]
        stood_in.prepare([AttentionBatch(*arrays, start, *copies, start)])
    stood_in[name](**arguments, soft_cap=soft_cap, lse=lse[0])
    stood_in.prepare([])
    REFERENCE[name](**wide, soft_cap=soft_cap, lse=lse[1])
    assert_close(arguments["out"], wide["out"])
    assert_only_view_written(arguments["out"], case.pad)
    torch.testing.assert_close(lse[0], lse[1], rtol=5e-6, atol=5e-6)


@given(st.integers(0, 30), st.integers(1, 8), DTYPES, SEEDS, st.data())
@quick
def test_moe_experts(stood_in, tokens, experts, dtype, seed, data):
    chosen = data.draw(st.integers(1, experts))
    hidden, inner = (8 * data.draw(st.integers(1, 8)) for _ in range(2))
    torch.manual_seed(seed)
    case = {
        "x": torch.randn(tokens, hidden).to(dtype),
        "expert_ids": torch.stack(
            [torch.randperm(experts)[:chosen] for _ in range(tokens)] or [torch.empty(0)]
        )
        .view(tokens, chosen)
        .long(),
        "expert_weights": torch.rand(tokens, chosen),
        "gate_up": (torch.randn(experts, 2 * inner, hidden) * hidden**-0.5).to(dtype),
        "down": (torch.randn(experts, hidden, inner) * inner**-0.5).to(dtype),
        "residual": torch.randn(tokens, hidden).to(dtype),
    }
    out, expected = torch.zeros_like(case["x"]), torch.zeros(tokens, hidden)
    stood_in["moe_experts"](**case, out=out)
    wide = {n: t.float() if t.is_floating_point() else t for n, t in case.items()}
    REFERENCE["moe_experts"](**wide, out=expected)
    unit = {FP32: 1e-6, BF16: 2.0**-8, FP16: 2.0**-11}[dtype]  # three steps round to the dtype
    torch.testing.assert_close(out.float(), expected, rtol=4 * unit, atol=8 * unit * chosen)
    # Some of the experts, and no residual.
    first = data.draw(st.integers(0, experts - 1))
    for arguments in (case, wide):
        arguments |= {name: arguments[name][first:] for name in ("gate_up", "down")}
        arguments |= {"residual": None, "first_expert": first}
    stood_in["moe_experts"](**case, out=out)
    REFERENCE["moe_experts"](**wide, out=expected)
    torch.testing.assert_close(out.float(), expected, rtol=4 * unit, atol=8 * unit * chosen)

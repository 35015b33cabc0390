"""The reference operations against torch's own attention, naive loops and written-out formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels import ops
from nf_kernels.cost import CATEGORIES, Category
from nf_kernels.ops import REFERENCE

quick = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**20)


def test_every_operation_has_a_category_and_an_implementation():
    computed = {name for name in CATEGORIES if CATEGORIES[name] is not Category.NETWORK}
    assert set(REFERENCE) == set(ops.load("cpu")) == computed
    assert set(CATEGORIES.values()) <= set(Category)
    assert ops.load("cuda") is REFERENCE
    assert ops.load(torch.device("cpu"), native=False) is REFERENCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_and_gather_rows_copy_rows(dtype):
    table = torch.randn(7, 5).to(dtype)
    index = torch.tensor([6, 0, 0, 3])
    for name, arguments in (
        ("embedding", {"token_ids": index, "table": table}),
        ("gather_rows", {"index": index, "x": table}),
    ):
        buffer = torch.zeros(9, 5, dtype=dtype)
        REFERENCE[name](**arguments, out=buffer[2:6])
        assert torch.equal(buffer[2:6], torch.stack([table[i] for i in index.tolist()]))
        assert not buffer[:2].any()
        assert not buffer[6:].any()


def test_rms_norm_is_its_formula_in_float32():
    x, weight = torch.randn(5, 48).bfloat16(), torch.randn(48).bfloat16()
    out = torch.empty_like(x)
    REFERENCE["rms_norm"](x=x, weight=weight, eps=1e-5, out=out)
    expected = F.rms_norm(x.double(), (48,), weight.double(), eps=1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", ["none", "other", "out"])
def test_linear(dtype, bias, residual):
    torch.manual_seed(0)
    x, weight = torch.randn(6, 12).to(dtype), torch.randn(9, 12).to(dtype)
    b = torch.randn(9).to(dtype) if bias else None
    out = torch.randn(6, 9).to(dtype)
    r = {"none": None, "other": torch.randn(6, 9).to(dtype), "out": out}[residual]
    kept = None if r is None else r.clone()
    expected = x.double() @ weight.double().t()
    expected += sum(term.double() for term in (b, r) if term is not None)
    REFERENCE["linear"](x=x, weight=weight, bias=b, residual=r, out=out)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6  # twice rounded where all are given
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    if residual == "other":
        assert torch.equal(r, kept)
    else:
        wide = torch.empty(6, 9)
        REFERENCE["linear"](x=x, weight=weight, bias=b, residual=kept, out=wide)
        torch.testing.assert_close(wide, out.float())


def test_rope_append_turns_pairs_of_a_head():
    torch.manual_seed(0)
    tokens, heads, kv_heads, head_dim = 5, 2, 1, 8
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    positions, slots = torch.tensor([3, 0, 9, 1, 2]), torch.tensor([5, 11, 0, 2, 3])
    frequency = 100.0 ** -torch.linspace(0, 1, head_dim // 2)
    angles = torch.outer(torch.arange(10.0), frequency)
    k_cache, v_cache = torch.zeros(3, kv_heads, 4, head_dim), torch.zeros(3, kv_heads, 4, head_dim)
    out = torch.empty(tokens, heads * head_dim)
    REFERENCE["rope_append"](
        qkv=qkv,
        positions=positions,
        slots=slots,
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1),
        k_cache=k_cache,
        v_cache=v_cache,
        out=out,
    )
    # A pair is a complex number that the position turns.
    by_head = qkv.view(tokens, -1, head_dim)
    half = head_dim // 2
    turned = torch.complex(by_head[..., :half], by_head[..., half:])
    turned = turned * torch.polar(torch.ones_like(angles), angles)[positions].unsqueeze(1)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(out, expected[:, :heads].flatten(1))
    for token, slot in enumerate(slots.tolist()):
        torch.testing.assert_close(k_cache[slot // 4, 0, slot % 4], expected[token, heads])
        assert torch.equal(v_cache[slot // 4, 0, slot % 4], by_head[token, heads + 1])
    unused = sorted(set(range(12)) - set(slots.tolist()))
    assert not k_cache.transpose(1, 2).reshape(12, -1)[unused].any()


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 12),
    SEEDS,
)
@quick
def test_attention_is_scaled_dot_product_attention(
    paged_case, lengths, kv_heads, group, page_size, window, seed
):
    queries, contexts = (list(column) for column in zip(*lengths, strict=True))
    case = paged_case(
        query_lens=queries,
        context_lens=contexts,
        kv_heads=kv_heads,
        group=group,
        page_size=page_size,
        window=window,
        seed=seed,
    )
    arguments = case.arguments
    REFERENCE["prefill_attention"](**arguments)
    starts = arguments["query_start"].tolist()
    for request, (count, context) in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        q = arguments["q"][rows].unflatten(1, (kv_heads * group, -1)).transpose(0, 1)
        position = context + torch.arange(count).unsqueeze(1)
        key = torch.arange(context + count)
        mask = (key <= position) & (key > position - (window or 1000))
        expected = F.scaled_dot_product_attention(
            q.double(),
            case.keys[request].transpose(0, 1).double(),
            case.values[request].transpose(0, 1).double(),
            attn_mask=mask,
            scale=arguments["scale"],
            enable_gqa=True,
        )
        got = arguments["out"][rows].double()
        torch.testing.assert_close(got, expected.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)
    last = [end - 1 for end in starts[1:]]
    decode = {k: v for k, v in arguments.items() if k != "query_start"}
    decode |= {"q": arguments["q"][last], "out": torch.empty_like(arguments["q"][last])}
    REFERENCE["decode_attention"](**decode)
    torch.testing.assert_close(decode["out"], arguments["out"][last])


def test_swiglu_is_its_formula():
    gate, up = torch.randn(4, 10), torch.randn(4, 10)
    out = torch.empty(4, 10)
    REFERENCE["swiglu"](gate_up=torch.cat([gate, up], dim=1), out=out)
    torch.testing.assert_close(out, gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("normalize", [False, True])
def test_moe_route_takes_the_largest(normalize):
    torch.manual_seed(1)
    logits = torch.randn(6, 8)
    expert_ids, weights = torch.empty(6, 3, dtype=torch.int64), torch.empty(6, 3)
    REFERENCE["moe_route"](
        router_logits=logits, normalize=normalize, expert_ids=expert_ids, expert_weights=weights
    )
    for row in range(6):
        chosen = sorted(range(8), key=lambda e: -logits[row, e].item())[:3]
        assert expert_ids[row].tolist() == chosen
        exponentials = logits[row].exp()
        total = exponentials[chosen].sum() if normalize else exponentials.sum()
        torch.testing.assert_close(weights[row], exponentials[chosen] / total)


@given(st.integers(0, 7), st.integers(1, 4), st.integers(1, 3), st.booleans(), SEEDS)
@quick
def test_moe_experts_is_a_loop_over_tokens(tokens, experts, k, in_place, seed):
    torch.manual_seed(seed)
    hidden, width, k = 6, 5, min(k, experts)
    x, residual = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    gate_up = torch.randn(experts, 2 * width, hidden)
    down = torch.randn(experts, hidden, width)
    expert_ids = torch.rand(tokens, experts).argsort(dim=1)[:, :k]
    weights = torch.rand(tokens, k)
    expected = residual.clone()
    for token in range(tokens):
        for expert, weight in zip(expert_ids[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected[token] += weight * (down[expert] @ (F.silu(gate) * up))
    kept = residual.clone()
    out = residual if in_place else torch.empty_like(residual)
    REFERENCE["moe_experts"](
        x=x,
        expert_ids=expert_ids,
        expert_weights=weights,
        gate_up=gate_up,
        down=down,
        residual=residual,
        out=out,
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert in_place or torch.equal(residual, kept)

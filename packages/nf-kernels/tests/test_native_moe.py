"""The experts of a mixture: chosen, computed by groups, and added up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels.ops import REFERENCE

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)
quick = settings(max_examples=60, deadline=None)


@given(st.integers(0, 30), st.integers(1, 40), st.booleans(), DTYPES, SEEDS, st.data())
@quick
def test_route(native, tokens, experts, normalize, dtype, seed, data):
    chosen = data.draw(st.integers(1, experts))
    torch.manual_seed(seed)
    # Distinct in every row, so that there is one right order.
    logits = torch.stack([torch.randperm(experts) for _ in range(tokens)] or [torch.empty(0)])
    logits = (logits.view(tokens, experts) / 4).to(dtype)
    results = []
    for operations in (native, REFERENCE):
        ids = torch.zeros(tokens, chosen, dtype=torch.int64)
        weights = torch.zeros(tokens, chosen)
        operations["moe_route"](
            router_logits=logits, normalize=normalize, expert_ids=ids, expert_weights=weights
        )
        results.append((ids, weights))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_of_equal_logits_the_first_expert_is_chosen(native):
    ids, weights = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0]])
    native["moe_route"](
        router_logits=logits, normalize=True, expert_ids=ids, expert_weights=weights
    )
    assert ids.tolist() == [[1, 2, 4]]
    assert weights.sum().item() == pytest.approx(1)


def experts_case(tokens, experts, chosen, hidden, inner, dtype, seed):
    torch.manual_seed(seed)
    return {
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


def run(operations, case):
    packed = {name: operations.pack(case[name].clone()) for name in ("gate_up", "down")}
    tokens, chosen = case["expert_ids"].shape
    needed = operations.scratch_bytes(
        "moe_experts", tokens=tokens, experts_per_token=chosen, **packed
    )
    out = torch.zeros_like(case["x"])
    scratch = torch.empty(needed, dtype=torch.uint8)
    operations["moe_experts"](**(case | packed), out=out, scratch=scratch)
    return out


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 8),
    hidden=st.integers(1, 40).map(lambda n: 2 * n),
    inner=st.integers(1, 40).map(lambda n: 2 * n),
    dtype=DTYPES,
    seed=SEEDS,
    data=st.data(),
)
@quick
def test_experts(native, tokens, experts, hidden, inner, dtype, seed, data):
    chosen = data.draw(st.integers(1, experts))
    case = experts_case(tokens, experts, chosen, hidden, inner, dtype, seed)
    got = run(native, case)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in case.items()}
    expected = exact["residual"].clone()
    for token in range(tokens):
        for i in range(chosen):
            e = case["expert_ids"][token, i]
            gate, up = (exact["gate_up"][e] @ exact["x"][token]).chunk(2)
            y = exact["down"][e] @ (torch.nn.functional.silu(gate) * up)
            expected[token] += exact["expert_weights"][token, i] * y
    # Each of three steps rounds to the dtype.
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=4 * unit, atol=8 * unit * chosen)
    for token in range(min(tokens, 3)):  # a token's result is its own
        alone = {n: t[token : token + 1] for n, t in case.items() if len(t) == tokens}
        alone |= {name: case[name] for name in ("gate_up", "down")}
        assert torch.equal(run(native, alone)[0], got[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_the_experts_add_up(native, dtype):
    """Without a residual; what is chosen elsewhere counts for nothing, be it NaN."""
    case = experts_case(9, 6, 3, 16, 8, dtype, 0)
    whole = run(native, case)
    del case["residual"]
    for operations in (native, REFERENCE):
        total = torch.zeros(9, 16)
        for first, end in ((0, 2), (2, 3), (3, 6)):
            part = {name: case[name][first:end].clone() for name in ("gate_up", "down")}
            total += run(operations, case | part | {"first_expert": first}).float()
        expected = whole.float() - experts_case(9, 6, 3, 16, 8, dtype, 0)["residual"].float()
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
        nobody = {name: case[name][:1].clone() for name in ("gate_up", "down")}
        assert not run(operations, case | nobody | {"first_expert": 7}).any()


def test_scratch_is_asked_for_and_measured(native):
    case = experts_case(4, 3, 2, 16, 8, torch.float32, 0)
    packed = {name: native.pack(case[name]) for name in ("gate_up", "down")}
    out = torch.zeros(4, 16)
    with pytest.raises(ValueError, match="scratch is None; expected uint8"):
        native["moe_experts"](**(case | packed), out=out)
    short = torch.empty(100, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scratch is uint8 \[100\]; expected \[\d+\] or more"):
        native["moe_experts"](**(case | packed), out=out, scratch=short)
    case["expert_ids"][2, 1] = 3
    enough = torch.empty(100000, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"expert_ids\[5\] is 3; expected 0 to 2"):
        native["moe_experts"](**(case | packed), out=out, scratch=enough)
    assert not out.any()

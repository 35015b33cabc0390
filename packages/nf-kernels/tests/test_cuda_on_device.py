"""On a CUDA device every operation gives what plain torch gives on the CPU, and lanes hold.

The cases are few: FlashInfer compiles a module for each kind of head, which takes up to a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nf_kernels import lanes, ops
from nf_kernels.lanes.cuda import MECHANISMS
from nf_kernels.ops import CUDA, REFERENCE, AttentionBatch, cuda

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WITHOUT_FLASHINFER = {
    "embedding",
    "gather_rows",
    "linear",
    "merge_attention",
    "moe_route",
    "sample",
}
TOLERANCE = {FP32: 2e-3, BF16: 2e-2, FP16: 4e-3}  # products may use TF32


@pytest.fixture
def run(record_property):
    """Run an operation on the device and in float32 on the CPU, and compare what is written."""

    def check(name: str, arguments: dict[str, Any], *written: str, set_up: Any = None) -> None:
        record_property("function", f"op/{name}")
        reason = cuda.missing(torch.device("cuda"))
        if reason and name not in WITHOUT_FLASHINFER:
            pytest.skip(f"needs FlashInfer: {reason}")
        here = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        wide = {
            n: v.to(FP32 if v.is_floating_point() else v.dtype, copy=True)
            if isinstance(v, Tensor)
            else v
            for n, v in arguments.items()
        }
        if set_up is not None:
            set_up(here)
        CUDA[name](**here)
        REFERENCE[name](**wide)
        for output in written:
            got, want = here[output].cpu(), wide[output]
            if not got.is_floating_point():
                assert torch.equal(got, want), output
                continue
            limit = TOLERANCE[got.dtype]
            torch.testing.assert_close(got.float(), want, rtol=limit, atol=limit, equal_nan=True)

    return check


def rows(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_embedding_and_gather_rows(run, dtype):
    ids, table = torch.randint(50, (9,)), rows(50, 64, dtype=dtype)
    out = torch.zeros(9, 64, dtype=dtype)
    run("embedding", {"token_ids": ids, "table": table, "out": out}, "out")
    run("gather_rows", {"index": ids, "x": table, "out": out}, "out")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", [64, 4096, 4100])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(run, dtype, width, add):
    x, weight = rows(33, width, dtype=dtype), rows(width, dtype=dtype)
    residual = rows(33, width, dtype=dtype) if add else None
    arguments = {"x": x, "weight": weight, "eps": 1e-5, "out": torch.zeros_like(x)}
    written = ("out", "residual") if add else ("out",)
    run("rms_norm", arguments | {"residual": residual}, *written)


def test_rms_norm_in_place(run):
    reason = cuda.missing(torch.device("cuda"))
    if reason:
        pytest.skip(f"needs FlashInfer: {reason}")
    x, weight, residual = rows(5, 4096).cuda(), rows(4096).cuda(), rows(5, 4096).cuda()
    total = (x.float() + residual.float()).cpu()
    want = torch.empty(5, 4096)
    REFERENCE["rms_norm"](x=total, weight=weight.cpu(), eps=1e-5, out=want)
    CUDA["rms_norm"](x=x, weight=weight, eps=1e-5, out=x, residual=residual)
    torch.testing.assert_close(x.cpu().float(), want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(residual.cpu().float(), total, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", [8, 14336, 99])
def test_swiglu(run, dtype, width):
    out = torch.zeros(33, width, dtype=dtype)
    run("swiglu", {"gate_up": rows(33, 2 * width, dtype=dtype), "out": out}, "out")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("count", [1, 33, 256])
@pytest.mark.parametrize("extra", [(), ("bias",), ("residual",), ("bias", "residual")])
def test_linear(run, dtype, count, extra):
    arguments = {
        "x": rows(count, 256, dtype=dtype),
        "weight": (torch.randn(384, 256) / 16).to(dtype),
        "out": torch.zeros(count, 384, dtype=dtype),
    }
    if "bias" in extra:
        arguments["bias"] = rows(384, dtype=dtype)
    if "residual" in extra:
        arguments["residual"] = rows(count, 384, dtype=dtype)
    run("linear", arguments, "out")


@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 128), (FP16, 64), (BF16, 96), (FP32, 128)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_append(run, dtype, head_dim, norms):
    heads, kv_heads, page_size, tokens = 8, 2, 16, 37
    angles = torch.outer(torch.arange(50.0), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
    arguments = {
        "qkv": rows(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        "positions": torch.randint(50, (tokens,)),
        "slots": torch.randperm(5 * page_size)[:tokens],
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "k_cache": rows(5, kv_heads, page_size, head_dim, dtype=dtype),
        "v_cache": rows(5, kv_heads, page_size, head_dim, dtype=dtype),
        "out": torch.zeros(tokens, heads * head_dim, dtype=dtype),
    }
    if norms:
        arguments |= {
            "q_norm": rows(head_dim, dtype=dtype),
            "k_norm": rows(head_dim, dtype=dtype),
            "eps": 1e-6,
        }
    run("rope_append", arguments, "out", "k_cache", "v_cache")


ATTENTION = [
    {"head_dim": 128, "dtype": BF16},
    {"head_dim": 128, "dtype": BF16, "page_size": 1},
    {"head_dim": 128, "dtype": BF16, "group": 1},
    {"head_dim": 128, "dtype": BF16, "window": 33},
    {"head_dim": 64, "dtype": FP16},
    {"head_dim": 80, "dtype": BF16},  # plain torch from here on
    {"head_dim": 128, "dtype": FP32},
]
BATCHES = [([1], [0]), ([1, 1, 1], [14, 15, 16]), ([16, 32], [0, 16]), ([33, 5, 1], [3, 200, 900])]


@pytest.mark.parametrize("sizes", ATTENTION)
@pytest.mark.parametrize(("queries", "contexts"), BATCHES)
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_attention(run, paged_case, sizes, queries, contexts, announced, name):
    attend(run, paged_case, sizes, queries, contexts, name, announced=announced)


@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_attention_with_a_soft_cap(run, paged_case, name):
    sizes = {"head_dim": 128, "dtype": BF16}
    attend(run, paged_case, sizes, [33, 5, 1], [3, 200, 900], name, soft_cap=5.0)


def attend(run, paged_case, sizes, queries, contexts, name, *, announced=False, soft_cap=0.0):
    decode = name == "decode_attention"
    queries = [1] * len(queries) if decode else queries
    sizes = {"page_size": 16, "kv_heads": 2, "group": 4} | sizes
    case = paged_case(query_lens=queries, context_lens=contexts, **sizes)
    arguments = case.arguments | {"soft_cap": soft_cap}
    heads = arguments["q"].shape[1] // sizes["head_dim"]
    arguments["lse"] = torch.zeros(sum(queries), heads)
    if decode:
        del arguments["query_start"]

    def announce(here: dict[str, Any]) -> None:
        arrays = [here["page_table"], here["seq_lens"], here.get("query_start")]
        CUDA.prepare([AttentionBatch(*arrays)] if announced else [])

    run(name, arguments, "out", "lse", set_up=announce)
    CUDA.prepare([])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_merge_attention(run, dtype):
    lse_a, lse_b = 20 * torch.randn(7, 4), 20 * torch.randn(7, 4)
    lse_a[0, 0] = lse_a[1, 0] = lse_b[1, 0] = -torch.inf
    arguments = {
        "a": rows(7, 256, dtype=dtype),
        "lse_a": lse_a,
        "b": rows(7, 256, dtype=dtype),
        "lse_b": lse_b,
        "out": torch.zeros(7, 256, dtype=dtype),
        "lse_out": torch.zeros(7, 4),
    }
    run("merge_attention", arguments, "out", "lse_out")


@pytest.mark.parametrize("normalize", [False, True])
def test_moe_route(run, normalize):
    logits = torch.stack([torch.randperm(16) for _ in range(9)]).to(BF16) / 4
    arguments = {
        "router_logits": logits,
        "normalize": normalize,
        "expert_ids": torch.zeros(9, 4, dtype=torch.int64),
        "expert_weights": torch.zeros(9, 4),
    }
    run("moe_route", arguments, "expert_ids", "expert_weights")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("tokens", [1, 50])
def test_moe_experts(run, dtype, tokens):
    arguments = {
        "x": rows(tokens, 128, dtype=dtype),
        "expert_ids": torch.stack([torch.randperm(8)[:2] for _ in range(tokens)]),
        "expert_weights": torch.rand(tokens, 2),
        "gate_up": (torch.randn(8, 2 * 64, 128) / 11).to(dtype),
        "down": (torch.randn(8, 128, 64) / 8).to(dtype),
        "residual": rows(tokens, 128, dtype=dtype),
        "out": torch.zeros(tokens, 128, dtype=dtype),
    }
    run("moe_experts", arguments, "out")


def test_sample(run):
    count, vocabulary = 12, 1000
    uniform = (torch.arange(count) + 0.5) / count
    arguments = {
        "logits": 3 * torch.randn(count, vocabulary),
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.3] * 3),
        "top_k": torch.tensor([0, 5, 0, 50, 0, 0] * 2),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 0.5] * 3),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.02] * 2),
        "uniform": uniform,
        "out": torch.zeros(count, dtype=torch.int64),
    }
    run("sample", arguments, "out")


# Lanes


def sms_of(lane: Any) -> set[int]:
    """Hardware numbers of the SMs that a kernel with many blocks runs on in a lane."""
    pytest.importorskip("triton")
    from cuda_sm_probe import probe

    blocks = 64 * torch.cuda.get_device_properties(0).multi_processor_count
    seen, spun = (torch.full((blocks,), -1, dtype=torch.int32, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    with lane:
        probe[(blocks,)](seen, spun, SPIN=2000)
    lane.synchronize()
    return set(seen.tolist())


@pytest.mark.parametrize("shares", [[1], [1, 1], [0.4, 0.4, 0.2], [0.9, 0.1], [1] * 16])
def test_green_contexts_are_disjoint_and_leave_no_sm_idle(record_property, monkeypatch, shares):
    record_property("function", "lanes/green_contexts")
    monkeypatch.syspath_prepend(Path(__file__).parent)  # for the kernel that looks at its SM
    made = lanes.partition("cuda", shares)
    seen = [sms_of(lane) for lane in made]
    total = torch.cuda.get_device_properties(0).multi_processor_count
    assert [len(sms) for sms in seen] == [lane.sm_count for lane in made]
    assert len(set().union(*seen)) == sum(map(len, seen)) == total
    for lane in made:
        lane.close()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_lanes_run_operations_and_wait_for_each_other(record_property, mechanism):
    record_property("function", f"lanes/{mechanism}")
    first, second = lanes.partition("cuda", [2, 1], mechanism=mechanism)
    x, weight = torch.randn(512, 512).cuda().bfloat16(), torch.randn(512, 512).cuda().bfloat16()
    expected, middle, out = (torch.zeros_like(x) for _ in range(3))
    ops.REFERENCE["linear"](x=x, weight=weight, out=middle)
    ops.REFERENCE["linear"](x=middle, weight=weight, out=expected)
    for _ in range(20):
        middle.zero_(), out.zero_()
        begin = first.record()
        with first:
            CUDA["linear"](x=x, weight=weight, out=middle)
        second.wait(first.record())
        with second:
            CUDA["linear"](x=middle, weight=weight, out=out)
        end = second.record()
        end.wait()
        assert end.seconds_since(begin) > 0
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=1.0)
    for lane in (first, second):
        lane.close()

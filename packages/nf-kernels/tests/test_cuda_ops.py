"""The CUDA operations above FlashInfer: signatures, checks, choices, layouts and plans.

What runs here is all but the kernels: a stand-in with FlashInfer's interface computes in torch on
the CPU, and refuses what the real functions refuse.
"""

from __future__ import annotations

import inspect
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_kernels import ops
from nf_kernels.ops import CUDA, OPERATION_NAMES, REFERENCE, AttentionBatch, OperationSet, cuda
from nf_kernels.ops.cuda import support
from nf_kernels.ops.cuda.arguments import Arguments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = st.sampled_from([BF16, FP16, FP32])
SEEDS = st.integers(0, 2**20)
PADS = st.sampled_from([0, 1, 8, 13])
quick = settings(max_examples=60, deadline=None)


def need(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"FlashInfer would fail: {what}")


def need_rows(*tensors: torch.Tensor, contiguous: bool = False) -> None:
    for tensor in tensors:
        need(tensor.dtype in (BF16, FP16), f"dtype {tensor.dtype}")
        need(tensor.stride(-1) == 1, "elements apart")
        need(tensor.data_ptr() % 16 == 0, "address")
        need(all(s * 2 % 16 == 0 for s in tensor.stride()[:-1]), f"strides {tensor.stride()}")
        need(tensor.is_contiguous() or not contiguous, "gaps between rows")


class Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`, in torch."""

    plans = 0

    def __init__(self, workspace, kv_layout, backend):
        need(workspace.dtype == torch.uint8, "workspace")
        need(kv_layout == "HND", "layout")
        self.backend = backend

    def plan(
        self, qo_indptr, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, *,
        causal, sm_scale, window_left, logits_soft_cap, q_data_type, kv_data_type,
        max_token_per_sequence,
    ):  # fmt: skip
        Wrapper.plans += 1
        for tensor in (qo_indptr, indptr, indices, last_page_len):
            need(tensor.dtype == torch.int32 and tensor.is_contiguous(), "index array")
        need(head_dim in (64, 128, 256), f"head_dim {head_dim}")
        need(len(indices) == indptr[-1], "indices")
        need(max_token_per_sequence == max(qo_indptr.diff()), "max_token_per_sequence")
        need(bool((last_page_len >= 1).all() and (last_page_len <= page_size).all()), "last page")
        self.planned = (
            qo_indptr.clone(), indptr.clone(), indices.clone(), last_page_len.clone(),
            (heads, kv_heads, head_dim, page_size), causal, sm_scale, window_left, logits_soft_cap,
            (q_data_type, kv_data_type),
        )  # fmt: skip

    def run(self, q, caches, *, out, lse, return_lse):
        starts, indptr, indices, last, sizes, causal, scale, window_left, cap, dtypes = self.planned
        need((q.dtype, caches[0].dtype) == dtypes, "dtypes")
        heads, kv_heads, head_dim, page_size = sizes
        need(q.shape[1:] == (heads, head_dim) and len(q) == starts[-1], "shape of q")
        need_rows(q)
        need_rows(out, contiguous=self.backend == "fa2")
        need(return_lse == (lse is not None), "lse")
        for request in range(len(last)):
            pages = indices[indptr[request] : indptr[request + 1]].long()
            length = (len(pages) - 1) * page_size + int(last[request])
            keys, values = (
                cache[pages].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :length].float()
                for cache in caches
            )
            rows = slice(int(starts[request]), int(starts[request + 1]))
            queries = q[rows].float().unflatten(1, (kv_heads, -1))
            scores = torch.einsum("tkgd,ksd->kgts", queries, keys) * scale
            scores = cap * torch.tanh(scores / cap) if cap > 0 else scores
            count = rows.stop - rows.start
            distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
            hidden = (distance < 0) & causal
            if window_left >= 0:
                hidden |= distance > window_left
            scores = scores.masked_fill(hidden, -torch.inf)
            mixed = torch.einsum("kgts,ksd->tkgd", scores.softmax(dim=-1), values)
            out[rows] = mixed.flatten(1, 2).to(out.dtype)
            if lse is not None:
                lse[rows] = scores.logsumexp(-1).permute(2, 0, 1).flatten(1) / math.log(2)


def rmsnorm(x, weight, eps, *, out):
    need_rows(x, weight, out)
    flat = x.reshape(-1, x.shape[-1])
    result = torch.empty(flat.shape)
    REFERENCE["rms_norm"](x=flat, weight=weight, eps=eps, out=result)
    out.copy_(result.view(x.shape))


def fused_add_rmsnorm(x, residual, weight, eps):
    need_rows(x, residual, weight)
    total = x.float() + residual.float()
    residual.copy_(total)
    REFERENCE["rms_norm"](x=total, weight=weight, eps=eps, out=x)


def silu_and_mul(source, *, out):
    need_rows(source, out, contiguous=True)
    REFERENCE["swiglu"](gate_up=source, out=out)


def apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cos_sin_cache):
    need(cos_sin_cache.dtype == FP32 and cos_sin_cache.is_contiguous(), "cos_sin_cache")
    need(positions.is_contiguous(), "positions")
    need_rows(query, key)
    cosine, sine = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    for part in (query, key):
        first, second = part.view(len(part), -1, head_size).float().chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
        part.copy_(turned.flatten(1))


def append_paged_kv_cache(
    key, value, batch_indices, positions, caches, indices, indptr, last_page_len, *, kv_layout
):
    for tensor in (batch_indices, positions, indices, indptr, last_page_len):
        need(tensor.dtype == torch.int32 and tensor.is_contiguous(), "index array")
    need(len(indptr) == len(last_page_len) + 1, "indptr")
    need(kv_layout == "HND", "layout")
    need_rows(key, value)
    page_size = caches[0].shape[2]
    need(bool((last_page_len >= 1).all() and (last_page_len <= page_size).all()), "last page")
    for token, position in enumerate(positions.tolist()):
        entry = int(indptr[batch_indices[token]]) + position // page_size
        for cache, rows in zip(caches, (key, value), strict=True):
            cache[int(indices[entry]), :, position % page_size] = rows[token]


STAND_IN = SimpleNamespace(
    norm=SimpleNamespace(rmsnorm=rmsnorm, fused_add_rmsnorm=fused_add_rmsnorm),
    activation=SimpleNamespace(silu_and_mul=silu_and_mul),
    rope=SimpleNamespace(
        apply_rope_with_cos_sin_cache_inplace=apply_rope_with_cos_sin_cache_inplace
    ),
    page=SimpleNamespace(append_paged_kv_cache=append_paged_kv_cache),
    BatchPrefillWithPagedKVCacheWrapper=Wrapper,
)


def operation_set(operations: cuda.CudaOperations) -> OperationSet:
    return OperationSet(
        name="cuda",
        functions=operations.functions(),
        invariant=cuda.INVARIANT,
        pack=lambda weight: weight,
        scratch={},
        prepare=operations.prepare,
    )


@pytest.fixture(scope="module")
def stood_in() -> OperationSet:
    """The CUDA operations over the stand-in, on the CPU."""
    return operation_set(cuda.CudaOperations(library=lambda: STAND_IN, device_type="cpu"))


def unavailable():
    raise AssertionError("FlashInfer was asked for")


@pytest.fixture(scope="module")
def without_flashinfer() -> OperationSet:
    return operation_set(cuda.CudaOperations(library=unavailable, device_type="cpu"))


# Interface


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_an_operation_has_the_arguments_of_the_reference(name):
    def arguments(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]

    expected = arguments(REFERENCE[name])
    assert arguments(CUDA[name]) == expected
    assert arguments(getattr(Arguments, name)) == expected  # of the checks


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_tensors_of_another_device_are_refused(name):
    values = {"scale": 1.0, "window": 0, "normalize": True, "eps": 1e-6}
    whole = {"token_ids", "index", "positions", "slots", "expert_ids", "top_k"}
    counts = {"seq_lens", "query_start", "page_table"}
    arguments = {}
    for parameter in inspect.signature(CUDA[name]).parameters.values():
        if parameter.name == "self" or parameter.default is not inspect.Parameter.empty:
            continue
        dtype = torch.int64 if parameter.name in whole else FP32
        dtype = torch.int32 if parameter.name in counts else dtype
        arguments[parameter.name] = values.get(parameter.name, torch.zeros(2, 2, dtype=dtype))
    arguments = {
        n: a[0] if n in whole | {"seq_lens", "query_start"} - {"expert_ids"} else a
        for n, a in arguments.items()
    }
    if "k_cache" in arguments:
        arguments |= {n: torch.zeros(1, 1, 2, 2) for n in ("k_cache", "v_cache")}
    if "query_start" in arguments:
        arguments["query_start"] = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^\w+ is torch\.\w+ \[.*on cpu; expected .* on cuda$"):
        CUDA[name](**arguments)


def test_without_flashinfer_an_operation_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    support._find_flashinfer.cache_clear()
    with pytest.raises(RuntimeError, match=r"pip install 'nf-kernels\[cuda\]'"):
        cuda.flashinfer()
    support._find_flashinfer.cache_clear()


def test_a_device_without_flashinfer_computes_in_plain_torch_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    support._find_flashinfer.cache_clear()
    ops._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert ops.load("cuda", native=False) is REFERENCE
        assert not caplog.records
        assert ops.load("cuda") is REFERENCE
        assert ops.load("cuda:0") is REFERENCE
    assert [r.message for r in caplog.records if "plain torch" in r.message] == [
        "CUDA operations run in plain torch: import of flashinfer halted; None in sys.modules; "
        "install it with: pip install 'nf-kernels[cuda]'."
    ]
    support._find_flashinfer.cache_clear()
    ops._say_once.cache_clear()


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), CUDA), ((7, 5), REFERENCE)])
def test_flashinfer_is_used_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setitem(sys.modules, "flashinfer", STAND_IN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    support._find_flashinfer.cache_clear()
    assert ops.load("cuda") is expected
    support._find_flashinfer.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_plain_torch_is_given():
    assert ops.load("cuda") is REFERENCE
    assert cuda.missing(torch.device("cuda")).endswith("finds no CUDA device")


def test_importing_the_operations_imports_nothing_of_cuda():
    script = (
        "import sys, nf_kernels.ops, nf_kernels.lanes; "
        "print([m for m in sys.modules if m.partition('.')[0] in ('flashinfer', 'cuda')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_stand_in_has_the_arguments_of_flashinfer():
    real = pytest.importorskip("flashinfer")

    def functions(module):
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper
        return {
            "rmsnorm": module.norm.rmsnorm,
            "fused_add_rmsnorm": module.norm.fused_add_rmsnorm,
            "silu_and_mul": module.activation.silu_and_mul,
            "rope": module.rope.apply_rope_with_cos_sin_cache_inplace,
            "append": module.page.append_paged_kv_cache,
            "wrapper": wrapper.__init__,
            "plan": wrapper.plan,
            "run": wrapper.run,
        }

    of_real = functions(real)
    for name, function in functions(STAND_IN).items():
        mine = inspect.signature(function).parameters.values()
        by_name = {p.name: None for p in mine if p.kind is p.KEYWORD_ONLY}
        inspect.signature(of_real[name]).bind(*[None] * (len(mine) - len(by_name)), **by_name)


# Which implementation, by shape


@pytest.mark.parametrize(("taken", "expected"), [
    (cuda.takes_rows(BF16, 4096), True),
    (cuda.takes_rows(FP16, 8), True),
    (cuda.takes_rows(BF16, 4100), False),
    (cuda.takes_rows(FP32, 4096), False),
    (cuda.takes_attention(BF16, 128), True),
    (cuda.takes_attention(FP16, 256), True),
    (cuda.takes_attention(BF16, 80), False),
    (cuda.takes_attention(BF16, 512), False),
    (cuda.takes_attention(FP32, 128), False),
    (cuda.takes_rope(BF16, 8, 128), True),
    (cuda.takes_rope(BF16, 64, 128), True),  # 64 heads of 16 threads
    (cuda.takes_rope(BF16, 65, 128), False),
    (cuda.takes_rope(BF16, 32, 512), True),
    (cuda.takes_rope(BF16, 33, 512), False),
    (cuda.takes_rope(BF16, 8, 96), False),
    (cuda.takes_grouped(BF16, 4096, 14336), True),
    (cuda.takes_grouped(BF16, 4096, 1418), False),
    (cuda.takes_grouped(FP16, 4096, 14336), False),
])  # fmt: skip
def test_what_is_taken(taken, expected):
    assert taken is expected


def test_what_flashinfer_does_not_take_is_computed_without_it(without_flashinfer, paged_case):
    x, out = torch.randn(3, 20), torch.zeros(3, 20)
    for dtype, width in ((FP32, 20), (BF16, 20)):
        a, b = x[:, :width].to(dtype), out.to(dtype)
        without_flashinfer["rms_norm"](x=a, weight=a[0].clone(), eps=1e-6, out=b)
        assert b.any()
        without_flashinfer["swiglu"](gate_up=torch.cat([a, a], 1), out=b)
    for sizes in ({"head_dim": 96, "dtype": BF16}, {"head_dim": 64, "dtype": FP32}):
        case = paged_case(query_lens=[2, 1], context_lens=[3, 4], **sizes)
        without_flashinfer["prefill_attention"](**case.arguments)
        assert case.arguments["out"].any()
    with pytest.raises(AssertionError, match="FlashInfer was asked for"):
        without_flashinfer["swiglu"](gate_up=torch.ones(1, 32).to(BF16), out=b[:1, :16])


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


# Plans


def decode_call(paged_case, **changed):
    case = paged_case(query_lens=[1, 1, 1], context_lens=[5, 0, 40], head_dim=64, dtype=BF16)
    arguments = case.arguments | changed
    del arguments["query_start"]
    return arguments


def announced(arguments):
    return AttentionBatch(arguments["page_table"], arguments["seq_lens"])


def planned_by(operations, arguments) -> int:
    before = Wrapper.plans
    operations["decode_attention"](**arguments)
    return Wrapper.plans - before


def test_a_plan_is_made_once_for_announced_arrays(stood_in, paged_case):
    arguments = decode_call(paged_case)
    other = decode_call(paged_case)
    stood_in.prepare([announced(arguments), announced(other)])
    layers = [arguments, arguments, arguments | {"window": 4}, arguments | {"window": 4}, other]
    assert [planned_by(stood_in, layer) for layer in layers] == [1, 0, 1, 0, 1]
    stood_in.prepare([announced(arguments)])
    assert planned_by(stood_in, arguments) == 1
    stood_in.prepare([])
    assert [planned_by(stood_in, arguments) for _ in range(2)] == [1, 1]


def test_arrays_that_change_have_their_own_plan(stood_in, paged_case):
    arguments = decode_call(paged_case)
    stood_in["decode_attention"](**arguments)
    first = arguments["out"].clone()
    arguments["seq_lens"][2] = 17  # in place: not announced, so this is seen
    stood_in["decode_attention"](**arguments)
    assert not torch.equal(arguments["out"][2], first[2])
    assert torch.equal(arguments["out"][:2], first[:2])


def test_two_plans_of_one_iteration_do_not_share_a_wrapper(stood_in, paged_case):
    short = decode_call(paged_case)
    long = decode_call(paged_case, seq_lens=torch.tensor([6, 1, 30], dtype=torch.int32))
    expected = []
    for arguments in (short, long):
        stood_in["decode_attention"](**arguments)
        expected.append(arguments["out"].clone())
    stood_in.prepare([announced(short), announced(long)])
    for _ in range(2):
        for arguments, want in zip((short, long), expected, strict=True):
            stood_in["decode_attention"](**arguments)
            assert torch.equal(arguments["out"], want)
    stood_in.prepare([])


def test_a_wrapper_is_not_planned_again_before_the_device_has_read_its_last_plan(paged_case):
    operations = cuda.CudaOperations(library=lambda: STAND_IN, device_type="cpu")
    arguments = decode_call(paged_case)
    idle = operations._streams.current(arguments["q"].device).idle.setdefault("fa2", [])
    operations.decode_attention(**arguments)
    (first,) = idle
    read = False
    first.staged = SimpleNamespace(query=lambda: read)
    operations.decode_attention(**arguments)
    assert len(idle) == 2
    idle[1].staged = first.staged
    read = True
    operations.decode_attention(**arguments)
    assert len(idle) == 2


@pytest.mark.parametrize(("name", "values", "message"), [
    ("query_start", [0, 2, 4], "query_start runs from 0 to 4; expected 0 to 3, the rows of q"),
    ("query_start", [1, 2, 3], "query_start runs from 1 to 3; expected 0 to 3"),
    ("query_start", [0, 0, 3], "request 0 has 0 queries by query_start"),
    ("query_start", [0, 5, 3], "request 1 has -2 queries by query_start"),
    ("seq_lens", [13, 8], "13 tokens by seq_lens; .*at most 12 tokens, the page_table's width"),
    ("seq_lens", [1, 8], "request 0 has 2 queries by query_start and 1 tokens by seq_lens"),
    ("seq_lens", [9, 0], "request 1 has 1 queries by query_start and 0 tokens by seq_lens"),
    ("host_page_table", [[4, 5, 2], [1, 3, 0]], "page_table has 5 in use; expected 0 to 4"),
])  # fmt: skip
def test_lengths_that_do_not_fit_are_refused(stood_in, name, values, message):
    cache = {n: torch.randn(5, 1, 4, 64).to(BF16) for n in ("k_cache", "v_cache")}
    arrays = {
        "page_table": torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=torch.int32),
        "query_start": torch.tensor([0, 2, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([9, 8], dtype=torch.int32),
    }
    host = {"host_page_table": arrays["page_table"].clone()}
    changed = torch.tensor(values, dtype=torch.int32)
    if name == "host_page_table":
        host[name] = changed
    else:
        arrays[name] = changed
    stood_in.prepare([AttentionBatch(**arrays, **host)])
    out = torch.zeros(3, 128, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        stood_in["prefill_attention"](
            q=torch.randn(3, 128).to(BF16), scale=0.1, window=0, out=out, **arrays, **cache
        )
    assert not out.any()
    stood_in.prepare([])


@pytest.mark.parametrize(("changed", "message"), [
    ({"q": torch.zeros(3, 100).to(BF16)}, "q has rows of 100; expected a multiple of 2 KV heads"),
    ({"q": torch.zeros(3, 256).double()}, "q is torch.float64; expected torch.float32, torch.bf"),
    ({"q": torch.zeros(3, 256)}, "k_cache is torch.bfloat16 .*expected torch.float32"),
    ({"window": -1}, "window is -1; expected 0"),
    ({"soft_cap": math.nan}, "soft_cap is nan; expected 0"),
    ({"seq_lens": torch.tensor([1])}, "seq_lens is torch.int64 .*expected torch.int32"),
    ({"lse": torch.zeros(3, 5)}, "lse is torch.float32"),
])  # fmt: skip
def test_wrong_arguments_of_attention_are_refused(stood_in, paged_case, changed, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        stood_in["decode_attention"](**(decode_call(paged_case) | changed))


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

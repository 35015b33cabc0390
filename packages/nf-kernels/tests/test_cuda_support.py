"""Whether FlashInfer is found, and which shapes and dtypes it is given."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from nf_kernels import ops
from nf_kernels.ops import CUDA, REFERENCE, cuda
from nf_kernels.ops.cuda import support

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    """FlashInfer is looked for in this test, and again in the next one."""
    caches = (support._find_flashinfer, ops._say_once)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


# Finding it


def test_without_flashinfer_an_operation_says_what_to_install(looked_for_anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(RuntimeError, match=r"pip install 'nf-kernels\[cuda\]'"):
        cuda.flashinfer()


def test_a_device_without_flashinfer_computes_in_plain_torch_and_says_so_once(
    looked_for_anew, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO):
        assert ops.load("cuda", native=False) is REFERENCE
        assert not caplog.records
        assert ops.load("cuda") is REFERENCE
        assert ops.load("cuda:0") is REFERENCE
    assert [r.message for r in caplog.records if "plain torch" in r.message] == [
        "CUDA operations run in plain torch: import of flashinfer halted; None in sys.modules; "
        "install it with: pip install 'nf-kernels[cuda]'."
    ]


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), CUDA), ((7, 5), REFERENCE)])
def test_flashinfer_is_used_from_ampere_on(
    looked_for_anew, flashinfer_stand_in, monkeypatch, capability, expected
):
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_stand_in.FLASHINFER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert ops.load("cuda") is expected


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


def test_the_stand_in_has_the_arguments_of_flashinfer(flashinfer_stand_in):
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
    for name, function in functions(flashinfer_stand_in.FLASHINFER).items():
        mine = inspect.signature(function).parameters.values()
        by_name = {p.name: None for p in mine if p.kind is p.KEYWORD_ONLY}
        inspect.signature(of_real[name]).bind(*[None] * (len(mine) - len(by_name)), **by_name)


# What it takes


@pytest.mark.parametrize(("taken", "expected"), [
    (cuda.takes_rows(BF16, 4096), True),
    (cuda.takes_rows(FP16, 8), True),
    (cuda.takes_rows(BF16, 4100), False),
    (cuda.takes_rows(BF16, 0), False),
    (cuda.takes_rows(BF16, 4096, 0), False),
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
    (cuda.takes_grouped(BF16, 4096, 0), False),
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
    nothing = torch.zeros(3, 0).to(BF16)
    without_flashinfer["rms_norm"](x=nothing, weight=nothing[0], eps=1e-6, out=nothing)
    without_flashinfer["swiglu"](gate_up=nothing, out=nothing)
    with pytest.raises(AssertionError, match="FlashInfer was asked for"):
        without_flashinfer["swiglu"](gate_up=torch.ones(1, 32).to(BF16), out=b[:1, :16])


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize(("skipped", "gap"), [(0, 0), (1, 0), (0, 4)])  # elements of 2 bytes
def test_experts_that_do_not_begin_at_16_bytes_are_multiplied_in_plain_torch(
    without_flashinfer, monkeypatch, name, skipped, gap
):
    def refuse(*arguments, **by_name):
        raise RuntimeError("the grouped product was asked for")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuse)
    weights = {"gate_up": torch.ones(4, 32, 8).to(BF16), "down": torch.ones(4, 8, 16).to(BF16)}
    experts, rows, width = weights[name].shape
    memory = torch.ones(experts * rows * (width + gap) + skipped).to(BF16)[skipped:]
    weights[name] = memory.view(experts, rows, width + gap)[..., :width]
    out = torch.zeros(3, 8).to(BF16)
    arguments = {
        "x": torch.ones(3, 8).to(BF16),
        "expert_ids": torch.zeros(3, 2, dtype=torch.int64),
        "expert_weights": torch.ones(3, 2),
        "residual": out,
        "out": out,
    }
    if skipped or gap:
        without_flashinfer["moe_experts"](**arguments, **weights)
        assert out.all()
    else:
        with pytest.raises(RuntimeError, match="the grouped product was asked for"):
            without_flashinfer["moe_experts"](**arguments, **weights)

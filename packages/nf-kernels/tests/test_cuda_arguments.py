"""A CUDA operation refuses wrong arguments by name, before it writes anything.

Those of attention are in test_cuda_attention_plans.py.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nf_kernels.ops import CUDA, OPERATION_NAMES
from nf_kernels.ops.cuda.arguments import Arguments

BF16, FP32, INT32, INT64 = torch.bfloat16, torch.float32, torch.int32, torch.int64


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def attention_arguments(requests: int):
    return {
        "q": zeros(requests, 128),
        "k_cache": zeros(5, 1, 4, 64),
        "v_cache": zeros(5, 1, 4, 64),
        "page_table": zeros(requests, 3, dtype=INT32),
        "seq_lens": zeros(requests, dtype=INT32),
        "scale": 0.1,
        "window": 0,
        "out": zeros(requests, 128),
        "lse": zeros(requests, 2, dtype=FP32),
    }


ARGUMENTS = {
    "embedding": lambda: {
        "token_ids": zeros(3, dtype=INT64), "table": zeros(9, 8), "out": zeros(3, 8)
    },
    "gather_rows": lambda: {"x": zeros(9, 8), "index": zeros(3, dtype=INT64), "out": zeros(3, 8)},
    "rms_norm": lambda: {"x": zeros(3, 8), "weight": zeros(8), "eps": 1e-6, "out": zeros(3, 8)},
    "linear": lambda: {
        "x": zeros(3, 8), "weight": zeros(16, 8), "bias": zeros(16), "out": zeros(3, 16)
    },
    "rope_append": lambda: {
        "qkv": zeros(3, 256),  # 2 heads, 1 KV head
        "positions": zeros(3, dtype=INT64),
        "slots": zeros(3, dtype=INT64),
        "cos_sin": zeros(6, 64, dtype=FP32),
        "k_cache": zeros(5, 1, 4, 64),
        "v_cache": zeros(5, 1, 4, 64),
        "out": zeros(3, 128),
        "q_norm": zeros(64),
    },
    "prefill_attention": lambda: attention_arguments(2) | {"query_start": zeros(3, dtype=INT32)},
    "decode_attention": lambda: attention_arguments(2),
    "merge_attention": lambda: {
        **{name: zeros(3, 128) for name in ("a", "b", "out")},
        **{name: zeros(3, 2, dtype=FP32) for name in ("lse_a", "lse_b", "lse_out")},
    },
    "swiglu": lambda: {"gate_up": zeros(3, 16), "out": zeros(3, 8)},
    "moe_route": lambda: {
        "router_logits": zeros(3, 4),
        "normalize": True,
        "expert_ids": zeros(3, 2, dtype=INT64),
        "expert_weights": zeros(3, 2, dtype=FP32),
    },
    "moe_experts": lambda: {
        "x": zeros(3, 8),
        "expert_ids": zeros(3, 2, dtype=INT64),
        "expert_weights": zeros(3, 2, dtype=FP32),
        "gate_up": zeros(4, 32, 8),
        "down": zeros(4, 8, 16),
        "residual": zeros(3, 8),
        "out": zeros(3, 8),
    },
    "sample": lambda: {
        "logits": zeros(3, 9, dtype=FP32),
        **{n: zeros(3, dtype=FP32) for n in ("temperature", "top_p", "min_p", "uniform")},
        **{n: zeros(3, dtype=INT64) for n in ("top_k", "out")},
    },
    "feed_sampled": lambda: {
        **{n: zeros(3, dtype=INT64) for n in ("token_ids", "slots")},
        "last_sampled": zeros(9, dtype=INT64),
    },
    "keep_sampled": lambda: {
        **{n: zeros(3, dtype=INT64) for n in ("sampled", "slots")},
        "last_sampled": zeros(9, dtype=INT64),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_right_arguments_are_taken(name):
    getattr(Arguments("cpu"), name)(**ARGUMENTS[name]())


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_tensors_of_another_device_are_refused(name):
    with pytest.raises(ValueError, match=r"^\w+ is torch\.\w+ \[.*on cpu; expected .* on cuda$"):
        CUDA[name](**ARGUMENTS[name]())


@pytest.mark.parametrize("name", OPERATION_NAMES)
def test_tensors_of_several_devices_are_refused(name):
    with FakeTensorMode():
        arguments = {
            n: torch.empty(v.shape, dtype=v.dtype, device="cuda:0")
            if isinstance(v, torch.Tensor)
            else v
            for n, v in ARGUMENTS[name]().items()
        }
        getattr(Arguments("cuda"), name)(**arguments)
        first, *others = (n for n, v in arguments.items() if isinstance(v, torch.Tensor))
        for other in others:
            tensor = arguments[other]
            elsewhere = {other: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:1")}
            message = rf"^{other} is on cuda:1; expected cuda:0, as {first} is$"
            with pytest.raises(ValueError, match=message):
                getattr(Arguments("cuda"), name)(**arguments | elsewhere)


@pytest.mark.parametrize(("name", "changed", "message"), [
    ("swiglu", {"gate_up": zeros(3, 15)}, "gate_up has rows of 15; expected an even number"),
    ("swiglu", {"out": zeros(3, 9)}, r"out is torch.bfloat16 \[3, 9\] .* \[3, 8\] on cpu"),
    ("swiglu", {"gate_up": zeros(3, 16, dtype=INT32)}, "gate_up is torch.int32; expected torch.f"),
    ("swiglu", {"gate_up": zeros(16, 3).t()}, "gate_up has stride 3 in its last dimension"),
    ("moe_route", {"expert_ids": zeros(3, 0, dtype=INT64), "expert_weights": zeros(3, 0).float()},
     "expert_ids has rows of 0; expected 1 to 4, the experts there are"),
    ("moe_route", {"expert_ids": zeros(3, 5, dtype=INT64), "expert_weights": zeros(3, 5).float()},
     "expert_ids has rows of 5; expected 1 to 4"),
    ("moe_route", {"expert_ids": zeros(3, 2, dtype=INT32)}, "expert_ids is torch.int32 .*int64"),
    ("moe_route", {"expert_weights": zeros(3, 2)}, "expert_weights is torch.bfloat16 .*float32"),
    ("moe_experts", {"x": zeros(3, 9)}, r"down is .* expected torch.bfloat16 \[any, 9, any\]"),
    ("moe_experts", {"gate_up": zeros(4, 16, 8)}, r"gate_up is .* expected .* \[4, 32, 8\]"),
    ("moe_experts", {"expert_ids": zeros(2, 2, dtype=INT64)}, r"expert_ids is .*\[3, any\]"),
    ("moe_experts", {"expert_weights": zeros(3, 1, dtype=FP32)}, r"expert_weights is .*\[3, 2\]"),
    ("moe_experts", {"residual": zeros(3, 8, dtype=FP32)}, "residual is torch.float32"),
    ("merge_attention", {"b": zeros(2, 128)}, r"b is .*\[3, 128\] on cpu"),
    ("merge_attention", {"lse_b": zeros(3, 4, dtype=FP32)}, r"lse_b is .*\[3, 2\] on cpu"),
    ("merge_attention", {"lse_out": zeros(3, 4, dtype=FP32)[:, :2]}, "lse_out is not contiguous"),
    ("merge_attention", {n: zeros(3, 3, dtype=FP32) for n in ("lse_a", "lse_b", "lse_out")},
     "a has rows of 128; expected a multiple of lse_a's 3 heads"),
    ("sample", {"logits": zeros(3, 9)}, "logits is torch.bfloat16 .*expected torch.float32"),
    ("sample", {"logits": zeros(3, 0, dtype=FP32)}, "logits has rows of 0; expected at least one"),
    ("sample", {"top_k": zeros(3, dtype=INT32)}, "top_k is torch.int32 .*expected torch.int64"),
    ("feed_sampled", {"slots": zeros(2, dtype=INT64)}, r"slots is .*\[2\] .*\[3\] on cpu"),
    ("keep_sampled", {"sampled": zeros(3, dtype=INT32)}, "sampled is torch.int32 .*torch.int64"),
    ("sample", {"uniform": zeros(2, dtype=FP32)}, r"uniform is .*\[2\] .*\[3\] on cpu"),
    ("rope_append", {"qkv": zeros(3, 200)}, "qkv has rows of 200; expected a multiple of head_dim"),
    ("rope_append", {"qkv": zeros(3, 128)}, "qkv has rows of 128; .* more than the 2 heads of K"),
    ("rope_append", {n: zeros(5, 1, 4, 63) for n in ("k_cache", "v_cache")},
     "k_cache has heads of 63; rotation needs an even number"),
    ("rope_append", {n: zeros(5, 1, 0, 64) for n in ("k_cache", "v_cache")},
     "k_cache is .*, the last three at least 1"),
    ("rope_append", {"v_cache": zeros(5, 1, 8, 64)[:, :, ::2]}, "v_cache is not contiguous"),
    ("rope_append", {"slots": zeros(2, dtype=INT64)}, r"slots is .*\[3\] on cpu"),
    ("rope_append", {"cos_sin": zeros(6, 64)}, "cos_sin is torch.bfloat16 .*torch.float32"),
    ("rope_append", {"k_norm": zeros(32)}, r"k_norm is .*\[64\] on cpu"),
])  # fmt: skip
def test_wrong_arguments_are_refused(stood_in, name, changed, message):
    arguments = ARGUMENTS[name]() | changed
    with pytest.raises(ValueError, match=f"^{message}"):
        stood_in[name](**arguments)

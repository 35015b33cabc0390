"""A native operation refuses wrong arguments by name, before it reads or writes any of them."""

from __future__ import annotations

import pytest
import torch

from nf_kernels.ops import REFERENCE

INT32, INT64 = torch.int32, torch.int64


def rms_norm_arguments():
    return {"x": torch.randn(3, 8), "weight": torch.randn(8), "eps": 1e-6, "out": torch.zeros(3, 8)}


def swiglu_arguments():
    return {"gate_up": torch.randn(3, 16), "out": torch.zeros(3, 8)}


def rope_append_arguments():
    return {
        "qkv": torch.randn(3, 4 * 8),  # 2 heads, 1 KV head
        "positions": torch.tensor([0, 1, 2]),
        "slots": torch.tensor([4, 5, 9]),
        "cos_sin": torch.randn(6, 8),
        "k_cache": torch.zeros(5, 1, 4, 8),
        "v_cache": torch.zeros(5, 1, 4, 8),
        "out": torch.zeros(3, 16),
        "q_norm": torch.ones(8),
        "k_norm": torch.ones(8),
        "eps": 1e-6,
    }


def prefill_arguments():
    return {
        "q": torch.randn(3, 16),
        "k_cache": torch.randn(5, 1, 4, 8),
        "v_cache": torch.randn(5, 1, 4, 8),
        "page_table": torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=INT32),
        "query_start": torch.tensor([0, 2, 3], dtype=INT32),
        "seq_lens": torch.tensor([9, 8], dtype=INT32),
        "scale": 0.3,
        "window": 0,
        "out": torch.zeros(3, 16),
    }


def decode_arguments():
    arguments = prefill_arguments()
    del arguments["query_start"]
    return arguments | {"q": torch.randn(2, 16), "out": torch.zeros(2, 16)}


ARGUMENTS = {
    "rms_norm": rms_norm_arguments,
    "swiglu": swiglu_arguments,
    "rope_append": rope_append_arguments,
    "prefill_attention": prefill_arguments,
    "decode_attention": decode_arguments,
}


def refused(native, operation, message, **changed):
    arguments = ARGUMENTS[operation]() | changed
    tensors = {n: a for n, a in arguments.items() if isinstance(a, torch.Tensor)}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        native[operation](**arguments)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, kept[name]), f"{name} was written"


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_the_arguments_before_they_are_spoiled_are_taken(native, operation):
    arguments = ARGUMENTS[operation]()
    native[operation](**arguments)
    assert arguments["out"].any()


TENSORS = [
    (operation, name)
    for operation, make in ARGUMENTS.items()
    for name, value in make().items()
    if isinstance(value, torch.Tensor)
]
each_tensor = pytest.mark.parametrize(("operation", "name"), TENSORS)
# Where the first tensor has the wrong dtype or shape, it is another that disagrees with it.
AGREES_WITH = {
    "x": "x|weight|out",
    "gate_up": "gate_up|out",
    "k_cache": "[kv]_cache",
    "v_cache": "v_cache",
    "qkv": "qkv|k_cache|out",
    "q": "q|k_cache|out|seq_lens",
    "seq_lens": "seq_lens|query_start",
}


@each_tensor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, INT32, INT64, torch.bool])
def test_dtype(native, operation, name, dtype):
    value = ARGUMENTS[operation]()[name]
    if value.dtype != dtype:
        message = rf"^({AGREES_WITH.get(name, name)}) is torch\.\w+ .*expected torch\.\w+"
        refused(native, operation, message, **{name: value.to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float64, INT64])
@pytest.mark.parametrize("operation", ARGUMENTS)
def test_all_of_a_dtype_without_kernels(native, operation, dtype):
    changed = {
        name: value.to(dtype)
        for name, value in ARGUMENTS[operation]().items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "cos_sin"
    }
    message = rf"is {dtype}; expected torch.float32, torch.bfloat16 or torch.float16"
    refused(native, operation, message, **changed)


@each_tensor
@pytest.mark.parametrize("change", ["more", "less", "deeper", "flat", "scalar"])
def test_shape(native, operation, name, change):
    value = ARGUMENTS[operation]()[name]
    along = 1 if name == "cos_sin" else 0  # it may have any number of rows
    changed = {
        "more": torch.cat([value, value], dim=along),
        "less": value.narrow(along, 0, value.shape[along] - 1).contiguous(),
        "deeper": value.unsqueeze(0),
        "flat": value.flatten() if value.dim() > 1 else value[:0],
        "scalar": value.flatten()[0],
    }[change]
    agrees = "[kv]_cache" if name in {"k_cache", "v_cache"} else AGREES_WITH.get(name, name)
    refused(native, operation, rf"^({agrees}) (is|has)", **{name: changed})


@each_tensor
def test_elements_that_are_not_next_to_each_other(native, operation, name):
    value = ARGUMENTS[operation]()[name]
    spread = torch.stack([value, value], dim=-1)[..., 0]
    assert spread.stride(-1) == 2
    refused(native, operation, rf"^{name} (has stride 2|is not contiguous)", **{name: spread})


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "cos_sin"])
def test_what_must_be_contiguous(native, name):
    value = ARGUMENTS["rope_append"]()[name]
    gaps = torch.cat([value, value], dim=-1)[..., : value.shape[-1]]
    refused(native, "rope_append", f"^{name} is not contiguous", **{name: gaps})


@pytest.mark.parametrize(("name", "values", "message"), [
    ("positions", [0, 1, 6], r"positions\[2\] is 6; expected 0 to 5"),
    ("positions", [0, -1, 2], r"positions\[1\] is -1; expected 0 to 5"),
    ("slots", [4, 20, 9], r"slots\[1\] is 20; expected 0 to 19"),
    ("slots", [-1, 5, 9], r"slots\[0\] is -1; expected 0 to 19"),
    ("slots", [2**62, 5, 9], r"slots\[0\] is 4611686018427387904; expected 0 to 19"),
])  # fmt: skip
def test_rope_append_indices(native, name, values, message):
    refused(native, "rope_append", message, **{name: torch.tensor(values)})


@pytest.mark.parametrize(("changed", "message"), [
    ({"head_dim": 7}, "k_cache has heads of 7; rotation needs an even number"),
    ({"head_dim": 0}, r"k_cache is \[5, 1, 4, 0\]; expected"),
    ({"page_size": 0}, r"k_cache is \[5, 1, 0, 8\]; expected"),
    ({"kv_heads": 0}, r"k_cache is \[5, 0, 4, 8\]; expected"),
    ({"kv_heads": 2}, "qkv has rows of 32; expected a multiple of head_dim 8, with more than"),
    ({"head_dim": 12}, "qkv has rows of 32; expected a multiple of head_dim 12"),
])  # fmt: skip
def test_rope_append_heads(native, changed, message):
    sizes = {"pages": 5, "kv_heads": 1, "page_size": 4, "head_dim": 8} | changed
    caches = {name: torch.zeros(tuple(sizes.values())) for name in ("k_cache", "v_cache")}
    refused(native, "rope_append", message, **caches)


@pytest.mark.parametrize(("name", "values", "message"), [
    ("page_table", [[4, 5, 2], [1, 3, 0]], r"page_table\[1\] is 5; expected 0 to 4"),
    ("page_table", [[4, 0, 2], [-1, 3, 0]], r"page_table\[0\] is -1; expected 0 to 4"),
    ("query_start", [0, 2, 4], "query_start runs from 0 to 4; expected 0 to 3, the rows of q"),
    ("query_start", [0, 1, 2], "query_start runs from 0 to 2; expected 0 to 3, the rows of q"),
    ("query_start", [1, 2, 3], "query_start runs from 1 to 3; expected 1 to 4"),
    ("query_start", [0, 0, 3], "request 0 has 0 queries by query_start"),
    ("query_start", [0, 5, 3], "request 1 has -2 queries by query_start"),
    ("seq_lens", [13, 8], "13 tokens by seq_lens; .*at most 12 tokens, the page_table's width"),
    ("seq_lens", [1, 8], "request 0 has 2 queries by query_start and 1 tokens by seq_lens"),
    ("seq_lens", [9, 0], "request 1 has 1 queries by query_start and 0 tokens by seq_lens"),
    ("seq_lens", [-9, 8], "-9 tokens by seq_lens"),
    ("seq_lens", [2**31 - 1, 8], "2147483647 tokens by seq_lens"),
])  # fmt: skip
def test_prefill_attention_indices(native, name, values, message):
    values = torch.tensor(values, dtype=INT32)
    refused(native, "prefill_attention", message, **{name: values})


@pytest.mark.parametrize(("name", "values", "message"), [
    ("page_table", [[4, 0, 2], [1, 9, 0]], r"page_table\[1\] is 9; expected 0 to 4"),
    ("seq_lens", [9, 13], "13 tokens by seq_lens; .*at most 12 tokens"),
    ("seq_lens", [0, 8], "0 tokens by seq_lens"),
    ("seq_lens", [9], r"seq_lens is torch.int32 \[1\].*expected torch.int32 \[2\]"),
])  # fmt: skip
def test_decode_attention_indices(native, name, values, message):
    values = torch.tensor(values, dtype=INT32)
    refused(native, "decode_attention", message, **{name: values})


@pytest.mark.parametrize("operation", ["prefill_attention", "decode_attention"])
def test_attention_heads_and_window(native, operation):
    rows = ARGUMENTS[operation]()["q"].shape[0]
    for width in (12, 4, 0):
        changed = {"q": torch.randn(rows, width), "out": torch.zeros(rows, width)}
        refused(native, operation, f"q has rows of {width}; expected a multiple of 1", **changed)
    refused(native, operation, "window is -1; expected 0", window=-1)


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_no_rows(native, operation):
    by_row = {"x", "out", "gate_up", "qkv", "positions", "slots", "q", "page_table", "seq_lens"}
    arguments = {
        name: value[:0].clone() if name in by_row else value
        for name, value in ARGUMENTS[operation]().items()
    }
    if "query_start" in arguments:
        arguments["query_start"] = torch.zeros(1, dtype=INT32)
    for operations in (native, REFERENCE):
        operations[operation](**arguments)
    assert arguments["out"].shape[0] == 0


def test_rows_of_no_request(native):
    changed = {
        "seq_lens": torch.empty(0, dtype=INT32),
        "page_table": torch.empty(0, 3, dtype=INT32),
        "query_start": torch.zeros(1, dtype=INT32),
    }
    refused(native, "prefill_attention", "query_start runs from 0 to 0; expected 0 to 3", **changed)


@pytest.mark.parametrize("slot", [-1, 3])
@pytest.mark.parametrize(
    ("name", "ids"), [("feed_sampled", "token_ids"), ("keep_sampled", "sampled")]
)
def test_slots_of_sampled_tokens(native, name, ids, slot):
    last = torch.tensor([10, 11, 12])
    tokens = torch.tensor([-1, -1])
    with pytest.raises(ValueError, match=rf"slots\[1\] is {slot}; expected 0 to 2"):
        native[name](**{ids: tokens}, slots=torch.tensor([0, slot]), last_sampled=last)
    assert (last.tolist(), tokens.tolist()) == ([10, 11, 12], [-1, -1])
    with pytest.raises(ValueError, match=r"slots is torch.int64 \[1\] .*torch.int64 \[2\]"):
        native[name](**{ids: tokens}, slots=torch.tensor([0]), last_sampled=last)

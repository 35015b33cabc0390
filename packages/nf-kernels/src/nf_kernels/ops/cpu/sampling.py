"""Drawing tokens."""

import torch
from torch import Tensor

from nf_kernels.ops.cpu.arguments import (
    check,
    kernels,
    scratch_address,
)


def sample(
    *,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    out: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """As `sampling.sample`, adding up in float64, in `scratch`."""
    check("logits", logits, torch.float32, (None, None))
    rows, vocab_size = logits.shape
    for name, values, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("uniform", uniform, torch.float32),
        ("out", out, torch.int64),
    ):
        check(name, values, dtype, (rows,))
    if rows and not vocab_size:
        raise ValueError("logits has rows of 0; expected at least one token to choose from")
    kernels().sample(
        logits.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        uniform.data_ptr(),
        out.data_ptr(),
        scratch_address(scratch, sample_scratch_bytes(vocab_size=vocab_size)),
        rows,
        vocab_size,
        logits.stride(0),
    )


def feed_sampled(*, token_ids: Tensor, slots: Tensor, last_sampled: Tensor) -> None:
    """As `sampling.feed_sampled`."""
    check("token_ids", token_ids, torch.int64, (None,))
    check("slots", slots, torch.int64, token_ids.shape)
    check("last_sampled", last_sampled, torch.int64, (None,))
    kernels().feed_sampled(
        token_ids.data_ptr(),
        slots.data_ptr(),
        last_sampled.data_ptr(),
        len(token_ids),
        len(last_sampled),
    )


def keep_sampled(*, sampled: Tensor, slots: Tensor, last_sampled: Tensor) -> None:
    """As `sampling.keep_sampled`."""
    check("sampled", sampled, torch.int64, (None,))
    check("slots", slots, torch.int64, sampled.shape)
    check("last_sampled", last_sampled, torch.int64, (None,))
    kernels().keep_sampled(
        sampled.data_ptr(),
        slots.data_ptr(),
        last_sampled.data_ptr(),
        len(sampled),
        len(last_sampled),
    )


def sample_scratch_bytes(*, vocab_size: int) -> int:
    """Bytes of scratch of `sample`: some for every thread."""
    return int(kernels().sample_scratch_bytes(vocab_size))

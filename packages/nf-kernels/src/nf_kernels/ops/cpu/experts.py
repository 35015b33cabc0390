"""Mixtures of experts: routing, and the products of those chosen."""

import torch
from torch import Tensor

from nf_kernels.ops.cpu.arguments import (
    address,
    check,
    check_contiguous,
    check_packed,
    dtype_code,
    kernels,
    scratch_address,
)


def moe_route(
    *, router_logits: Tensor, normalize: bool, expert_ids: Tensor, expert_weights: Tensor
) -> None:
    """As `reference.moe_route`; of equal logits the first expert."""
    check("router_logits", router_logits, router_logits.dtype, (None, None))
    tokens, experts = router_logits.shape
    check("expert_ids", expert_ids, torch.int64, (tokens, None))
    chosen = expert_ids.shape[1]
    check("expert_weights", expert_weights, torch.float32, (tokens, chosen))
    check_contiguous("expert_ids", expert_ids)
    check_contiguous("expert_weights", expert_weights)
    if not 1 <= chosen <= experts:
        raise ValueError(
            f"expert_ids has rows of {chosen}; expected 1 to {experts}, the experts there are"
        )
    kernels().moe_route(
        dtype_code("router_logits", router_logits),
        router_logits.data_ptr(),
        expert_ids.data_ptr(),
        expert_weights.data_ptr(),
        tokens,
        experts,
        chosen,
        router_logits.stride(0),
        normalize,
    )


def moe_experts(
    *,
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    first_expert: int | None = None,
    scratch: Tensor | None = None,
) -> None:
    """As `reference.moe_experts`, with weights that `packing.pack` has packed, in `scratch`."""
    check("x", x, x.dtype, (None, None))
    tokens, hidden = x.shape
    check("expert_ids", expert_ids, torch.int64, (tokens, None))
    chosen = expert_ids.shape[1]
    check("expert_weights", expert_weights, torch.float32, (tokens, chosen))
    check_contiguous("expert_ids", expert_ids)
    check_contiguous("expert_weights", expert_weights)
    if residual is not None:
        check("residual", residual, x.dtype, (tokens, hidden))
    check("out", out, x.dtype, (tokens, hidden))
    experts = gate_up.shape[0]
    inner = _inner_size(down)
    check_packed("gate_up", gate_up, x.dtype, (experts,), 2 * inner, hidden)
    check_packed("down", down, x.dtype, (experts,), hidden, inner)
    needed = moe_experts_scratch_bytes(
        tokens=tokens, experts_per_token=chosen, gate_up=gate_up, down=down
    )
    kernels().moe_experts(
        dtype_code("x", x),
        x.data_ptr(),
        expert_ids.data_ptr(),
        expert_weights.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        address(residual),
        out.data_ptr(),
        scratch_address(scratch, needed),
        tokens,
        chosen,
        experts,
        hidden,
        inner,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        gate_up.stride(0),
        down.stride(0),
        first_expert or 0,
        first_expert is not None,
    )


def _inner_size(down: Tensor) -> int:
    """Feed-forward size of packed experts."""
    steps = down.shape[2] if down.dim() > 2 else 0
    return steps * (2 if down.dtype == torch.bfloat16 else 1)


def moe_experts_scratch_bytes(
    *, tokens: int, experts_per_token: int, gate_up: Tensor, down: Tensor
) -> int:
    """Bytes of scratch of `moe_experts` with these packed weights."""
    pair = 2 if gate_up.dtype == torch.bfloat16 else 1
    return int(
        kernels().moe_experts_scratch_bytes(
            dtype_code("gate_up", gate_up),
            tokens,
            experts_per_token,
            gate_up.shape[0],
            gate_up.shape[2] * pair,
            _inner_size(down),
        )
    )

"""The checks of each operation's arguments, before anything is launched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nf_kernels.ops.checks import Checks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _on_one_device(check: Callable[..., None]) -> Callable[..., None]:
    """The checks of an operation, and that its tensors are together: there are several devices."""

    @functools.wraps(check)
    def call(self: Arguments, **arguments: Any) -> None:
        check(self, **arguments)
        tensors = {n: value for n, value in arguments.items() if isinstance(value, Tensor)}
        first, *_ = tensors
        device = tensors[first].device
        for name, tensor in tensors.items():
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}; expected {device}, as {first} is")

    return call


class Arguments:
    """Checks of every operation, by its name, with the arguments of `nf_kernels.ops.reference`.

    Every method raises a ValueError that names the argument, what it is and what was expected.
    Numbers that are on the device are not looked at. `scratch` is not either: nothing uses it.
    """

    def __init__(self, device_type: str) -> None:
        """Say where tensors must be.

        Args:
            device_type: As `torch.device.type`.
        """
        self._check = Checks(device_type, _DTYPES)

    @_on_one_device
    def embedding(self, *, token_ids: Tensor, table: Tensor, out: Tensor) -> None:
        """Of `reference.embedding`."""
        self._check.tensor("token_ids", token_ids, torch.int64, (None,))
        self._check.first("table", table, (None, None))
        self._check.tensor("out", out, table.dtype, (token_ids.shape[0], table.shape[1]))

    @_on_one_device
    def gather_rows(self, *, x: Tensor, index: Tensor, out: Tensor) -> None:
        """Of `reference.gather_rows`."""
        self._check.tensor("index", index, torch.int64, (None,))
        self._check.first("x", x, (None, None))
        self._check.tensor("out", out, x.dtype, (index.shape[0], x.shape[1]))

    @_on_one_device
    def rms_norm(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out: Tensor,
        residual: Tensor | None = None,
    ) -> None:
        """Of `reference.rms_norm`."""
        self._check.first("x", x, (None, None))
        rows, width = x.shape
        self._check.tensor("weight", weight, x.dtype, (width,))
        self._check.tensor("out", out, x.dtype, (rows, width))
        if residual is not None:
            self._check.tensor("residual", residual, x.dtype, (rows, width))

    @_on_one_device
    def linear(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """Of `reference.linear`."""
        self._check.first("x", x, (None, None))
        rows, in_features = x.shape
        self._check.tensor("weight", weight, x.dtype, (None, in_features))
        out_features = weight.shape[0]
        out_dtype = torch.float32 if out.dtype == torch.float32 else x.dtype
        self._check.tensor("out", out, out_dtype, (rows, out_features))
        if bias is not None:
            self._check.tensor("bias", bias, x.dtype, (out_features,))
        if residual is not None:
            self._check.tensor("residual", residual, x.dtype, (rows, out_features))

    @_on_one_device
    def rope_append(
        self,
        *,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Of `reference.rope_append`."""
        self._check.first("qkv", qkv, (None, None))
        self._check.caches(k_cache, v_cache, qkv.dtype)
        _, kv_heads, _, head_dim = k_cache.shape
        if head_dim % 2:
            raise ValueError(f"k_cache has heads of {head_dim}; rotation needs an even number")
        tokens, width = qkv.shape
        heads = width // head_dim - 2 * kv_heads
        if heads < 1 or width % head_dim:
            raise ValueError(
                f"qkv has rows of {width}; expected a multiple of head_dim {head_dim}, "
                f"with more than the {2 * kv_heads} heads of K and V"
            )
        self._check.tensor("out", out, qkv.dtype, (tokens, heads * head_dim))
        self._check.tensor("positions", positions, torch.int64, (tokens,))
        self._check.tensor("slots", slots, torch.int64, (tokens,))
        self._check.tensor("cos_sin", cos_sin, torch.float32, (None, head_dim))
        self._check.contiguous("cos_sin", cos_sin)
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                self._check.tensor(name, norm, qkv.dtype, (head_dim,))

    @_on_one_device
    def prefill_attention(
        self,
        *,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        scale: float,
        window: int,
        out: Tensor,
        soft_cap: float = 0.0,
        lse: Tensor | None = None,
    ) -> None:
        """Of `reference.prefill_attention`."""
        self._check.tensor("seq_lens", seq_lens, torch.int32, (None,))
        self._check.tensor("query_start", query_start, torch.int32, (seq_lens.shape[0] + 1,))
        self._check.contiguous("query_start", query_start)
        self._check.first("q", q, (None, None))
        self._attention(q, k_cache, v_cache, page_table, seq_lens, window, out, soft_cap, lse)

    @_on_one_device
    def decode_attention(
        self,
        *,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        scale: float,
        window: int,
        out: Tensor,
        soft_cap: float = 0.0,
        lse: Tensor | None = None,
    ) -> None:
        """Of `reference.decode_attention`."""
        self._check.first("q", q, (None, None))
        self._check.tensor("seq_lens", seq_lens, torch.int32, (q.shape[0],))
        self._attention(q, k_cache, v_cache, page_table, seq_lens, window, out, soft_cap, lse)

    def _attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
        window: int,
        out: Tensor,
        soft_cap: float,
        lse: Tensor | None,
    ) -> None:
        """What both attentions ask, once q is known to be rows."""
        self._check.caches(k_cache, v_cache, q.dtype)
        _, kv_heads, _, head_dim = k_cache.shape
        rows, width = q.shape
        if not width or width % (kv_heads * head_dim):
            raise ValueError(
                f"q has rows of {width}; expected a multiple of "
                f"{kv_heads} KV heads * head_dim {head_dim}"
            )
        self._check.tensor("out", out, q.dtype, (rows, width))
        self._check.tensor("page_table", page_table, torch.int32, (seq_lens.shape[0], None))
        self._check.contiguous("seq_lens", seq_lens)
        if window < 0:
            raise ValueError(f"window is {window}; expected 0 (all keys) or a number of keys")
        if not 0 <= soft_cap < math.inf:
            raise ValueError(f"soft_cap is {soft_cap}; expected 0 (none) or a positive number")
        if lse is not None:
            self._check.tensor("lse", lse, torch.float32, (rows, width // head_dim))
            self._check.contiguous("lse", lse)

    @_on_one_device
    def merge_attention(
        self,
        *,
        a: Tensor,
        lse_a: Tensor,
        b: Tensor,
        lse_b: Tensor,
        out: Tensor,
        lse_out: Tensor,
    ) -> None:
        """Of `reference.merge_attention`."""
        self._check.first("a", a, (None, None))
        self._check.tensor("b", b, a.dtype, tuple(a.shape))
        self._check.tensor("out", out, a.dtype, tuple(a.shape))
        self._check.tensor("lse_a", lse_a, torch.float32, (a.shape[0], None))
        heads = lse_a.shape[1]
        for name, lse in (("lse_a", lse_a), ("lse_b", lse_b), ("lse_out", lse_out)):
            self._check.tensor(name, lse, torch.float32, (a.shape[0], heads))
            self._check.contiguous(name, lse)
        if heads < 1 or a.shape[1] % heads:
            raise ValueError(
                f"a has rows of {a.shape[1]}; expected a multiple of lse_a's {heads} heads"
            )

    @_on_one_device
    def swiglu(self, *, gate_up: Tensor, out: Tensor) -> None:
        """Of `reference.swiglu`."""
        self._check.first("gate_up", gate_up, (None, None))
        rows, width = gate_up.shape
        if width % 2:
            raise ValueError(f"gate_up has rows of {width}; expected an even number")
        self._check.tensor("out", out, gate_up.dtype, (rows, width // 2))

    @_on_one_device
    def moe_route(
        self, *, router_logits: Tensor, normalize: bool, expert_ids: Tensor, expert_weights: Tensor
    ) -> None:
        """Of `reference.moe_route`."""
        self._check.first("router_logits", router_logits, (None, None))
        tokens, experts = router_logits.shape
        self._check.tensor("expert_ids", expert_ids, torch.int64, (tokens, None))
        chosen = expert_ids.shape[1]
        self._check.tensor("expert_weights", expert_weights, torch.float32, (tokens, chosen))
        if not 1 <= chosen <= experts:
            raise ValueError(
                f"expert_ids has rows of {chosen}; expected 1 to {experts}, the experts there are"
            )

    @_on_one_device
    def moe_experts(
        self,
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
        """Of `reference.moe_experts`."""
        self._check.first("x", x, (None, None))
        tokens, hidden = x.shape
        self._check.tensor("expert_ids", expert_ids, torch.int64, (tokens, None))
        chosen = expert_ids.shape[1]
        self._check.tensor("expert_weights", expert_weights, torch.float32, (tokens, chosen))
        self._check.tensor("down", down, x.dtype, (None, hidden, None))
        experts, _, inner = down.shape
        self._check.tensor("gate_up", gate_up, x.dtype, (experts, 2 * inner, hidden))
        if residual is not None:
            self._check.tensor("residual", residual, x.dtype, (tokens, hidden))
        self._check.tensor("out", out, x.dtype, (tokens, hidden))

    @_on_one_device
    def sample(
        self,
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
        """Of `sampling.sample`."""
        self._check.tensor("logits", logits, torch.float32, (None, None))
        rows, vocab_size = logits.shape
        for name, values, dtype in (
            ("temperature", temperature, torch.float32),
            ("top_k", top_k, torch.int64),
            ("top_p", top_p, torch.float32),
            ("min_p", min_p, torch.float32),
            ("uniform", uniform, torch.float32),
            ("out", out, torch.int64),
        ):
            self._check.tensor(name, values, dtype, (rows,))
        if rows and not vocab_size:
            raise ValueError("logits has rows of 0; expected at least one token to choose from")

    @_on_one_device
    def feed_sampled(self, *, token_ids: Tensor, slots: Tensor, last_sampled: Tensor) -> None:
        """Of `sampling.feed_sampled`."""
        self._check.tensor("token_ids", token_ids, torch.int64, (None,))
        self._check.tensor("slots", slots, torch.int64, token_ids.shape)
        self._check.tensor("last_sampled", last_sampled, torch.int64, (None,))

    @_on_one_device
    def keep_sampled(self, *, sampled: Tensor, slots: Tensor, last_sampled: Tensor) -> None:
        """Of `sampling.keep_sampled`."""
        self._check.tensor("sampled", sampled, torch.int64, (None,))
        self._check.tensor("slots", slots, torch.int64, sampled.shape)
        self._check.tensor("last_sampled", last_sampled, torch.int64, (None,))

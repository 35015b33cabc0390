"""What `generate` fills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from nf_kvcache.copier import Layer
from nf_kvcache.integrations.transformers.model import layers_of

if TYPE_CHECKING:
    from nf_kvcache.integrations.transformers.prefix_store import PrefixStore

_UNDERSTOOD = {
    "attention_mask",
    "input_ids",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}
"""Arguments of a forward pass that are looked at, or that K and V do not depend on."""


class PrefixCache(DynamicCache):
    """The cache of one call of `generate`; `PrefixStore.cache` makes it.

    What the call computes is kept when the cache is closed, at the end of its `with` block.

    Args:
        store: that made it.
        prompt: int32 [rows, tokens].
        prefix: K and V of each layer, [rows, num_kv_heads, n, head_dim], of the first n tokens of
            the prompt; no layers if n is 0.
        hit_tokens_by_tier: where they were found.

    Attributes:
        store: as given.
        hit_tokens: tokens of the prompt that were found, of all rows.
        hit_tokens_by_tier: `hit_tokens` by where they were found; tiers without any are left out.
    """

    def __init__(
        self,
        store: PrefixStore,
        prompt: Tensor,
        prefix: Sequence[Layer],
        hit_tokens_by_tier: Mapping[str, int],
    ) -> None:
        super().__init__(config=store.config)
        for number, (keys, values) in enumerate(prefix):
            super().update(keys, values, number)
        self.store = store
        self.hit_tokens = sum(hit_tokens_by_tier.values())
        self.hit_tokens_by_tier = MappingProxyType(dict(hit_tokens_by_tier))
        self._prompt = prompt
        self._tokens = [prompt[:, : self.get_seq_length()]]
        self._num_tokens = self.get_seq_length()
        self._is_open = True

    def expect(self, arguments: Mapping[str, Any], *, training: bool) -> None:
        """Take note of the tokens of a forward pass that is about to begin.

        Raises:
            ValueError: K and V that it computes, or those that the cache has, are not those of the
                sequence that the tokens spell.
        """
        if not self._is_open:
            raise ValueError(
                "This PrefixCache is closed; make one with PrefixStore.cache for every generate."
            )
        if training:
            raise ValueError("The model is in training mode; call its eval() first.")
        for name, value in arguments.items():
            if value is not None and name not in _UNDERSTOOD:
                raise ValueError(
                    f"The model was called with {name}, and a PrefixCache knows K and V by their "
                    "tokens alone; leave that out, or use another cache."
                )
        tokens = arguments.get("input_ids")
        if tokens is None:
            raise ValueError("The model was called without input_ids; a PrefixCache needs them.")
        self._require_prompt(tokens)
        self._require_all_seen(arguments, tokens.shape[1])
        self._tokens.append(tokens.clone())
        self._num_tokens += tokens.shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append K and V of a layer, as in every cache of transformers.

        Raises:
            ValueError: they come from another model than that of the store, or in another type.
        """
        length = self.get_seq_length(layer_idx) + key_states.shape[-2]
        if length != self._num_tokens:
            raise ValueError(
                f"Layer {layer_idx} got K and V up to token {length}, but the model of the "
                f"PrefixStore was called for {self._num_tokens}; expected that model itself to "
                "compute them, while its store is open."
            )
        if {key_states.dtype, value_states.dtype} != {self.store.dtype}:
            raise ValueError(
                f"Layer {layer_idx} got K in {key_states.dtype} and V in {value_states.dtype}; "
                f"expected {self.store.dtype}, as when the PrefixStore was made. Is autocast on?"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def close(self) -> None:
        """Hand what was computed to the store, and forget it.

        Raises:
            ValueError: the store is closed.
        """
        if self._is_open:
            self._is_open = False
            # Layers differ in length if a forward pass was interrupted.
            length = min(self.get_seq_length(number) for number in range(len(self.layers)))
            tokens = torch.cat([part.to("cpu", torch.int32) for part in self._tokens], dim=1)
            layers = layers_of(self)
            self.layers = []
            if length:
                self.store.keep(
                    tokens[:, :length],
                    [(keys[:, :, :length], values[:, :, :length]) for keys, values in layers],
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rearrange(self, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError(
            "A PrefixCache cannot be cropped, reset or rearranged: generate without beams and "
            "without an assistant."
        )

    crop = reset = reorder_cache = _rearrange
    batch_repeat_interleave = batch_select_indices = _rearrange

    def _require_prompt(self, tokens: Tensor) -> None:
        """Refuse tokens that do not go on with the prompt, or with what was sampled after it."""
        rows, length = self._prompt.shape
        if len(tokens) != rows:
            raise ValueError(
                f"The model was called for {len(tokens)} rows, and the PrefixCache was made for "
                f"{rows}; make it for the same rows."
            )
        start = self._num_tokens
        stop = start + tokens.shape[1]
        if start >= length:
            expected = stop == start + 1
        else:
            expected = stop <= length and torch.equal(
                tokens.to("cpu", torch.int32), self._prompt[:, start:stop]
            )
        if not expected:
            raise ValueError(
                f"The model was called for tokens {start} to {stop - 1}. They are not those of the "
                f"prompt of {length} tokens that the PrefixCache was made for, nor one token that "
                "was sampled after it; make a PrefixCache for every generate, with its input_ids."
            )

    def _require_all_seen(self, arguments: Mapping[str, Any], num_new: int) -> None:
        """Refuse padding, masks other than the causal one, and positions other than in order."""
        stop = self._num_tokens + num_new
        mask = arguments.get("attention_mask")
        if mask is not None and not (
            isinstance(mask, Tensor)
            and mask.shape == (len(self._prompt), stop)
            and bool(mask.all())
        ):
            raise ValueError(
                "attention_mask hides tokens, or has another shape than [rows, all tokens]; a "
                "PrefixCache cannot have padding: generate rows of different lengths one by one."
            )
        positions = arguments.get("position_ids")
        if positions is not None:
            in_order = torch.arange(self._num_tokens, stop, device=positions.device)
            if positions.shape[-1] != num_new or not bool((positions == in_order).all()):
                raise ValueError(
                    f"position_ids are not {self._num_tokens} to {stop - 1} in every row; a "
                    "PrefixCache needs tokens in order, without gaps."
                )

"""What K and V of a model look like, and whether prefixes of them can be kept at all."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nf_kvcache.copier import Layer
from nf_kvcache.fingerprint import Fingerprint
from nf_kvcache.layout import KVLayout
from nf_kvcache.weights_digest import weights_digest

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def require_supported(model: PreTrainedModel) -> None:
    """Refuse what is no decoder with full attention and positions that stay as they are.

    Raises:
        TypeError: `model` is not a PreTrainedModel.
        ValueError: names what of the model is in the way.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a PreTrainedModel, such as the one "
            "inside an adapter."
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder; expected a decoder alone.")
    others = {type(layer) for layer in DynamicCache(config=model.config).layers} - {DynamicLayer}
    if others:
        names = ", ".join(sorted(other.__name__ for other in others))
        raise ValueError(
            f"{name} has layers that keep a {names}; expected full attention in all layers: of "
            "other states no prefix can be cut off."
        )
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for group in (rope, *rope.values()):
        if isinstance(group, dict) and group.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                f"{name} has rope_type {group['rope_type']!r}, with which K of a token depends on "
                "how long its sequence becomes; expected one that depends on positions alone."
            )


def probe(model: PreTrainedModel, page_size: int) -> tuple[KVLayout, list[torch.device]]:
    """Compute two tokens, twice.

    Returns:
        The shape of a page, and the device of each layer.

    Raises:
        ValueError: the layers, or K and V, differ in shape or type; or the second token has a say
            in K or V of the first.
    """
    name = type(model).__name__
    layers = _compute(model, [0, 1])
    forms = {(part.shape[1], part.shape[3], part.dtype) for layer in layers for part in layer}
    if len(forms) != 1:
        raise ValueError(
            f"{name} has K and V of these forms (heads, head_dim, dtype): "
            f"{', '.join(map(str, sorted(forms, key=str))) or 'none'}; expected one for all layers."
        )
    ((num_kv_heads, head_dim, dtype),) = forms
    # Kernels may round differently for other tokens; attention to them makes a larger difference.
    tolerance = max(1e-3, 8 * torch.finfo(dtype).eps)
    for layer, other in zip(layers, _compute(model, [0, 2]), strict=True):
        for part, expected in zip(layer, other, strict=True):
            first, same = part[:, :, 0].float(), expected[:, :, 0].float()
            if (first - same).abs().max() > tolerance * first.abs().max():
                raise ValueError(
                    f"{name} computes K and V of a token from tokens after it; expected causal "
                    "attention."
                )
    layout = KVLayout(len(layers), num_kv_heads, head_dim, dtype, page_size)
    return layout, [keys.device for keys, _ in layers]


def layers_of(cache: DynamicCache) -> list[Layer]:
    """K and V of the layers that have some, each [rows, num_kv_heads, tokens, head_dim]."""
    return [
        (layer.keys, layer.values)
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
    ]


@torch.no_grad()
def _compute(model: PreTrainedModel, token_ids: list[int]) -> list[Layer]:
    """K and V of some tokens."""
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([token_ids], device=model.device)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return layers_of(cache)


def fingerprint(model: PreTrainedModel, layout: KVLayout) -> Fingerprint:
    """Of the weights and the whole configuration: K and V depend on many of its entries."""
    config = model.config.to_dict()
    for incidental in ("_name_or_path", "transformers_version"):
        config.pop(incidental, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return Fingerprint(
        weights=weights_digest(model.state_dict().items()),
        dtype=str(layout.dtype).removeprefix("torch."),
        page_size=layout.page_size,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        rope=f"config {hashlib.sha256(text.encode()).hexdigest()}",
    )

"""Rotary position embedding: the table of cosines and sines, with context extension."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nf_runtime.model_config import ModelConfig


def cos_sin_table(config: ModelConfig, num_positions: int) -> Tensor:
    """Cosines, then sines, of every position.

    Returns:
        float32 [num_positions, head_dim], scaled by the attention factor where the kind has one.
    """
    frequencies, factor = _frequencies(config)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1) * factor


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [head_dim / 2], and the attention factor."""
    rope, dim = config.rope, config.head_dim
    plain = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.kind == "linear":
        return plain / float(rope.parameters["factor"]), 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope.parameters, config), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, rope.parameters, config)
    return plain, 1.0


def _llama3(plain: Tensor, p: Mapping[str, Any], config: ModelConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    factor, low, high = (float(p[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = p.get("original_max_position_embeddings", config.max_position)
    wavelength = 2 * math.pi / plain
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    stretched: Tensor = plain / factor * (1 - blend) + plain * blend
    return stretched


def _yarn(plain: Tensor, p: Mapping[str, Any], config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, scale attention."""
    dim, theta = config.head_dim, config.rope.theta
    original = p.get("original_max_position_embeddings") or config.max_position
    factor = p.get("factor") or config.max_position / original

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if config.rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2).float() - low) / max(high - low, 0.001)
    keep = 1.0 - ramp.clamp(0.0, 1.0)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = p.get("attention_factor")
    if attention is None:
        mscale, over = p.get("mscale"), p.get("mscale_all_dim")
        attention = magnitude(mscale) / magnitude(over) if mscale and over else magnitude(1.0)
    return plain / factor * (1 - keep) + plain * keep, float(attention)

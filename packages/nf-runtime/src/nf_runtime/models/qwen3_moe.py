"""Qwen3-MoE: Qwen3 with a mixture of experts in some or all layers."""

from collections.abc import Mapping
from typing import Any

from nf_runtime.model_config import ConfigReader, ModelConfig, WindowRule
from nf_runtime.models.family import ExpertNames, Family, read_decoder_config

_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."


def _read_config(reader: ConfigReader, generation: Mapping[str, Any]) -> ModelConfig:
    return read_decoder_config(
        reader,
        generation,
        window=WindowRule(switched=True),
        qk_norm=True,
        experts_keys=("num_experts", "num_local_experts"),
        experts_per_token=8,
        expert_size_key="moe_intermediate_size",
        normalize_expert_weights=reader.flag("norm_topk_prob", False),
    )


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    read_config=_read_config,
    expert_names=ExpertNames(
        router="model.layers.{layer}.mlp.gate.weight",
        gate=_EXPERT + "gate_proj.weight",
        up=_EXPERT + "up_proj.weight",
        down=_EXPERT + "down_proj.weight",
    ),
)

"""Mixtral: Mistral with a mixture of experts in every layer."""

from functools import partial

from nf_runtime.model_config import WindowRule
from nf_runtime.models.family import ExpertNames, Family, read_decoder_config

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."

FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    read_config=partial(
        read_decoder_config,
        window=WindowRule(),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        output_bias=False,
        experts_keys=("num_local_experts",),
    ),
    expert_names=ExpertNames(
        router="model.layers.{layer}.block_sparse_moe.gate.weight",
        gate=_EXPERT + "w1.weight",
        up=_EXPERT + "w3.weight",
        down=_EXPERT + "w2.weight",
    ),
)

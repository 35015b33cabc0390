"""Qwen3: Llama with a norm on every Q and K head."""

from functools import partial

from nf_runtime.models.family import Family, read_decoder_config

FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    read_config=partial(read_decoder_config, head_dim=128, qk_norm=True),
)

"""Qwen3: Llama with a norm on every Q and K head."""

from functools import partial

from nf_runtime.model_config import WindowRule
from nf_runtime.models.family import Family, read_decoder_config

FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    read_config=partial(read_decoder_config, window=WindowRule(switched=True, full_layers=28), head_dim=128, qk_norm=True),
)

"""Mistral: Llama with a sliding window."""

from functools import partial

from nf_runtime.model_config import WindowRule
from nf_runtime.models.family import Family, read_decoder_config

FAMILY = Family(
    architectures=("MistralForCausalLM",),
    read_config=partial(
        read_decoder_config, window=WindowRule(default=4096), qkv_bias=False, output_bias=False
    ),
)

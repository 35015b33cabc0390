"""Mistral: Llama with a sliding window."""

from functools import partial

from nf_runtime.models.family import Family, read_decoder_config

FAMILY = Family(
    architectures=("MistralForCausalLM",),
    read_config=partial(
        read_decoder_config, sliding_window=4096, qkv_bias=False, output_bias=False
    ),
)

"""Llama 2, 3 and 3.1."""

from nf_runtime.models.family import Family, read_decoder_config

FAMILY = Family(architectures=("LlamaForCausalLM",), read_config=read_decoder_config)

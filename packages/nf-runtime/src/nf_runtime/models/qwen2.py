"""Qwen2 and Qwen2.5: Llama with a bias on Q, K and V."""

from functools import partial

from nf_runtime.model_config import WindowRule
from nf_runtime.models.family import Family, read_decoder_config

FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    read_config=partial(read_decoder_config, window=WindowRule(switched=True, full_layers=28), qkv_bias=True, output_bias=False),
)

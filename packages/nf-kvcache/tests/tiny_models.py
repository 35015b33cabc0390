"""Tiny models with random weights, made by transformers; also a program that generates with one."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers

from nf_kvcache.integrations.transformers import PrefixStore

_BASE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large weights, so that tokens differ from position to position and a mistake shows.
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, type[transformers.PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
PAGE_BYTES = 16 * 3 * 2 * 2 * 16 * 4
"""Of 16 tokens, 3 layers, K and V, 2 heads, 16 numbers of 4 bytes; for llama and qwen2."""


def make_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A model in float32, ready to generate; the same one for the same arguments."""
    torch.manual_seed(seed)
    config = CONFIGS[family](**(_BASE | overrides))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_prompt(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random tokens: int64 [rows, length]."""
    return torch.randint(200, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(
    model: Any, prompt: torch.Tensor, num_tokens: int = 24, **options: Any
) -> torch.Tensor:
    """Greedy: prompt and new tokens, int64 [rows, tokens]."""
    tokens: torch.Tensor = model.generate(
        prompt, max_new_tokens=num_tokens, do_sample=False, **options
    )
    return tokens


if __name__ == "__main__":
    family, directory = sys.argv[1:]
    model, prompt = make_model(family), make_prompt(50)
    with (
        PrefixStore(model, disk_directory=directory, disk_bytes=2**24) as store,
        store.cache(prompt) as cache,
    ):
        tokens = generate(model, prompt, past_key_values=cache)
    hits = dict(cache.hit_tokens_by_tier)
    print(json.dumps({"hits": hits, "tokens": tokens.tolist()}))

"""Tiny random checkpoints of every family, made by transformers."""

import logging
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.append(str(Path(__file__).parent))  # for the modules beside the tests
pytest.register_assert_rewrite("ranked_llm", "feature_cells", "feature_checks")
from feature_checks import References  # noqa: E402  (only now can it be found)

_BASE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Large weights, so that tokens differ from position to position and a mistake shows.
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama3": (transformers.LlamaConfig, {}),
    "llama3.1": (transformers.LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama-linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-biased": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 20}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2.5-yarn": (transformers.Qwen2Config, {"rope_parameters": _YARN}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, _MOE | {"norm_topk_prob": True}),
    "qwen3-moe-sparse": (
        transformers.Qwen3MoeConfig,
        _MOE | {"norm_topk_prob": False, "decoder_sparse_step": 2},
    ),
}
"""Variants of every supported family: config class, and what differs from the base."""

CheckpointMaker = Callable[..., Path]


# Not of the session: pytest would run the tests of all modules family by family, and make what each
# module shares anew every time.
@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every variant in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """Give `make(family, **overrides) -> Path`, a float32 checkpoint, made once per arguments.

    Its weights follow from the arguments, so that no test has others because of which ran before.
    """
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        key = f"{family} {sorted(overrides.items())}"
        if key not in made:
            config_class, values = FAMILIES[family]
            config = config_class(**(_BASE | values | overrides))
            torch.manual_seed(zlib.crc32(key.encode()))
            model = transformers.AutoModelForCausalLM.from_config(config).float()
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
                elif name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            made[key] = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(made[key])
        return made[key]

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return make


@pytest.fixture(scope="session")
def references(
    tiny_checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory
) -> References:
    """What the cells of the feature matrix are compared with."""
    return References(tiny_checkpoint, tmp_path_factory.mktemp("none"))

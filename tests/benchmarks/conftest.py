"""Models for the benchmarks."""

import json
import shutil
from pathlib import Path

import pytest

DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "nanoflow-demo"

# 275 million parameters: large enough that weights, not Python, decide.
LLAMA_300M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The bundled demo model."""
    return DEMO_MODEL


@pytest.fixture(scope="session")
def llama_300m_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for `load_format="dummy"`, with the demo model's tokenizer."""
    directory = tmp_path_factory.mktemp("llama-300m")
    for file in DEMO_MODEL.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, directory)
    vocab_size = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
    config = LLAMA_300M | {"vocab_size": vocab_size}
    (directory / "config.json").write_text(json.dumps(config))
    return directory

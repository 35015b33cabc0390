"""What plans and describes a model imports where torch, and any server, is missing."""

import subprocess
import sys

import pytest

import nf_runtime

HEAVY = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub")
SERVERS = ("typer", "click", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client")

BLOCK = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
for name in sys.argv[1].split(","):
    importlib.import_module(name)
"""


def import_without(modules: list[str], blocked: tuple[str, ...]) -> str:
    """What went wrong, or nothing."""
    command = [sys.executable, "-c", BLOCK, ",".join(modules), ",".join(blocked)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.stderr if result.returncode else ""


TORCH_FREE = [
    "nf_runtime",
    *(
        f"nf_runtime.{name}"
        for name in (
            "graph",
            "model_config",
            "models",
            "sampling_params",
            "config",
            "validation",
            "messages",
            "engine_types",
            "engine_process",
            "outputs",
            "seeds",
            "model_source",
            "parallelism",
            "ranks.process",
        )
    ),
]


def test_imports_without_torch() -> None:
    assert import_without(TORCH_FREE, HEAVY + SERVERS) == ""


def test_the_block_blocks() -> None:
    assert "torch is blocked" in import_without(["nf_runtime.engine"], HEAVY)


def test_the_engines_import_without_a_server() -> None:
    modules = ["nf_runtime.llm", "nf_runtime.async_engine"]
    servers = tuple(name for name in SERVERS if name not in ("typer", "click"))
    assert import_without(modules, servers) == ""


def test_a_graph_is_made_without_torch() -> None:
    program = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from nf_runtime.model_config import ConfigReader
from nf_runtime.models import decoder_graph, find_family
values = dict(architectures=["LlamaForCausalLM"], vocab_size=100, hidden_size=64,
              intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
family = find_family("LlamaForCausalLM")
graph = decoder_graph(family.read_config(ConfigReader(values, Path("config.json")), {}))
print(*(operation.category for operation in graph.layers[0]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert {"compute", "memory"} == set(result.stdout.split())


@pytest.mark.parametrize("name", nf_runtime.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(nf_runtime, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        nf_runtime.nothing_of_this_name  # noqa: B018

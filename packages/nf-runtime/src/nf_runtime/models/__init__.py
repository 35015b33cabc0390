"""Model families. To add one: a file with a `FAMILY`, and its line here."""

from pathlib import Path

from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import ConfigReader, ModelConfig, read_json
from nf_runtime.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from nf_runtime.models.decoder_graph import decoder_graph
from nf_runtime.models.family import Family
from nf_runtime.models.weight_specs import Source, WeightSpec, layer_weights, model_weights

FAMILIES: dict[str, Family] = {
    architecture: module.FAMILY
    for module in (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe)
    for architecture in module.FAMILY.architectures
}
"""Every supported family by the name in config.json's `architectures`."""


def find_family(architecture: str) -> Family:
    """The family of an architecture.

    Raises:
        ModelLoadError: It is not supported; the message lists what is.
    """
    family = FAMILIES.get(architecture)
    if family is None:
        raise ModelLoadError(
            f"architecture {architecture!r} is not supported; supported: {sorted(FAMILIES)}"
        )
    return family


def read_config(directory: Path) -> ModelConfig:
    """Read config.json, and generation_config.json where there is one.

    Raises:
        ModelLoadError: A file is missing or damaged, the architecture is not supported, or a value
            is one that its family does not have.
    """
    path = directory / "config.json"
    values = read_json(path)
    names = values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelLoadError(f"{path}: architectures is {names!r}; expected a list of one name")
    generation = directory / "generation_config.json"
    return find_family(names[0]).read_config(
        ConfigReader(values, path), read_json(generation) if generation.exists() else {}
    )


__all__ = [
    "FAMILIES",
    "Family",
    "Source",
    "WeightSpec",
    "decoder_graph",
    "find_family",
    "layer_weights",
    "model_weights",
    "read_config",
]

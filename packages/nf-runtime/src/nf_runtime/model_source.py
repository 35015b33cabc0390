"""Where a model's files are: a local directory, or a hub."""

import re
from pathlib import Path

from nf_runtime.errors import ModelLoadError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG_FILES = ["config.json", "generation_config.json"]
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def find_model(name: str, *, config_only: bool = False) -> Path:
    """Directory of a model, fetched from the hub when `name` is no local path.

    Args:
        name: A path or a hub id.
        config_only: Fetch no weights and no tokenizer.

    Raises:
        ModelLoadError: There is no such directory, and the hub does not give it either.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"model {name!r} is a file; expected a directory or a hub id")
    if not _HUB_ID.fullmatch(name):
        raise ModelLoadError(
            f"model {name!r} is no directory here; expected a directory in the Hugging Face "
            f"layout, or a hub id such as organization/name"
        )
    # Late, because most models are local and the hub client takes a while to import.
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=_CONFIG_FILES if config_only else _FILES)
        )
    except Exception as error:  # the hub client raises many kinds, all of which mean "not there"
        raise ModelLoadError(
            f"model {name!r} is no directory here, and the hub did not give it: {error}"
        ) from error

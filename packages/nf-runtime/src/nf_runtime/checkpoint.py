"""Reading a checkpoint's tensors from safetensors files."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import read_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors of a model directory, single-file or sharded.

    Every file's header is checked against its size at once, so that a damaged one is found before
    anything is loaded.

    Attributes:
        files: File of each tensor, by the tensor's name.

    Raises:
        ModelLoadError: No safetensors files, a missing shard, or a damaged file, which is named.
    """

    def __init__(self, directory: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in _shards(directory):
            try:
                with safe_open(path, framework="pt") as file:
                    self.files.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{path} is truncated or corrupt ({error}); fetch the file again"
                ) from error

    def copy(self, targets: Mapping[str, Tensor]) -> None:
        """Copy tensors into place, converting their dtype.

        The files are mapped for the time of the call only: what has been read can leave memory
        again, and a whole model is loaded with little more than its own size.

        Raises:
            ModelLoadError: A tensor is missing or has another shape; the file is named.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in targets:
            if name not in self.files:
                raise ModelLoadError(
                    f"the checkpoint in {next(iter(self.files.values())).parent} has no tensor "
                    f"{name!r}; it is incomplete, or config.json does not belong to it"
                )
            by_file[self.files[name]].append(name)
        for path, names in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in names:
                        _copy_tensor(path, name, file.get_tensor(name), targets[name])
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path} cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        with safe_open(self.files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())


def _copy_tensor(path: Path, name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise ModelLoadError(
            f"{path}: tensor {name!r} is {list(source.shape)}; config.json makes it "
            f"{list(target.shape)}"
        )
    target.copy_(source)


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        shards = {directory / file for file in read_json(index).get("weight_map", {}).values()}
        missing = sorted(path for path in shards if not path.exists())
        if missing or not shards:
            raise ModelLoadError(
                f"{index} names shards that are not there: "
                f"{', '.join(p.name for p in missing) or 'it has no weight_map'}"
            )
        return sorted(shards)
    if single.exists():
        return [single]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{directory} has {pickles[0]} but no safetensors files; a pickle checkpoint can run "
            f"code when it is read, so it is refused: convert it to safetensors"
        )
    raise ModelLoadError(f"{directory} has no model.safetensors; expected a safetensors checkpoint")

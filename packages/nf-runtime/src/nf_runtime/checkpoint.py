"""Reading a checkpoint's tensors from safetensors files."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import read_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# What is read of a mapped file occupies memory until the file is unmapped.
_MAPPED_BYTES = 16 << 20


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
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _shards(directory):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                        self.files[name] = path
                        self._shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(
                    f"{path} is truncated or corrupt ({error}); fetch the file again"
                ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ModelLoadError: There is no such tensor.
        """
        if name not in self._shapes:
            raise ModelLoadError(
                f"the checkpoint in {next(iter(self.files.values())).parent} has no tensor "
                f"{name!r}; it is incomplete, or config.json does not belong to it"
            )
        return self._shapes[name]

    def copy(self, targets: Mapping[str, Tensor]) -> None:
        """Copy tensors into place, converting their dtype.

        The files are mapped for some rows at a time: what has been read leaves memory again, and a
        model is loaded with little more than its own size, however large its tensors are.

        Raises:
            ModelLoadError: A tensor is missing or has another shape; the file is named.
        """
        by_file: dict[Path, dict[str, Tensor]] = defaultdict(dict)
        for name, target in targets.items():
            if self.shape(name) != target.shape:
                raise ModelLoadError(
                    f"{self.files[name]}: tensor {name!r} is {list(self.shape(name))}; config.json "
                    f"makes it {list(target.shape)}"
                )
            by_file[self.files[name]][name] = target
        for path, tensors in by_file.items():
            try:
                for pieces in _mappings(tensors):
                    with safe_open(path, framework="pt") as file:
                        for name, rows in pieces:
                            tensors[name][rows].copy_(file.get_slice(name)[rows])
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _mappings(tensors: Mapping[str, Tensor]) -> Iterator[list[tuple[str, slice]]]:
    """Cut tensors into runs of rows, and group them by what is read in one mapping of the file."""
    pieces: list[tuple[str, slice]] = []
    room = _MAPPED_BYTES
    for name, tensor in tensors.items():
        row_bytes = tensor[0].nbytes
        start = 0
        while start < len(tensor):
            end = min(len(tensor), start + max(1, room // row_bytes))
            pieces.append((name, slice(start, end)))
            room -= (end - start) * row_bytes
            start = end
            if room < row_bytes:
                yield pieces
                pieces, room = [], _MAPPED_BYTES
    if pieces:
        yield pieces


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        shards = {directory / str(file) for file in files}
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

"""Reading a checkpoint's tensors from safetensors files."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import read_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# What is read of a mapped file occupies memory until the file is unmapped.
_MAPPED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a checkpoint's tensor, and where it goes.

    Attributes:
        name: Of the tensor.
        shape: Of the whole tensor, as config.json says.
        target: Where the part goes; its shape is that of the part.
        first_row: Of the tensor, that the part begins with.
        columns: Of the tensor, those of the part; None takes all.
    """

    name: str
    shape: tuple[int, ...]
    target: Tensor
    first_row: int = 0
    columns: slice | None = None


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

    def copy(self, pieces: Iterable[Piece]) -> None:
        """Copy tensors, or parts of them, into place, converting their dtype.

        Only the parts are read. The files are mapped for some rows at a time: what has been read
        leaves memory again, and a model is loaded with little more than its own size, however large
        its tensors are.

        Raises:
            ModelLoadError: A tensor is missing or has another shape; the file is named.
        """
        by_file: dict[Path, list[Piece]] = defaultdict(list)
        for piece in pieces:
            shape = self.shape(piece.name)
            if shape != piece.shape:
                raise ModelLoadError(
                    f"{self.files[piece.name]}: tensor {piece.name!r} is {list(shape)}; "
                    f"config.json makes it {list(piece.shape)}"
                )
            by_file[self.files[piece.name]].append(piece)
        for path, in_file in by_file.items():
            try:
                for runs in _mappings(in_file):
                    with safe_open(path, framework="pt") as file:
                        for piece, start, end in runs:
                            rows = slice(piece.first_row + start, piece.first_row + end)
                            tensor = file.get_slice(piece.name)
                            columns = piece.columns
                            read = tensor[rows] if columns is None else tensor[rows, columns]
                            piece.target[start:end].copy_(read)
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _mappings(pieces: Iterable[Piece]) -> Iterator[list[tuple[Piece, int, int]]]:
    """Cut pieces into runs of rows, and group them by what is read in one mapping of the file.

    A run is its piece, and the first row and the end of its rows in that.
    """
    runs: list[tuple[Piece, int, int]] = []
    room = _MAPPED_BYTES
    for piece in pieces:
        row_bytes = prod(piece.shape[1:]) * piece.target.itemsize  # as the file maps whole rows
        start, length = 0, len(piece.target)
        while start < length:
            end = min(length, start + max(1, room // row_bytes))
            runs.append((piece, start, end))
            room -= (end - start) * row_bytes
            start = end
            if room < row_bytes:
                yield runs
                runs, room = [], _MAPPED_BYTES
    if runs:
        yield runs


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

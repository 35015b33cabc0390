"""The tiles of the matrix product, and which of them suits a problem. Imports without torch."""

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tiles.toml")

_PINGPONG, _COOPERATIVE, _STREAM_K = SCHEDULES = ("pingpong", "cooperative", "stream_k")

# Of an H200 at 1.83 GHz, by its data sheet and the size of its units; per clock cycle.
_FLOPS = 4096  # of an SM, dense, 16-bit: 989.4 TFLOP/s over 132 SMs
_BYTES = 64  # of an SM, from the L2 cache
_MEMORY_BYTES = 2600  # of the device, from its memory: 4.8 TB/s
_LATENCY = 1500  # cycles until the first product, and from the last one until the result is written


@dataclass(frozen=True, slots=True)
class Tile:
    """What one SM computes at a time; see the comments of tiles.toml.

    Attributes:
        rows: Of x and out.
        columns: Of out, rows of weight.
        depth: Of k, in one step.
        cluster: SMs along rows and along columns that share what they load.
        schedule: One of `SCHEDULES`.
        swapped: Whether the transpose is computed.
    """

    rows: int
    columns: int
    depth: int
    cluster: tuple[int, int]
    schedule: str
    swapped: bool

    @property
    def name(self) -> str:
        """Such as `128x256x64_2x1_cooperative`."""
        along_rows, along_columns = self.cluster
        sizes = f"{self.rows}x{self.columns}x{self.depth}_{along_rows}x{along_columns}"
        return f"{sizes}_{self.schedule}"

    def __str__(self) -> str:
        return self.name

    @property
    def cluster_size(self) -> int:
        """SMs of a cluster, the fewest that the tile runs on."""
        return self.cluster[0] * self.cluster[1]


@functools.cache
def all_tiles() -> tuple[Tile, ...]:
    """The table, in its order."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return tuple(Tile(**(row | {"cluster": tuple(row["cluster"])})) for row in table["tile"])


def find_tile(name: str, tiles: Sequence[Tile]) -> Tile:
    """The tile of a name.

    Raises:
        ValueError: None of `tiles` has it.
    """
    for tile in tiles:
        if tile.name == name:
            return tile
    known = ", ".join(tile.name for tile in tiles)
    raise ValueError(f"tile is {name!r}; expected one of {known}")


def estimate_cycles(tile: Tile, *, m: int, n: int, k: int, sm_count: int) -> float:
    """Clock cycles of a product of x [m, k] and weight [n, k] in this tile on `sm_count` SMs.

    An estimate that ranks tiles, made of what they differ in; it has not been compared with
    measurements yet.

    - One step multiplies rows·columns·depth and loads (rows + columns)·depth elements of two bytes,
      less what the cluster shares. It takes the longer of both, and a quarter of the shorter.
    - Tiles go to the SMs in rounds; the last one may leave some idle. stream_k shares the steps
      evenly instead, and where that cuts tiles, each SM writes and reads about two in float32.
    - All steps together take no less than the reading of x and weight and the writing of out.
    - Every round ends with the writing of the result, which pingpong hides but for the last one.

    Raises:
        ValueError: A size is less than 1, or there are fewer SMs than the tile's cluster has.
    """
    for name, size in (("m", m), ("n", n), ("k", k)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more")
    groups = sm_count // tile.cluster_size
    if groups < 1:
        raise ValueError(
            f"sm_count is {sm_count}; expected {tile.cluster_size} or more, the cluster of {tile}"
        )
    along_rows, along_columns = tile.cluster
    multiplying = 2 * tile.rows * tile.columns * tile.depth / _FLOPS
    loaded = tile.rows / along_columns + tile.columns / along_rows
    loading = 2 * loaded * tile.depth / _BYTES
    step = max(multiplying, loading) + min(multiplying, loading) / 4

    steps = -(-k // tile.depth)
    clusters = -(-m // (tile.rows * along_rows)) * -(-n // (tile.columns * along_columns))
    rounds = -(-clusters // groups)
    writing = _LATENCY + 2 * tile.rows * tile.columns / _BYTES
    memory = 2 * (m * k + n * k + m * n) / _MEMORY_BYTES
    if tile.schedule == _STREAM_K:
        partial_sums = 2 * 2 * 4 * tile.rows * tile.columns / _BYTES + _LATENCY
        cut = clusters % groups != 0
        work = -(-clusters * steps // groups) * step
        return max(work, memory) + rounds * writing + (partial_sums if cut else 0.0)
    work = rounds * steps * step
    return max(work, memory) + (1 if tile.schedule == _PINGPONG else rounds) * writing


def best_tile(tiles: Sequence[Tile], *, m: int, n: int, k: int, sm_count: int) -> Tile:
    """The tile with the least `estimate_cycles`; of equals the first.

    Raises:
        ValueError: As `estimate_cycles`, or no tile runs on so few SMs.
    """
    usable = [tile for tile in tiles if tile.cluster_size <= sm_count]
    if not usable:
        raise ValueError(f"sm_count is {sm_count}; expected enough for one of {len(tiles)} tiles")
    return min(usable, key=lambda tile: estimate_cycles(tile, m=m, n=n, k=k, sm_count=sm_count))

"""The weights of a model, in the shapes that its operations take."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from nf_kernels.ops import OperationSet
from nf_kvcache.weights_digest import weights_digest
from nf_runtime.checkpoint import Checkpoint, Piece
from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.model_config import ModelConfig
from nf_runtime.models import Family, Source, WeightSpec, layer_weights, model_weights
from nf_runtime.parallelism import WHOLE, Shard

_log = logging.getLogger(__name__)

# Tables that old checkpoints carry and that follow from the config.
_DERIVED_SUFFIX = "rotary_emb.inv_freq"

Specs = tuple[WeightSpec, ...]

# Parameters of operations that take a weight as the operation set has packed it.
_PACKED = {"linear": ("weight",), "moe_experts": ("gate_up", "down")}


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Weights by the names that operations use.

    Attributes:
        model: Those outside the layers.
        layers: Those of each layer.
    """

    model: dict[str, Tensor]
    layers: list[dict[str, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for group in (self.model, *self.layers) for t in group.values())

    def digest(self) -> str:
        """What tells these weights from others; of packed ones it is another."""
        groups = [("model", self.model), *((str(i), group) for i, group in enumerate(self.layers))]
        return weights_digest(
            (f"{prefix}.{name}", group[name]) for prefix, group in groups for name in sorted(group)
        )


def load_weights(
    config: ModelConfig,
    family: Family,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
    check: Callable[[], None] = lambda: None,
) -> ModelWeights:
    """Read the weights of a rank from a checkpoint, with a progress bar on a terminal.

    The first rank speaks for all: the others have no bar, and do not warn of what nobody uses. What
    `check` raises, which is called before each layer, ends the loading.

    Raises:
        ModelLoadError: A tensor is missing or has another shape than config.json says.
    """
    used: set[str] = set()

    def load(specs: Specs, whole: Specs) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        pieces: list[Piece] = []
        for spec in specs:
            loaded[spec.name] = torch.empty(spec.shape, dtype=dtype, device=device)
            pieces += _pieces(spec, loaded[spec.name])
        checkpoint.copy(pieces)
        used.update(source.name for spec in whole for source in spec.sources)
        return loaded

    weights = _load_groups(config, family, shard, load, check)
    unused = sorted(n for n in checkpoint.files if n not in used and _is_expected(n, config))
    if unused and shard.rank == 0:
        _log.warning(
            "the checkpoint has %d tensors that the model does not use: %s",
            len(unused),
            ", ".join(unused[:5]) + (", …" if len(unused) > 5 else ""),
        )
    return weights


def make_weights(
    config: ModelConfig,
    family: Family,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    shard: Shard = WHOLE,
    check: Callable[[], None] = lambda: None,
) -> ModelWeights:
    """Random weights (normal, standard deviation 0.02; norms are one), the same for one seed.

    Every rank makes all of them, a layer at a time, and keeps its part. `check` is that of
    `load_weights`.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def make(specs: Specs, whole: Specs) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        sources: dict[str, Tensor] = {}
        for spec in whole:
            tensor = torch.empty(spec.shape, dtype=dtype, device=device)
            is_norm = spec.name.endswith("norm")
            made[spec.name] = (
                tensor.fill_(1.0) if is_norm else tensor.normal_(0.0, 0.02, generator=generator)
            )
            sources |= {source.name: part for source, part in _split(spec, tensor)}
        if shard.size == 1:
            return made
        kept = {}
        for spec in specs:
            kept[spec.name] = torch.empty(spec.shape, dtype=dtype, device=device)
            for source, part in _split(spec, kept[spec.name]):
                rows = sources[source.name][source.rows.start : source.rows.stop]
                columns = _columns(source)
                part.copy_(rows if columns is None else rows[:, columns])
        return kept

    return _load_groups(config, family, shard, make, check)


def pack_weights(weights: ModelWeights, graph: LayerGraph, operations: OperationSet) -> None:
    """Arrange the weights of matrix products as an operation set reads them, in place."""
    _pack_group(weights.model, (*graph.prologue, *graph.epilogue), operations)
    for group, layer in zip(weights.layers, graph.layers, strict=True):
        _pack_group(group, layer, operations)


def _pack_group(
    group: dict[str, Tensor], users: tuple[Operation, ...], operations: OperationSet
) -> None:
    names = {user.weights[parameter] for user in users for parameter in _PACKED.get(user.kind, ())}
    for name in sorted(names):
        group[name] = operations.pack(group[name])


def _load_groups(
    config: ModelConfig,
    family: Family,
    shard: Shard,
    load: Callable[[Specs, Specs], dict[str, Tensor]],
    check: Callable[[], None],
) -> ModelWeights:
    """All groups of weights, by a function of what this rank has of one, and of the whole."""
    model = load(model_weights(config, shard), model_weights(config))
    numbers = tqdm(
        range(config.num_layers),
        desc="loading weights",
        unit="layer",
        disable=True if shard.rank else None,
    )
    layers = []
    for layer in numbers:
        check()
        whole = layer_weights(config, family, layer)
        layers.append(load(layer_weights(config, family, layer, shard), whole))
    return ModelWeights(model=model, layers=layers)


def _pieces(spec: WeightSpec, target: Tensor) -> Iterator[Piece]:
    """What has to be read to fill a weight."""
    for source, part in _split(spec, target):
        yield Piece(source.name, source.shape, part, source.rows.start, _columns(source))


def _columns(source: Source) -> slice | None:
    """The columns that are taken of a checkpoint tensor; None for all."""
    columns = source.columns
    if columns is None or len(columns) == source.shape[-1]:
        return None
    return slice(columns.start, columns.stop)


def _split(spec: WeightSpec, target: Tensor) -> Iterator[tuple[Source, Tensor]]:
    """The parts of a weight that its sources fill, along the rows; the rest becomes zero."""
    rows = target.flatten(0, 1) if target.dim() == 3 else target
    start = 0
    for source in spec.sources:
        end = start + len(source.rows)
        yield source, rows[start:end]
        start = end
    rows[start:].zero_()


def _is_expected(name: str, config: ModelConfig) -> bool:
    """Whether an unused tensor deserves a warning."""
    if name.endswith(_DERIVED_SUFFIX):
        return False
    return not (config.tied_embeddings and name == "lm_head.weight")

"""The weights of a model, in the shapes that its operations take."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from nf_kernels.ops import OperationSet
from nf_kvcache.weights_digest import weights_digest
from nf_runtime.checkpoint import Checkpoint
from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.model_config import ModelConfig
from nf_runtime.models import Family, WeightSpec, layer_weights, model_weights

_log = logging.getLogger(__name__)

# Tables that old checkpoints carry and that follow from the config.
_DERIVED_SUFFIX = "rotary_emb.inv_freq"

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
) -> ModelWeights:
    """Read the weights from a checkpoint, with a progress bar on a terminal.

    Raises:
        ModelLoadError: A tensor is missing or has another shape than config.json says.
    """
    used: set[str] = set()

    def load(specs: tuple[WeightSpec, ...]) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        for spec in specs:
            loaded[spec.name] = torch.empty(spec.shape, dtype=dtype, device=device)
            targets.update(_split(loaded[spec.name], spec))
        checkpoint.copy(targets)
        used.update(targets)
        return loaded

    weights = _load_groups(config, family, load)
    unused = sorted(n for n in checkpoint.files if n not in used and _is_expected(n, config))
    if unused:
        _log.warning(
            "the checkpoint has %d tensors that the model does not use: %s",
            len(unused),
            ", ".join(unused[:5]) + (", …" if len(unused) > 5 else ""),
        )
    return weights


def make_weights(
    config: ModelConfig, family: Family, *, dtype: torch.dtype, device: torch.device, seed: int
) -> ModelWeights:
    """Random weights (normal, standard deviation 0.02; norms are one), the same for one seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(specs: tuple[WeightSpec, ...]) -> dict[str, Tensor]:
        made = {}
        for spec in specs:
            tensor = torch.empty(spec.shape, dtype=dtype, device=device)
            is_norm = spec.name.endswith("norm")
            made[spec.name] = (
                tensor.fill_(1.0) if is_norm else tensor.normal_(0.0, 0.02, generator=generator)
            )
        return made

    return _load_groups(config, family, make)


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
    load: Callable[[tuple[WeightSpec, ...]], dict[str, Tensor]],
) -> ModelWeights:
    model = load(model_weights(config))
    numbers = tqdm(range(config.num_layers), desc="loading weights", unit="layer", disable=None)
    layers = [load(layer_weights(config, family, layer)) for layer in numbers]
    return ModelWeights(model=model, layers=layers)


def _split(target: Tensor, spec: WeightSpec) -> dict[str, Tensor]:
    """The parts of a weight that its checkpoint tensors fill, in order, along the rows."""
    count = len(spec.sources)
    if count == 1:
        return {spec.sources[0]: target}
    rows = target.flatten(0, 1) if target.dim() == 3 else target
    sizes = spec.rows or (len(rows) // count,) * count
    return dict(zip(spec.sources, rows.split(sizes), strict=True))


def _is_expected(name: str, config: ModelConfig) -> bool:
    """Whether an unused tensor deserves a warning."""
    if name.endswith(_DERIVED_SUFFIX):
        return False
    return not (config.tied_embeddings and name == "lm_head.weight")

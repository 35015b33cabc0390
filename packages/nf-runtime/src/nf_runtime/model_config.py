"""What a Hugging Face config.json says about a model, in one form for all families. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nf_runtime.errors import ModelLoadError

# Numbers of a RoPE scaling: those that a kind cannot do without, and all others in use.
_ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
_ROPE_OPTIONAL = (
    *("factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        theta: Base of the frequencies.
        kind: `default`, `linear`, `llama3` or `yarn`.
        parameters: Further numbers of the kind, by their names in config.json; none is 0.
        truncate: Whether `yarn` rounds the dimensions between which it blends.
    """

    theta: float
    kind: str
    parameters: Mapping[str, float]
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder model. Sizes count elements.

    Attributes:
        windows: Keys a query sees, by layer; 0 means all.
        experts: Experts of a sparse layer; 0 for a dense model.
        sparse_layers: Layers whose feed-forward is a mixture of experts.
        eos_token_ids: End-of-sequence tokens of config.json and generation_config.json.
        dtype: Name of the checkpoint's dtype, such as `bfloat16`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    windows: tuple[int, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    experts: int
    experts_per_token: int
    expert_intermediate_size: int
    normalize_expert_weights: bool
    sparse_layers: frozenset[int]
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of all query, key and value heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class ConfigReader:
    """Reads typed values of one config.json and names the file in every error."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def present(self, *names: str) -> str:
        """The first of some keys that is there, or the first one."""
        return next((name for name in names if name in self.values), names[0])

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; without a default the key must be there."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLoadError(f"{self.path}: {name} is {value!r}; expected a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; without a default the key must be there."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise ModelLoadError(f"{self.path}: {name} is {value!r}; expected a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        return default if value is None else bool(value)

    def layers(self, name: str) -> frozenset[int]:
        """Numbers of layers; none when the key is not there."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(layer, int) for layer in value):
            raise ModelLoadError(
                f"{self.path}: {name} is {value!r:.200}; expected a list of layer numbers"
            )
        return frozenset(value)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelLoadError: The file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist; expected a Hugging Face model") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def read_rope(reader: ConfigReader, default_theta: float) -> RopeConfig:
    """Read RoPE in both spellings: `rope_scaling` + `rope_theta`, and `rope_parameters`."""
    parameters = reader.values.get("rope_parameters") or reader.values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelLoadError(f"{reader.path}: rope_scaling is {parameters!r}; expected an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_REQUIRED:
        raise ModelLoadError(
            f"{reader.path}: RoPE scaling {kind!r} is not supported; "
            f"supported: {', '.join(_ROPE_REQUIRED)}"
        )
    inner = ConfigReader(parameters, reader.path)
    names = _ROPE_REQUIRED[kind] + tuple(n for n in _ROPE_OPTIONAL if parameters.get(n))
    return RopeConfig(
        theta=inner.number("rope_theta", reader.number("rope_theta", default_theta)),
        kind=kind,
        parameters={name: inner.number(name) for name in names},
        truncate=inner.flag("truncate", True),
    )


@dataclass(frozen=True, slots=True)
class WindowRule:
    """How a family's config says which layers have a sliding window.

    Attributes:
        default: Window where `sliding_window` is missing; None means no window.
        switched: There is no window without `use_sliding_window`.
        full_layers: Default of `max_window_layers`, the first layers that have none.
    """

    default: int | None = None
    switched: bool = False
    full_layers: int = 0


def read_windows(reader: ConfigReader, num_layers: int, rule: WindowRule | None) -> tuple[int, ...]:
    """Sliding window of each layer, 0 for none; all 0 for a family without a rule."""
    values = reader.values
    off = rule is not None and rule.switched and not reader.flag("use_sliding_window", False)
    if rule is None or off or not values.get("sliding_window", rule.default):
        return (0,) * num_layers
    window = reader.integer("sliding_window", rule.default)
    types = values.get("layer_types")
    if types is None:
        full = rule.full_layers
        if full:
            given = values.get("max_window_layers")
            full = 0 if given == 0 else reader.integer("max_window_layers", full)
        types = ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or not all(t in known for t in types)
    ):
        raise ModelLoadError(
            f"{reader.path}: layer_types is {types!r:.200}; expected full_attention or "
            f"sliding_attention for each of {num_layers} layers"
        )
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def read_eos(
    values: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """End-of-sequence ids of both files that the model can produce, without repeats."""
    ids: list[Any] = []
    for source in (values, generation):
        eos = source.get("eos_token_id")
        ids += eos if isinstance(eos, list) else [eos]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < vocab_size))

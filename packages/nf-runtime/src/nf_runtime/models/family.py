"""What makes a model family, and the configuration that all families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import (
    ConfigReader,
    ModelConfig,
    read_eos,
    read_rope,
    WindowRule,
    read_windows,
)


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Checkpoint names of a mixture's weights, with `{layer}` and `{expert}`."""

    router: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: what tells it from the others.

    Attributes:
        architectures: Names in config.json's `architectures`.
        read_config: Makes a `ModelConfig` of config.json's and generation_config.json's values.
        expert_names: Checkpoint names of an expert's gate, up and down weights and of the router;
            None for a dense family.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[ConfigReader, Mapping[str, Any]], ModelConfig]
    expert_names: ExpertNames | None = None


def read_decoder_config(
    reader: ConfigReader,
    generation: Mapping[str, Any],
    *,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-6,
    head_dim: int | None = None,
    window: WindowRule | None = None,
    qkv_bias: bool | None = None,
    output_bias: bool | None = None,
    qk_norm: bool = False,
    tied_embeddings: bool = False,
    experts_keys: tuple[str, ...] = (),
    experts_per_token: int = 2,
    expert_size_key: str = "intermediate_size",
    normalize_expert_weights: bool = True,
) -> ModelConfig:
    """Read what all families share; the arguments are the family's own facts and defaults.

    Args:
        reader: config.json.
        generation: Values of generation_config.json.
        rope_theta: Default RoPE base.
        rms_norm_eps: Default epsilon of the norms.
        head_dim: Default head size; None means hidden_size / heads.
        window: How the config tells of sliding windows; None means that there are none.
        qkv_bias: Whether Q, K and V have a bias; None means `attention_bias` says so.
        output_bias: Whether the attention output has one; None means `attention_bias` says so.
        qk_norm: Whether Q and K heads are normalized.
        tied_embeddings: Default of `tie_word_embeddings`.
        experts_keys: Keys that may hold the number of experts; none for a dense family.
        experts_per_token: Default experts of each token.
        expert_size_key: Key that holds the width of an expert.
        normalize_expert_weights: Whether chosen experts' weights are scaled to sum to one.
    """
    values = reader.values
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelLoadError(f"{reader.path}: hidden_act is {activation!r}; supported: 'silu'")
    if values.get("quantization_config"):
        raise ModelLoadError(
            f"{reader.path}: the checkpoint is quantized; supported: bfloat16, float16, float32"
        )
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    num_layers, vocab_size = reader.integer("num_hidden_layers"), reader.integer("vocab_size")
    kv_heads = reader.integer("num_key_value_heads", heads)
    size = reader.integer("head_dim", head_dim or hidden // heads)
    if not size or size % 8 or heads % kv_heads:
        raise ModelLoadError(
            f"{reader.path}: head_dim is {size}, with {heads} heads and {kv_heads} KV heads; "
            f"expected a head_dim that is a multiple of 8 and heads that KV heads divide"
        )
    attention_bias = reader.flag("attention_bias", False)
    experts = reader.integer(reader.present(*experts_keys)) if experts_keys else 0
    experts_per_token = reader.integer("num_experts_per_tok", experts_per_token)
    if 0 < experts < experts_per_token:
        raise ModelLoadError(
            f"{reader.path}: num_experts_per_tok is {experts_per_token}; expected at most the "
            f"number of experts, which is {experts}"
        )
    dense_only = reader.layers("mlp_only_layers")
    step = reader.integer("decoder_sparse_step", 1)
    sparse = {i for i in range(num_layers) if i not in dense_only and (i + 1) % step == 0}
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    return ModelConfig(
        architecture=values["architectures"][0],
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        intermediate_size=reader.integer("intermediate_size"),
        rms_norm_eps=reader.number("rms_norm_eps", rms_norm_eps),
        rope=read_rope(reader, rope_theta),
        max_position=reader.integer("max_position_embeddings", 2048),
        windows=read_windows(reader, num_layers, window),
        qkv_bias=attention_bias if qkv_bias is None else qkv_bias,
        output_bias=attention_bias if output_bias is None else output_bias,
        mlp_bias=reader.flag("mlp_bias", False),
        qk_norm=qk_norm,
        tied_embeddings=reader.flag("tie_word_embeddings", tied_embeddings),
        experts=experts,
        experts_per_token=experts_per_token,
        expert_intermediate_size=reader.integer(expert_size_key) if experts else 0,
        normalize_expert_weights=normalize_expert_weights,
        sparse_layers=frozenset(sparse if experts else ()),
        eos_token_ids=read_eos(values, generation, vocab_size),
        dtype=str(dtype).removeprefix("torch."),
    )

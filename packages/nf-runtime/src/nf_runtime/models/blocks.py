"""The building blocks that families put together: operations, weights, and config parsing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nf_runtime.errors import ModelLoadError
from nf_runtime.graph import BatchInput, Edge, ElementType, LayerGraph, Operation, Rows
from nf_runtime.model_config import (
    ConfigReader,
    ModelConfig,
    read_eos,
    read_rope,
    read_windows,
)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of a layer (or of the model) and the checkpoint tensors it is made of.

    Attributes:
        name: As operations call it.
        shape: Of the whole weight.
        sources: Checkpoint names, put one after the other along the rows; `{layer}` is the number
            of the layer.
        rows: Rows of each source; equal parts when empty.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: how its config reads, and the graph and weights that follow from it.

    Attributes:
        architectures: Names in config.json's `architectures`.
        read_config: Makes a `ModelConfig` of config.json's and generation_config.json's values.
        expert_names: Checkpoint names of an expert's gate, up and down weights and of the router;
            None for a dense family.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[ConfigReader, Mapping[str, Any]], ModelConfig]
    expert_names: "ExpertNames | None" = None


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Checkpoint names of a mixture's weights, with `{layer}` and `{expert}`."""

    router: str
    gate: str
    up: str
    down: str


def read_decoder_config(
    reader: ConfigReader,
    generation: Mapping[str, Any],
    *,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-6,
    head_dim: int | None = None,
    sliding_window: int | None = None,
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
        sliding_window: Default window; None means no window.
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
        windows=read_windows(reader, num_layers, default=sliding_window),
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


def decoder_graph(config: ModelConfig) -> LayerGraph:
    """The graph of a decoder with pre-normalization: attention, then a feed-forward."""
    edges = [
        Edge("hidden", config.hidden_size),
        Edge("normed", config.hidden_size),
        Edge("qkv", config.qkv_size),
        Edge("query", config.q_size),
        Edge("attended", config.q_size),
        Edge("gate_up", 2 * config.intermediate_size),
        Edge("activated", config.intermediate_size),
        Edge("selected", config.hidden_size),
        Edge("selected_normed", config.hidden_size),
        Edge("logits", config.vocab_size),
    ]
    if config.sparse_layers:
        edges += [
            Edge("router_logits", config.experts),
            Edge("expert_ids", config.experts_per_token, ElementType.INT64),
            Edge("expert_weights", config.experts_per_token, ElementType.FLOAT32),
        ]
    return LayerGraph(
        edges={edge.name: edge for edge in edges},
        prologue=(
            Operation(
                "embedding",
                "embedding",
                inputs={"token_ids": BatchInput.TOKEN_IDS},
                weights={"table": "embedding"},
                writes={"out": "hidden"},
            ),
        ),
        layers=tuple(
            (
                *_attention(config, config.windows[i]),
                *(_mixture(config) if i in config.sparse_layers else _feed_forward(config)),
            )
            for i in range(config.num_layers)
        ),
        epilogue=(
            Operation(
                "select_rows",
                "gather_rows",
                reads={"x": "hidden"},
                inputs={"index": BatchInput.SELECTED_ROWS},
                writes={"out": "selected"},
                rows=Rows.SELECTED,
                reads_all_rows=frozenset({"hidden"}),
            ),
            _norm("final_norm", "selected", "selected_normed", config, Rows.SELECTED),
            Operation(
                "logits",
                "linear",
                reads={"x": "selected_normed"},
                weights={"weight": "embedding" if config.tied_embeddings else "head"},
                writes={"out": "logits"},
                rows=Rows.SELECTED,
            ),
        ),
    )


def _norm(
    name: str, source: str, target: str, config: ModelConfig, rows: Rows = Rows.ALL
) -> Operation:
    return Operation(
        name,
        "rms_norm",
        reads={"x": source},
        weights={"weight": name},
        constants={"eps": config.rms_norm_eps},
        writes={"out": target},
        rows=rows,
    )


def _attention(config: ModelConfig, window: int) -> tuple[Operation, ...]:
    caches = {"k_cache": BatchInput.K_CACHE, "v_cache": BatchInput.V_CACHE}
    shared: dict[str, Any] = {
        "reads": {"q": "query"},
        "writes": {"out": "attended"},
        "constants": {"scale": config.head_dim**-0.5, "window": window},
    }
    norms = {"q_norm": "q_norm", "k_norm": "k_norm"} if config.qk_norm else {}
    return (
        _norm("input_norm", "hidden", "normed", config),
        Operation(
            "qkv_proj",
            "linear",
            reads={"x": "normed"},
            weights={"weight": "qkv"} | ({"bias": "qkv_bias"} if config.qkv_bias else {}),
            writes={"out": "qkv"},
        ),
        Operation(
            "rope_append",
            "rope_append",
            reads={"qkv": "qkv"},
            weights=norms,
            inputs={
                "positions": BatchInput.POSITIONS,
                "slots": BatchInput.SLOTS,
                "cos_sin": BatchInput.COS_SIN,
                **caches,
            },
            constants={"eps": config.rms_norm_eps},
            writes={"out": "query"},
        ),
        Operation(
            "decode_attention",
            "decode_attention",
            inputs={
                **caches,
                "page_table": BatchInput.DECODE_PAGE_TABLE,
                "seq_lens": BatchInput.DECODE_SEQ_LENS,
            },
            rows=Rows.DECODE,
            **shared,
        ),
        Operation(
            "prefill_attention",
            "prefill_attention",
            inputs={
                **caches,
                "page_table": BatchInput.PREFILL_PAGE_TABLE,
                "query_start": BatchInput.PREFILL_QUERY_START,
                "seq_lens": BatchInput.PREFILL_SEQ_LENS,
            },
            rows=Rows.PREFILL,
            **shared,
        ),
        _residual_linear("output_proj", "attended", "output", config.output_bias),
    )


def _residual_linear(name: str, source: str, weight: str, has_bias: bool) -> Operation:
    return Operation(
        name,
        "linear",
        reads={"x": source, "residual": "hidden"},
        weights={"weight": weight} | ({"bias": f"{weight}_bias"} if has_bias else {}),
        writes={"out": "hidden"},
    )


def _feed_forward(config: ModelConfig) -> tuple[Operation, ...]:
    return (
        _norm("post_attention_norm", "hidden", "normed", config),
        Operation(
            "gate_up_proj",
            "linear",
            reads={"x": "normed"},
            weights={"weight": "gate_up"} | ({"bias": "gate_up_bias"} if config.mlp_bias else {}),
            writes={"out": "gate_up"},
        ),
        Operation("swiglu", "swiglu", reads={"gate_up": "gate_up"}, writes={"out": "activated"}),
        _residual_linear("down_proj", "activated", "down", config.mlp_bias),
    )


def _mixture(config: ModelConfig) -> tuple[Operation, ...]:
    return (
        _norm("post_attention_norm", "hidden", "normed", config),
        Operation(
            "router",
            "linear",
            reads={"x": "normed"},
            weights={"weight": "router"},
            writes={"out": "router_logits"},
        ),
        Operation(
            "moe_route",
            "moe_route",
            reads={"router_logits": "router_logits"},
            constants={"normalize": config.normalize_expert_weights},
            writes={"expert_ids": "expert_ids", "expert_weights": "expert_weights"},
        ),
        Operation(
            "moe_experts",
            "moe_experts",
            reads={
                "x": "normed",
                "expert_ids": "expert_ids",
                "expert_weights": "expert_weights",
                "residual": "hidden",
            },
            weights={"gate_up": "experts_gate_up", "down": "experts_down"},
            writes={"out": "hidden"},
        ),
    )


def model_weights(config: ModelConfig) -> tuple[WeightSpec, ...]:
    """Weights outside the layers."""
    table = (config.vocab_size, config.hidden_size)
    specs = [
        WeightSpec("embedding", table, ("model.embed_tokens.weight",)),
        WeightSpec("final_norm", (config.hidden_size,), ("model.norm.weight",)),
    ]
    if not config.tied_embeddings:
        specs.append(WeightSpec("head", table, ("lm_head.weight",)))
    return tuple(specs)


def layer_weights(config: ModelConfig, family: Family, layer: int) -> tuple[WeightSpec, ...]:
    """Weights of one layer, by the names that its operations use."""
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = tuple(f"{attention}{x}_proj" for x in "qkv")
    kv_size = config.num_kv_heads * config.head_dim
    qkv_rows = (config.q_size, kv_size, kv_size)
    specs = [
        WeightSpec("input_norm", (hidden,), (prefix + "input_layernorm.weight",)),
        WeightSpec("qkv", (config.qkv_size, hidden), tuple(f"{x}.weight" for x in qkv), qkv_rows),
        WeightSpec("output", (hidden, config.q_size), (attention + "o_proj.weight",)),
        WeightSpec("post_attention_norm", (hidden,), (prefix + "post_attention_layernorm.weight",)),
    ]
    if config.qkv_bias:
        sources = tuple(f"{x}.bias" for x in qkv)
        specs.append(WeightSpec("qkv_bias", (config.qkv_size,), sources, qkv_rows))
    if config.output_bias:
        specs.append(WeightSpec("output_bias", (hidden,), (attention + "o_proj.bias",)))
    if config.qk_norm:
        specs += [
            WeightSpec(f"{x}_norm", (config.head_dim,), (f"{attention}{x}_norm.weight",))
            for x in "qk"
        ]
    if layer in config.sparse_layers and family.expert_names:
        return (*specs, *_expert_weights(config, family.expert_names, layer))
    gate_up = (mlp + "gate_proj", mlp + "up_proj")
    specs += [
        WeightSpec("gate_up", (2 * inner, hidden), tuple(f"{x}.weight" for x in gate_up)),
        WeightSpec("down", (hidden, inner), (mlp + "down_proj.weight",)),
    ]
    if config.mlp_bias:
        specs += [
            WeightSpec("gate_up_bias", (2 * inner,), tuple(f"{x}.bias" for x in gate_up)),
            WeightSpec("down_bias", (hidden,), (mlp + "down_proj.bias",)),
        ]
    return tuple(specs)


def _expert_weights(config: ModelConfig, names: ExpertNames, layer: int) -> tuple[WeightSpec, ...]:
    count, hidden, inner = config.experts, config.hidden_size, config.expert_intermediate_size
    gate_up = [
        name.format(layer=layer, expert=expert)
        for expert in range(count)
        for name in (names.gate, names.up)
    ]
    down = [names.down.format(layer=layer, expert=expert) for expert in range(count)]
    return (
        WeightSpec("router", (count, hidden), (names.router.format(layer=layer),)),
        WeightSpec("experts_gate_up", (count, 2 * inner, hidden), tuple(gate_up)),
        WeightSpec("experts_down", (count, hidden, inner), tuple(down)),
    )

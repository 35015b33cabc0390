"""The graph that all families share: a decoder with pre-normalization."""

from typing import Any

from nf_runtime.graph import BatchInput, Edge, ElementType, LayerGraph, Operation, Rows
from nf_runtime.model_config import ModelConfig


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
        Edge("logits", config.vocab_size, ElementType.FLOAT32),
    ]
    if config.sparse_layers:
        edges += [
            Edge("router_logits", config.experts),
            Edge("expert_ids", config.experts_per_token, ElementType.INT64, contiguous=True),
            Edge("expert_weights", config.experts_per_token, ElementType.FLOAT32, contiguous=True),
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
            updates=frozenset(caches.values()),
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

"""The graph that all families share: a decoder with pre-normalization.

With several ranks, a product whose columns they share gives each of them a part of a sum, in the
edge `partial`. An operation of the network makes it whole, and the norm that follows adds it to the
residual, be it in the next layer. With one rank the product itself adds the residual.
"""

from collections.abc import Mapping
from typing import Any

from nf_runtime.graph import BatchInput, Edge, ElementType, LayerGraph, Operation, Rows
from nf_runtime.model_config import ModelConfig
from nf_runtime.parallelism import WHOLE, Shard


def decoder_graph(config: ModelConfig, shard: Shard = WHOLE) -> LayerGraph:
    """The graph of a decoder with pre-normalization: attention, then a feed-forward.

    Args:
        config: The whole model.
        shard: The part of it that is computed; the graph of every rank has the same shape.

    Raises:
        ModelLoadError: The model cannot be divided so.
    """
    return LayerGraph(
        edges={edge.name: edge for edge in _edges(config, shard)},
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
                _norm("input_norm", config, adds_partial=shard.size > 1 and i > 0),
                *_attention(config, config.windows[i], shard),
                _norm("post_attention_norm", config, adds_partial=shard.size > 1),
                *(
                    _mixture(config, shard)
                    if i in config.sparse_layers
                    else _feed_forward(config, shard)
                ),
            )
            for i in range(config.num_layers)
        ),
        epilogue=(*_selection(config, shard), *_logits(config, shard)),
    )


def _edges(config: ModelConfig, shard: Shard) -> list[Edge]:
    local, is_parallel = shard.local(config), shard.size > 1
    gathers_output = is_parallel and shard.output == "all_gather"
    edges = [
        Edge("hidden", config.hidden_size),
        Edge("normed", config.hidden_size),
        Edge("qkv", local.qkv_size),
        Edge("query", local.q_size),
        Edge("attended", local.q_size, contiguous=gathers_output),
        Edge("gate_up", 2 * local.intermediate_size),
        Edge("activated", local.intermediate_size),
        Edge("selected", config.hidden_size),
        Edge("selected_normed", config.hidden_size),
        Edge("logits", config.vocab_size, ElementType.FLOAT32),
    ]
    if is_parallel:
        logits = shard.vocabulary_size(config)
        edges += [
            Edge("partial", config.hidden_size, contiguous=True),
            Edge("selected_partial", config.hidden_size),
            Edge("local_logits", logits, ElementType.FLOAT32, contiguous=True),
        ]
    if gathers_output:
        columns = len(shard.output_columns(config))
        edges += [
            Edge("all_attended", config.q_size),
            Edge("output_columns", columns, contiguous=True),
        ]
    if config.sparse_layers:
        edges += [
            Edge("router_logits", config.experts),
            Edge("expert_ids", config.experts_per_token, ElementType.INT64, contiguous=True),
            Edge("expert_weights", config.experts_per_token, ElementType.FLOAT32, contiguous=True),
        ]
    return edges


def _norm(
    name: str, config: ModelConfig, *, adds_partial: bool, selected: bool = False
) -> Operation:
    """The norm of the residual stream, or of its selected rows.

    With `adds_partial`, what the operation before has made whole is added to the stream first.
    """
    stream, target, partial = (
        ("selected", "selected_normed", "selected_partial")
        if selected
        else ("hidden", "normed", "partial")
    )
    return Operation(
        name,
        "rms_norm",
        reads={"x": partial, "residual": stream} if adds_partial else {"x": stream},
        weights={"weight": name},
        constants={"eps": config.rms_norm_eps},
        writes={"out": target} | ({"residual": stream} if adds_partial else {}),
        rows=Rows.SELECTED if selected else Rows.ALL,
    )


def _sum(name: str) -> Operation:
    """The sum of what all ranks have in the edge `partial`."""
    return Operation(name, "all_reduce", reads={"x": "partial"}, writes={"out": "partial"})


def _gather(name: str, source: str, target: str, rows: Rows = Rows.ALL) -> Operation:
    """The columns that all ranks have, next to each other."""
    return Operation(name, "all_gather", reads={"x": source}, writes={"out": target}, rows=rows)


def _linear(name: str, source: str, target: str, weight: str, has_bias: bool) -> Operation:
    return Operation(
        name,
        "linear",
        reads={"x": source},
        weights={"weight": weight} | ({"bias": f"{weight}_bias"} if has_bias else {}),
        writes={"out": target},
    )


def _residual_linear(
    name: str, source: str, weight: str, has_bias: bool, shard: Shard
) -> tuple[Operation, ...]:
    """A product whose result goes to the residual stream."""
    if shard.size > 1:
        total = _sum(f"{name.removesuffix('_proj')}_all_reduce")
        return _linear(name, source, "partial", weight, has_bias), total
    return (
        Operation(
            name,
            "linear",
            reads={"x": source, "residual": "hidden"},
            weights={"weight": weight} | ({"bias": f"{weight}_bias"} if has_bias else {}),
            writes={"out": "hidden"},
        ),
    )


def _attention(config: ModelConfig, window: int, shard: Shard) -> tuple[Operation, ...]:
    caches = {"k_cache": BatchInput.K_CACHE, "v_cache": BatchInput.V_CACHE}
    shared: dict[str, Any] = {
        "reads": {"q": "query"},
        "writes": {"out": "attended"},
        "constants": {"scale": config.head_dim**-0.5, "window": window},
    }
    norms = {"q_norm": "q_norm", "k_norm": "k_norm"} if config.qk_norm else {}
    return (
        _linear("qkv_proj", "normed", "qkv", "qkv", config.qkv_bias),
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
        *_output(config, shard),
    )


def _output(config: ModelConfig, shard: Shard) -> tuple[Operation, ...]:
    """From the attended heads to the residual stream."""
    if shard.size == 1 or shard.output == "all_reduce":
        return _residual_linear("output_proj", "attended", "output", config.output_bias, shard)
    return (
        _gather("attended_all_gather", "attended", "all_attended"),
        _linear("output_proj", "all_attended", "output_columns", "output", config.output_bias),
        _gather("output_all_gather", "output_columns", "partial"),
    )


def _feed_forward(config: ModelConfig, shard: Shard) -> tuple[Operation, ...]:
    return (
        _linear("gate_up_proj", "normed", "gate_up", "gate_up", config.mlp_bias),
        Operation("swiglu", "swiglu", reads={"gate_up": "gate_up"}, writes={"out": "activated"}),
        *_residual_linear("down_proj", "activated", "down", config.mlp_bias, shard),
    )


def _mixture(config: ModelConfig, shard: Shard) -> tuple[Operation, ...]:
    is_parallel = shard.size > 1
    reads = {"x": "normed", "expert_ids": "expert_ids", "expert_weights": "expert_weights"}
    constants: Mapping[str, int] = {}
    if shard.expert_parallel:
        constants = {"first_expert": shard.experts(config).start}
    return (
        _linear("router", "normed", "router_logits", "router", False),
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
            reads=reads | ({} if is_parallel else {"residual": "hidden"}),
            weights={"gate_up": "experts_gate_up", "down": "experts_down"},
            constants=constants,
            writes={"out": "partial" if is_parallel else "hidden"},
        ),
        *((_sum("experts_all_reduce"),) if is_parallel else ()),
    )


def _selection(config: ModelConfig, shard: Shard) -> tuple[Operation, ...]:
    """The rows whose logits are wanted, normalized."""

    def select(name: str, source: str, target: str) -> Operation:
        return Operation(
            name,
            "gather_rows",
            reads={"x": source},
            inputs={"index": BatchInput.SELECTED_ROWS},
            writes={"out": target},
            rows=Rows.SELECTED,
            reads_all_rows=frozenset({source}),
        )

    is_parallel = shard.size > 1
    return (
        select("select_rows", "hidden", "selected"),
        *((select("select_partial", "partial", "selected_partial"),) if is_parallel else ()),
        _norm("final_norm", config, adds_partial=is_parallel, selected=True),
    )


def _logits(config: ModelConfig, shard: Shard) -> tuple[Operation, ...]:
    is_parallel = shard.size > 1
    logits = Operation(
        "logits",
        "linear",
        reads={"x": "selected_normed"},
        weights={
            "weight": "embedding" if config.tied_embeddings and not is_parallel else "head"
        },
        writes={"out": "local_logits" if is_parallel else "logits"},
        rows=Rows.SELECTED,
    )
    if not is_parallel:
        return (logits,)
    return logits, _gather("logits_all_gather", "local_logits", "logits", Rows.SELECTED)

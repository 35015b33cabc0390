"""`nanoflow plan graph`: what a model computes, and what depends on what."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from nf_server.commands.failure import fail

if TYPE_CHECKING:
    from nf_runtime.dataflow import Flow, Step
    from nf_runtime.graph import LayerGraph, Operation

_COLORS = {"compute": "lightsalmon", "memory": "lightblue", "network": "palegreen"}


def graph(engine_options: dict[str, Any], form: str) -> int:
    """Print the graph of a model; the exit code.

    Args:
        engine_options: Fields of `EngineConfig`. Of the model, config.json is all that is read.
        form: `text`, `dot` or `json`.
    """
    from nf_runtime import EngineConfig, NanoFlowError
    from nf_runtime.dataflow import flows
    from nf_runtime.model_source import find_model
    from nf_runtime.models import decoder_graph, read_config

    try:
        engine = EngineConfig(**engine_options)
        config = read_config(find_model(engine.model, config_only=True))
        shard = engine.shard()
        made = decoder_graph(config, shard)
    except NanoFlowError as error:
        fail(error)
    between = flows(made)
    if form == "dot":
        print(_as_dot(made, between))
    elif form == "json":
        print(_as_json(made, between))
    else:
        ranks = f", rank 0 of {shard.size}" if shard.size > 1 else ""
        print(f"{config.architecture}, {config.num_layers} layers{ranks}")
        print(_as_table(made, between))
    return 0


def _as_table(graph: LayerGraph, between: list[Flow]) -> str:
    sources: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for flow in between:
        sources[flow.target.layer, flow.target.operation.name].append(_source(graph, flow))
    header = ("operation", "saturates", "rows", "reads", "writes", "after")
    lines: list[tuple[str, ...]] = []
    for title, layers, operations in _groups(graph):
        lines += [(), (title,)]
        for operation in operations:
            names = [name for layer in layers for name in sources[layer, operation.name]]
            lines.append(
                (
                    f"  {operation.name}",
                    operation.category.value,
                    operation.rows.value,
                    _edges(graph, list(operation.reads.values())),
                    _edges(graph, list(operation.writes.values())),
                    ", ".join(dict.fromkeys(names)),
                )
            )
    table = [header, *lines]
    widths = [max(len(row[i]) for row in table if len(row) > 1) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        if len(row) > 1
        else "".join(row)
        for row in table
    )


def _groups(graph: LayerGraph) -> list[tuple[str, range, tuple[Operation, ...]]]:
    """Parts of the model: a title, its layers and their operations; neighbours alike are one."""
    count = len(graph.layers)
    groups = [("before the layers", range(-1, 0), graph.prologue)]
    first = 0
    for operations, alike in groupby(graph.layers):
        stop = first + len(list(alike))
        title = f"layer {first}" if stop == first + 1 else f"layers {first} to {stop - 1}, each"
        groups.append((title, range(first, stop), operations))
        first = stop
    return [*groups, ("after the layers", range(count, count + 1), graph.epilogue)]


def _source(graph: LayerGraph, flow: Flow) -> str:
    """Where data comes from, as seen from who reads it."""
    name, layer = flow.source.operation.name, flow.source.layer
    if layer == flow.target.layer or layer < 0:
        return name
    return (
        f"{name} of the last layer"
        if flow.target.layer == len(graph.layers)
        else f"{name} of the layer before"
    )


def _edges(graph: LayerGraph, names: list[str]) -> str:
    return ", ".join(f"{name}[{graph.edges[name].width}]" for name in dict.fromkeys(names)) or "-"


def _as_dot(graph: LayerGraph, between: list[Flow]) -> str:
    from nf_runtime.dataflow import steps

    lines = ["digraph model {", "  node [shape=box, style=filled, fontname=sans];"]
    for layer, group in groupby(steps(graph), key=lambda step: step.layer):
        title = (
            "before" if layer < 0 else "after" if layer == len(graph.layers) else f"layer {layer}"
        )
        lines += [f"  subgraph cluster_{layer + 1} {{", f'    label="{title}";']
        for step in group:
            operation = step.operation
            lines.append(
                f'    {_node(step)} [label="{operation.name}\\n{operation.rows.value} rows", '
                f"fillcolor={_COLORS[operation.category.value]}];"
            )
        lines.append("  }")
    for flow in between:
        lines.append(f'  {_node(flow.source)} -> {_node(flow.target)} [label="{flow.data}"];')
    return "\n".join([*lines, "}"])


def _node(step: Step) -> str:
    return f"n{step.layer + 1}_{step.operation.name}"


def _as_json(graph: LayerGraph, between: list[Flow]) -> str:
    from nf_runtime.dataflow import steps

    return json.dumps(
        {
            "edges": {
                edge.name: {
                    "width": edge.width,
                    "element": edge.element.value,
                    "contiguous": edge.contiguous,
                }
                for edge in graph.edges.values()
            },
            "operations": [
                {
                    "layer": step.layer,
                    "name": step.operation.name,
                    "kind": step.operation.kind,
                    "category": step.operation.category.value,
                    "rows": step.operation.rows.value,
                    "reads": dict(step.operation.reads),
                    "writes": dict(step.operation.writes),
                    "inputs": {k: v.value for k, v in step.operation.inputs.items()},
                    "weights": dict(step.operation.weights),
                }
                for step in steps(graph)
            ],
            "flows": [
                {
                    "from": [flow.source.layer, flow.source.operation.name],
                    "to": [flow.target.layer, flow.target.operation.name],
                    "data": flow.data,
                }
                for flow in between
            ],
        }
    )

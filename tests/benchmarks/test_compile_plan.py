"""What it takes to compile a plan for a batch of a new structure."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nf_runtime.graph import LayerGraph, Operation
from nf_runtime.models import decoder_graph, read_config
from nf_runtime.pipeline.compiler import compile_each_layer, compile_plan
from nf_runtime.pipeline.division import divide
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.pipeline.workspace import plan_workspace

LAYERS = 80


SPARSE = {"alike": (), "alternating": range(1, LAYERS, 2), "alternating_later": range(3, LAYERS, 2)}
"""Which layers have a mixture of experts."""


def deep_graph(model: Path, layers: str) -> LayerGraph:
    """80 layers on two ranks, which makes the collectives that some templates are about."""
    config = replace(read_config(model), num_layers=LAYERS, windows=(0,) * LAYERS)
    if SPARSE[layers]:
        config = replace(
            config,
            experts=8,
            experts_per_token=2,
            expert_intermediate_size=config.intermediate_size // 4,
            sparse_layers=frozenset(SPARSE[layers]),
        )
    graph = decoder_graph(config)
    edges = {"reads": {"x": "hidden"}, "writes": {"out": "hidden"}}
    reduced = tuple(
        tuple(
            step
            for operation in layer
            for step in (
                (operation, Operation(f"{operation.name}_reduce", "all_reduce", **edges))
                if "hidden" in operation.writes.values()
                else (operation,)
            )
        )
        for layer in graph.layers
    )
    return replace(graph, layers=reduced)


@pytest.mark.parametrize("notices", [False, True], ids=["plain", "notices"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("layers", SPARSE)
def test_compile_plan(
    benchmark: Any, demo_model_dir: Path, layers: str, template: str, notices: bool
) -> None:
    """CPU time of 80 layers, and of the same without repeating any; a batch with a cut prompt."""
    graph = deep_graph(demo_model_dir, layers)
    workspace, plan = plan_workspace(graph, 2), TEMPLATES[template](graph)
    division = divide(plan.nano_batches, 256, np.array([512, 700, 324]), selected=259)

    def milliseconds(compile_one: Any) -> float:
        began = time.process_time()
        compile_one(graph, plan, division.structure, workspace=workspace, notices=notices)
        return (time.process_time() - began) * 1e3

    repeated: list[float] = []
    benchmark.pedantic(lambda: repeated.append(milliseconds(compile_plan)), rounds=15)
    mine = float(np.median(repeated))
    each = float(np.median([milliseconds(compile_each_layer) for _ in range(5)]))
    schedule = compile_plan(graph, plan, division.structure, workspace=workspace, notices=notices)
    benchmark.extra_info |= {
        "layers": LAYERS,
        "nano_operations": len(schedule.nodes),
        "events": schedule.num_events,
        "ms": mine,
        "ms_of_each_layer": each,
        "ratio": each / mine,
    }
    assert mine <= 10

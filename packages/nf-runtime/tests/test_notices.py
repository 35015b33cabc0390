"""The notices of a schedule, which tell of the keys and values of each layer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_graphs import (
    MODELS,
    check_complete,
    known_of,
    number_of,
    places_of,
    small_graph,
)
from random_plans import RandomBatch, batches, legal_plans

from nf_runtime.graph import LayerGraph
from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import Division, divide
from nf_runtime.pipeline.happens_before import find_races
from nf_runtime.pipeline.plan import Lane, NanoBatch, NanoOperation, Phase, Plan
from nf_runtime.pipeline.schedule import Schedule
from nf_runtime.pipeline.workspace import Workspace, plan_workspace

GRAPHS = {model: small_graph(model) for model in MODELS}
WORKSPACES = {model: plan_workspace(graph, 2) for model, graph in GRAPHS.items()}
UNEVEN = RandomBatch(5, np.array([9, 30, 2]), np.array([3, 9, 4, 1, 7, 0, 16, 5]), 8)


def compiled(
    graph: LayerGraph, plan: Plan, batch: RandomBatch, workspace: Workspace
) -> tuple[Schedule, Division]:
    division = divide(plan.nano_batches, batch.num_decodes, batch.prefills, selected=batch.selected)
    schedule = compile_plan(graph, plan, division.structure, workspace=workspace, notices=True)
    return schedule, division


def notices_of(schedule: Schedule, layer: int) -> tuple[int, int]:
    before = number_of(schedule, "before_append", layer)
    return before, number_of(schedule, "after_append", layer)


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(sorted(MODELS)), st.data(), batches())
def test_notices_stand_before_and_after_the_appends_of_their_layer(
    model: str, data: st.DataObject, batch: RandomBatch
) -> None:
    graph = GRAPHS[model]
    plan = data.draw(legal_plans(graph))
    schedule, _ = compiled(graph, plan, batch, WORKSPACES[model])
    known, places = known_of(schedule), places_of(schedule)
    for layer in range(len(graph.layers)):
        before, after = notices_of(schedule, layer)
        for number in range(len(schedule.nodes)):
            node = schedule.node(number)
            if (node.layer, node.operation.name) == (layer, "rope_append"):
                assert known[number][places[before][0]] > places[before][1]
                assert known[after][places[number][0]] > places[number][1]


def two_nano_batches(
    graph: LayerGraph, behind: tuple[int, int], lanes: tuple[str, str], reverse: bool = False
) -> Plan:
    """All of each nano-batch on a lane, so many layers behind."""
    halves = [
        [
            NanoOperation(
                operation=operation.name,
                nano_batches=(i,),
                lane=lanes[i],
                layers_behind=behind[i],
            )
            for operation in graph.layers[0]
        ]
        for i in (0, 1)
    ]
    return Plan(
        name="mine",
        nano_batches=(NanoBatch(phase=Phase.DECODE), NanoBatch(phase=Phase.PREFILL)),
        lanes=(Lane(name="first", share=0.5), Lane(name="second", share=0.5)),
        operations=tuple(o for half in (halves[::-1] if reverse else halves) for o in half),
    )


@pytest.mark.parametrize("behind", [(0, 0), (1, 0), (0, 1), (3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize(
    "lanes", [("first", "first"), ("first", "second"), ("device", "second"), ("first", "device")]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_notices_of_nano_batches_in_different_layers(
    behind: tuple[int, int], lanes: tuple[str, str], reverse: bool
) -> None:
    graph, workspace = GRAPHS["dense"], WORKSPACES["dense"]
    plan = two_nano_batches(graph, behind, lanes, reverse)
    schedule, division = compiled(graph, plan, UNEVEN, workspace)
    check_complete(schedule)
    assert find_races(schedule, division, workspace, UNEVEN.contexts) == []


@pytest.mark.parametrize("num_layers", [3, 30])
def test_lanes_that_are_layers_apart_get_notices_too(num_layers: int) -> None:
    """The device's lane is a tile behind the one that needs it: no tile has room for a notice."""
    graph = small_graph("dense", num_layers)
    first, *rest = two_nano_batches(graph, (0, 0), ("first", "second")).operations
    plan = two_nano_batches(graph, (0, 0), ("first", "second")).model_copy(
        update={
            "operations": (
                first.model_copy(update={"lane": "device", "layers_behind": 1}),
                *rest,
            )
        }
    )
    workspace = plan_workspace(graph, 2)
    schedule, division = compiled(graph, plan, UNEVEN, workspace)
    check_complete(schedule)
    if num_layers == 3:
        assert find_races(schedule, division, workspace, UNEVEN.contexts) == []

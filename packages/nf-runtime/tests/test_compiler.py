"""A compiled schedule orders what the model orders, waits for nothing else, and leaves none out."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_graphs import (
    MODELS,
    check_complete,
    commands_of,
    is_ordered,
    known_of,
    number_of,
    places_of,
    same_schedule,
    small_config,
    small_graph,
    waits_of,
    with_collectives,
    without_command,
)
from random_plans import RandomBatch, batches, legal_plans

from nf_runtime.graph import LayerGraph, Rows
from nf_runtime.models import decoder_graph
from nf_runtime.parallelism import Shard
from nf_runtime.pipeline import compiler
from nf_runtime.pipeline.compiler import compile_each_layer, compile_plan
from nf_runtime.pipeline.division import Division, divide
from nf_runtime.pipeline.happens_before import find_races
from nf_runtime.pipeline.plan import Lane, NanoBatch, NanoOperation, Plan
from nf_runtime.pipeline.schedule import Code, Schedule
from nf_runtime.pipeline.templates import TEMPLATES, co_resident, nanoflow, pd_multiplex, sequential
from nf_runtime.pipeline.workspace import Workspace, plan_workspace

GRAPHS = {model: with_collectives(small_graph(model)) for model in MODELS}
WORKSPACES = {model: plan_workspace(graph, 2) for model, graph in GRAPHS.items()}
DEEP = with_collectives(small_graph("qk-norm", 20))
DEEP_MIXED = with_collectives(small_graph("mixed", 20))
DENSE, SPARSE = DEEP_MIXED.layers[0], DEEP_MIXED.layers[1]


def deep(kinds: str) -> LayerGraph:
    """Layers with a mixture of experts (s) and dense ones (d)."""
    layers = tuple(SPARSE if kind == "s" else DENSE for kind in kinds)
    return replace(DEEP_MIXED, layers=layers)


REPEATING = {
    "alike": DEEP,
    "dense at first": DEEP_MIXED,
    "alternating": deep("ds" * 11),
    "alternating to the middle": deep("ds" * 11 + "d"),
    "one of three": deep("ssd" * 9 + "s"),
    "one of five": deep("dsddd" * 8 + "ds"),
    "alternating after others": deep("dddssd" + "sd" * 10),
    "dense among the first": deep("sssd" + "s" * 16),
    "another first": with_collectives(
        decoder_graph(small_config("mixed-by-step", 22), Shard(0, 2))
    ),
}
UNEVEN = RandomBatch(5, np.array([9, 30, 2]), np.array([3, 9, 4, 1, 7, 0, 16, 5]), 8)
BATCHES = {
    "decodes and prefills": UNEVEN,
    "decodes alone": RandomBatch(6, np.array([], np.int64), np.arange(6) + 1, 6),
    "one prompt": RandomBatch(0, np.array([50]), np.array([8]), 0),
    "one token": RandomBatch(1, np.array([], np.int64), np.array([4]), 1),
}
every_template = pytest.mark.parametrize("template", TEMPLATES)
with_and_without_notices = pytest.mark.parametrize("notices", [False, True])


def divided(plan: Plan, batch: RandomBatch) -> Division:
    return divide(plan.nano_batches, batch.num_decodes, batch.prefills, selected=batch.selected)


def compiled(
    graph: LayerGraph, plan: Plan, batch: RandomBatch, workspace: Workspace, **options: Any
) -> tuple[Schedule, Division]:
    division = divided(plan, batch)
    return (
        compile_plan(graph, plan, division.structure, workspace=workspace, **options),
        division,
    )


# --- what is shipped


@every_template
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", BATCHES)
@with_and_without_notices
def test_templates_have_no_races(template: str, model: str, batch: str, notices: bool) -> None:
    graph, workspace, drawn = GRAPHS[model], WORKSPACES[model], BATCHES[batch]
    schedule, division = compiled(
        graph, TEMPLATES[template](graph), drawn, workspace, notices=notices
    )
    check_complete(schedule)
    assert find_races(schedule, division, workspace, drawn.contexts) == []


@pytest.mark.parametrize("batch", BATCHES)
def test_a_sequential_schedule_is_the_graph(batch: str) -> None:
    graph = GRAPHS["mixed"]
    schedule, _ = compiled(graph, sequential(graph), BATCHES[batch], WORKSPACES["mixed"])
    assert schedule.num_events == 0
    names = [schedule.node(argument).operation.name for _, _, argument in schedule.launch_order]
    drawn = BATCHES[batch]
    empty = {
        *(() if drawn.num_decodes else (Rows.DECODE,)),
        *(() if len(drawn.prefills) else (Rows.PREFILL,)),
        *(() if drawn.selected else (Rows.SELECTED,)),
    }
    assert names == [o.name for part in graph.parts for o in part if o.rows not in empty]


# --- what repeats


def no_other_way(*_: Any, **__: Any) -> Schedule:
    raise AssertionError("every layer was looked at")


@every_template
@with_and_without_notices
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layers", REPEATING)
def test_repeating_layers_gives_what_each_layer_gives(
    template: str, notices: bool, batch: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = REPEATING[layers]
    plan, workspace = TEMPLATES[template](graph), plan_workspace(graph, 2)
    structure = divided(plan, BATCHES[batch]).structure
    slow = compile_each_layer(graph, plan, structure, workspace=workspace, notices=notices)
    monkeypatch.setattr(compiler, "compile_each_layer", no_other_way)
    fast = compile_plan(graph, plan, structure, workspace=workspace, notices=notices)
    assert same_schedule(fast, slow)


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(sorted(REPEATING)), st.data(), batches(), st.booleans())
def test_repeating_layers_of_random_plans_gives_what_each_layer_gives(
    layers: str, data: st.DataObject, batch: RandomBatch, notices: bool
) -> None:
    graph = REPEATING[layers]
    plan = data.draw(legal_plans(graph))
    workspace = plan_workspace(graph, 2)
    structure = divided(plan, batch).structure
    fast = compile_plan(graph, plan, structure, workspace=workspace, notices=notices)
    slow = compile_each_layer(graph, plan, structure, workspace=workspace, notices=notices)
    assert same_schedule(fast, slow)


# --- any plan


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(MODELS)), st.data(), batches(), st.booleans())
def test_random_plans_have_no_races(
    model: str, data: st.DataObject, batch: RandomBatch, notices: bool
) -> None:
    graph, workspace = GRAPHS[model], WORKSPACES[model]
    plan = data.draw(legal_plans(graph))
    schedule, division = compiled(graph, plan, batch, workspace, notices=notices)
    check_complete(schedule)
    assert find_races(schedule, division, workspace, batch.contexts) == []


def nodes_with_rows(graph: LayerGraph, plan: Plan, division: Division) -> Counter[Any]:
    """Layer, operation and nano-batches of all that has a row."""
    whole = 0, len(plan.nano_batches)
    found: Counter[Any] = Counter()
    for layer, part in enumerate(graph.parts, start=-1):
        for operation in part:
            ranges = [
                (listed.nano_batches[0], listed.nano_batches[-1] + 1)
                for listed in plan.operations
                if listed.operation == operation.name
            ]
            for first, end in ranges if 0 <= layer < len(graph.layers) else [whole]:
                low, high = division.rows(operation.rows, first, end)
                if operation.rows is Rows.SELECTED:
                    low, high = 0, int(division.structure.has_selected)
                if low < high:
                    found[layer, operation.name, first, end] += 1
    return found


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(sorted(MODELS)), st.data(), batches())
def test_only_nano_operations_without_rows_are_left_out(
    model: str, data: st.DataObject, batch: RandomBatch
) -> None:
    graph = GRAPHS[model]
    plan = data.draw(legal_plans(graph))
    schedule, division = compiled(graph, plan, batch, WORKSPACES[model])
    nodes = [schedule.node(number) for number in range(len(schedule.nodes))]
    kept = Counter((node.layer, node.operation.name, node.first, node.end) for node in nodes)
    assert kept == nodes_with_rows(graph, plan, division)


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(sorted(MODELS)), st.data(), batches(), st.booleans())
def test_what_starts_after_another_does_so(
    model: str, data: st.DataObject, batch: RandomBatch, notices: bool
) -> None:
    graph = GRAPHS[model]
    plan = data.draw(legal_plans(graph))
    schedule, _ = compiled(graph, plan, batch, WORKSPACES[model], notices=notices)
    known, places = known_of(schedule), places_of(schedule)
    by_name = {listed.name: number for number, listed in enumerate(plan.operations)}
    numbers = {
        (int(placed), int(part) - 1): number
        for number, (placed, part) in enumerate(
            zip(schedule.placed, schedule.nodes[:, 0], strict=True)
        )
        if placed >= 0
    }
    for (placed, layer), number in numbers.items():
        listed = plan.operations[placed]
        for name in listed.after_start:
            other = by_name[name]
            behind = plan.operations[other].layers_behind - listed.layers_behind
            earlier = numbers.get((other, layer - behind))
            if earlier is not None:
                lane, place = places[earlier]
                commands = commands_of(schedule)[lane]
                # Its start is told of by a signal right before it, or it has begun.
                told = place - 1 if place and commands[place - 1][0] == Code.SIGNAL else place
                assert known[number][lane] > told


# --- no wait too many


def unneeded_waits(
    schedule: Schedule, division: Division, workspace: Workspace, batch: RandomBatch
) -> list[tuple[int, int, int]]:
    return [
        (lane, place, event)
        for lane, place, event in waits_of(schedule)
        if not find_races(
            without_command(schedule, lane, place), division, workspace, batch.contexts
        )
    ]


@every_template
@pytest.mark.parametrize("batch", BATCHES)
@with_and_without_notices
def test_every_wait_of_templates_is_needed(template: str, batch: str, notices: bool) -> None:
    graph, workspace, drawn = GRAPHS["mixed"], WORKSPACES["mixed"], BATCHES[batch]
    schedule, division = compiled(
        graph, TEMPLATES[template](graph), drawn, workspace, notices=notices
    )
    assert unneeded_waits(schedule, division, workspace, drawn) == []


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(MODELS)), st.data(), batches(max_decodes=4), st.booleans())
def test_every_wait_of_random_plans_is_needed(
    model: str, data: st.DataObject, batch: RandomBatch, notices: bool
) -> None:
    """But for what `after_start` asks for, which is no question of memory."""
    graph = replace(GRAPHS[model], layers=GRAPHS[model].layers[:2])
    plan = data.draw(legal_plans(graph))
    plan = plan.model_copy(
        update={
            "operations": tuple(o.model_copy(update={"after_start": ()}) for o in plan.operations)
        }
    )
    workspace = plan_workspace(graph, 2)
    schedule, division = compiled(graph, plan, batch, workspace, notices=notices)
    assert unneeded_waits(schedule, division, workspace, batch) == []


def test_a_start_that_implies_an_end_is_the_only_wait() -> None:
    """On one lane, z follows y; who waits for z's start need not wait for y's end."""
    graph = small_graph("dense", 1)
    both = tuple(
        NanoOperation(operation=operation.name, nano_batches=(0, 1), lane="second")
        for operation in graph.layers[0]
    )
    split = {
        "gate_up_proj": [
            NanoOperation(operation="gate_up_proj", nano_batches=(i,), lane="second")
            for i in (0, 1)
        ],
        "swiglu": [
            NanoOperation(
                operation="swiglu", nano_batches=(0,), lane="first", after_start=("gate_up_proj:1",)
            ),
            NanoOperation(operation="swiglu", nano_batches=(1,), lane="second"),
        ],
    }
    plan = Plan(
        name="mine",
        nano_batches=(NanoBatch(), NanoBatch()),
        lanes=(Lane(name="first", share=0.5), Lane(name="second", share=0.5)),
        operations=tuple(x for one in both for x in split.get(one.operation, [one])),
    )
    schedule, _ = compiled(graph, plan, UNEVEN, plan_workspace(graph, 2))
    swiglu = number_of(schedule, "swiglu", 0, 0)
    assert is_ordered(schedule, number_of(schedule, "gate_up_proj", 0, 0), swiglu)
    assert [code for code, _ in commands_of(schedule)[1]] == [Code.WAIT, Code.LAUNCH, Code.SIGNAL]


# --- requests that are cut in two


def test_the_later_part_of_a_prompt_waits_for_the_keys_of_the_earlier() -> None:
    graph, workspace = GRAPHS["dense"], WORKSPACES["dense"]
    plan = co_resident(graph)
    across = RandomBatch(2, np.array([10, 20]), np.array([5, 5, 0, 0]), 4)  # 16 and 16
    apart = RandomBatch(2, np.array([14, 16]), np.array([5, 5, 0, 0]), 4)
    for batch, is_cut in ((across, True), (apart, False)):
        schedule, division = compiled(graph, plan, batch, workspace)
        for layer in range(len(graph.layers)):
            append = number_of(schedule, "rope_append", layer, 0)
            attention = number_of(schedule, "prefill_attention", layer, 1)
            assert is_ordered(schedule, append, attention) == is_cut
            decodes = [n for n in range(len(schedule.nodes)) if _is_decode(schedule, n, layer)]
            assert len(decodes) == 1  # all are in the first nano-batch
        assert find_races(schedule, division, workspace, batch.contexts) == []


def _is_decode(schedule: Schedule, number: int, layer: int) -> bool:
    node = schedule.node(number)
    return node.layer == layer and node.operation.name == "decode_attention"


def test_a_prompt_in_all_nano_batches_attends_to_all_before() -> None:
    graph = GRAPHS["dense"]
    lanes = tuple(Lane(name=f"lane{i}", share=0.25) for i in range(4))
    plan = Plan(
        name="mine",
        nano_batches=(NanoBatch(),) * 4,
        lanes=lanes,
        operations=tuple(
            NanoOperation(operation=operation.name, nano_batches=(i,), lane=f"lane{i}")
            for i in range(4)
            for operation in graph.layers[0]
        ),
    )
    batch = RandomBatch(0, np.array([40]), np.array([3]), 1)
    schedule, _ = compiled(graph, plan, batch, WORKSPACES["dense"])
    for later in range(4):
        attention = number_of(schedule, "prefill_attention", 1, later)
        for earlier in range(4):
            append = number_of(schedule, "rope_append", 1, earlier)
            assert is_ordered(schedule, append, attention) == (earlier <= later)


def test_decodes_alone_run_beside_prefills_of_a_later_layer() -> None:
    graph = GRAPHS["dense"]
    schedule, _ = compiled(graph, pd_multiplex(graph), UNEVEN, WORKSPACES["dense"])
    first = number_of(schedule, "input_norm", 0, 1)
    last = number_of(schedule, "input_norm", 2, 0)
    assert not is_ordered(schedule, first, last)
    assert not is_ordered(schedule, last, first)


def test_attention_of_one_half_runs_beside_products_of_the_other() -> None:
    graph = small_graph("dense")
    schedule, _ = compiled(graph, nanoflow(graph), replace_decodes(64), plan_workspace(graph, 2))
    attention = number_of(schedule, "decode_attention", 1, 0)
    product = number_of(schedule, "gate_up_proj", 0, 1)
    assert not is_ordered(schedule, attention, product)
    assert not is_ordered(schedule, product, attention)


def replace_decodes(count: int) -> RandomBatch:
    return RandomBatch(count, np.array([], np.int64), np.full(count, 9), count)


def test_a_structure_of_another_division_is_refused() -> None:
    graph = GRAPHS["dense"]
    structure = divided(nanoflow(graph), UNEVEN).structure
    with pytest.raises(ValueError, match="structure is of 2 nano-batches; plan 'sequential' has 1"):
        compile_plan(graph, sequential(graph), structure)

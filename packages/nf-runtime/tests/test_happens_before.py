"""The checker of schedules reports what is wrong, and nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_graphs import (
    commands_of,
    number_of,
    places_of,
    small_graph,
    waits_of,
    with_commands,
    without_command,
)
from random_plans import RandomBatch, batches

from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import Division, divide
from nf_runtime.pipeline.happens_before import find_races
from nf_runtime.pipeline.plan import NanoBatch, NanoOperation, Plan
from nf_runtime.pipeline.schedule import Code, Schedule
from nf_runtime.pipeline.templates import co_resident, nanoflow, pd_multiplex, sequential
from nf_runtime.pipeline.workspace import plan_workspace

GRAPH = small_graph("mixed")
WORKSPACE = plan_workspace(GRAPH, 2)
BATCH = RandomBatch(4, np.array([20, 4]), np.array([3, 9, 4, 1, 0, 16]), 6)


def checked(plan: Plan, batch: RandomBatch = BATCH, **options: Any) -> tuple[Schedule, Division]:
    division = divide(plan.nano_batches, batch.num_decodes, batch.prefills, selected=batch.selected)
    schedule = compile_plan(GRAPH, plan, division.structure, workspace=WORKSPACE, **options)
    assert find_races(schedule, division, WORKSPACE, batch.contexts) == []
    return schedule, division


def swapped(schedule: Schedule, first: int, second: int) -> Schedule:
    lanes = commands_of(schedule)
    (lane, place), (other_lane, other_place) = (places_of(schedule)[n] for n in (first, second))
    lanes[lane][place], lanes[other_lane][other_place] = (
        lanes[other_lane][other_place],
        lanes[lane][place],
    )
    return with_commands(schedule, lanes)


def two_on_one_lane() -> Plan:
    """Two nano-batches, one operation after the other."""
    return Plan(
        name="mine",
        nano_batches=(NanoBatch(), NanoBatch()),
        operations=tuple(
            NanoOperation(operation=listed.operation, nano_batches=(i,))
            for listed in sequential(GRAPH).operations
            for i in (0, 1)
        ),
    )


def test_appends_may_be_swapped_and_an_append_and_its_attention_may_not() -> None:
    schedule, division = checked(two_on_one_lane())
    appends = [number_of(schedule, "rope_append", 1, i) for i in (0, 1)]
    assert find_races(swapped(schedule, *appends), division, WORKSPACE, BATCH.contexts) == []
    attention = number_of(schedule, "prefill_attention", 1, 0)
    races = find_races(
        swapped(schedule, appends[1], attention), division, WORKSPACE, BATCH.contexts
    )
    # The second nano-batch's prompt began in the first: only its own attention has to come later.
    assert races == []
    own = number_of(schedule, "prefill_attention", 1, 1)
    races = find_races(swapped(schedule, appends[0], own), division, WORKSPACE, BATCH.contexts)
    assert {race.memory for race in races} >= {"KV of request 4", "query"}


def test_launches_of_one_nano_batch_that_are_swapped() -> None:
    schedule, division = checked(sequential(GRAPH))
    first, second = (number_of(schedule, name, 1) for name in ("qkv_proj", "rope_append"))
    races = find_races(swapped(schedule, first, second), division, WORKSPACE, BATCH.contexts)
    assert [str(race) for race in races if race.memory == "qkv"] == [
        "rope_append of layer 1, nano-batch 0 is not ordered after qkv_proj of layer 1, "
        "nano-batch 0: both use qkv"
    ]


@pytest.mark.parametrize("template", [nanoflow, co_resident, pd_multiplex])
@pytest.mark.parametrize("notices", [False, True])
def test_a_signal_and_its_waits_that_are_left_out(template: Any, notices: bool) -> None:
    schedule, division = checked(template(GRAPH), notices=notices)
    events = {event for _, _, event in waits_of(schedule)}
    assert events
    for event in events:
        lanes = [
            [(code, a) for code, a in lane if code == Code.LAUNCH or a != event]
            for lane in commands_of(schedule)
        ]
        assert find_races(with_commands(schedule, lanes), division, WORKSPACE, BATCH.contexts)


def test_a_wait_for_the_keys_of_the_other_nano_batch_that_is_left_out() -> None:
    schedule, division = checked(co_resident(GRAPH))
    found = set()
    for lane, place, _ in waits_of(schedule):
        broken = without_command(schedule, lane, place)
        for race in find_races(broken, division, WORKSPACE, BATCH.contexts):
            found.add((race.first.split(",")[0], race.second.split(",")[0], race.memory))
    for layer in range(3):
        append, attention = f"rope_append of layer {layer}", f"prefill_attention of layer {layer}"
        assert (append, attention, "KV of request 4") in found


def test_a_signal_before_its_launch_tells_of_nothing() -> None:
    schedule, division = checked(nanoflow(GRAPH))
    lanes = commands_of(schedule)
    for commands in lanes:
        for place in range(1, len(commands)):
            if commands[place][0] == Code.SIGNAL and commands[place - 1][0] == Code.LAUNCH:
                commands[place - 1], commands[place] = commands[place], commands[place - 1]
    assert find_races(with_commands(schedule, lanes), division, WORKSPACE, BATCH.contexts)


@pytest.mark.parametrize("template", [sequential, pd_multiplex])
@pytest.mark.parametrize(
    ("edge", "other", "writer", "reader"),
    [
        ("hidden", "qkv", "decode_attention", "output_proj"),
        ("normed", "router_logits", "router", "moe_experts"),
        ("activated", "gate_up", "swiglu", "swiglu"),
        ("selected", "selected_normed", "final_norm", "final_norm"),
    ],
)
def test_edges_alive_at_the_same_time_in_the_same_columns(
    template: Any, edge: str, other: str, writer: str, reader: str
) -> None:
    plan = template(GRAPH)
    moved = replace(WORKSPACE.places[edge], offset=WORKSPACE.places[other].offset)
    wrong = replace(WORKSPACE, places={**WORKSPACE.places, edge: moved})
    division = divide(plan.nano_batches, BATCH.num_decodes, BATCH.prefills, selected=6)
    schedule = compile_plan(GRAPH, plan, division.structure, workspace=wrong)
    races = find_races(schedule, division, wrong, BATCH.contexts)
    assert all(race.is_ordered for race in races)
    found = {(race.first.split()[0], race.second.split()[0]) for race in races}
    assert (writer, reader) in found
    assert any(edge in race.memory and "overwrites what" in str(race) for race in races)


@settings(deadline=None, max_examples=40)
@given(batches(), batches())
def test_a_schedule_holds_for_every_batch_of_its_structure(
    one: RandomBatch, other: RandomBatch
) -> None:
    plan = nanoflow(GRAPH)
    mine, theirs = (
        divide(plan.nano_batches, batch.num_decodes, batch.prefills, selected=batch.selected)
        for batch in (one, other)
    )
    schedule = compile_plan(GRAPH, plan, mine.structure, workspace=WORKSPACE)
    if mine.structure == theirs.structure:
        assert find_races(schedule, theirs, WORKSPACE, other.contexts) == []


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_notice_that_is_moved(data: st.DataObject) -> None:
    schedule, division = checked(sequential(GRAPH), notices=True)
    layer = data.draw(st.integers(0, 2))
    append = number_of(schedule, "rope_append", layer)
    for name in ("before_append", "after_append"):
        races = find_races(
            swapped(schedule, number_of(schedule, name, layer), append),
            division,
            WORKSPACE,
            BATCH.contexts,
        )
        assert {race.memory for race in races} >= {f"KV of request {i}" for i in range(6)}


def test_lanes_that_wait_for_each_other_are_no_schedule() -> None:
    schedule, division = checked(sequential(GRAPH))
    stuck = with_commands(schedule, [[(Code.WAIT, 0), *commands_of(schedule)[0]]])
    with pytest.raises(RuntimeError, match="the lanes of the schedule wait for each other"):
        find_races(stuck, division, WORKSPACE, BATCH.contexts)

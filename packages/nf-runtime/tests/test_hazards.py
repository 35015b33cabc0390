"""Who depends on whom over one piece of memory."""

import numpy as np

from nf_runtime.graph import Edge, LayerGraph, Operation
from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import divide
from nf_runtime.pipeline.happens_before import find_races
from nf_runtime.pipeline.hazards import Hazards
from nf_runtime.pipeline.plan import Lane, NanoBatch, NanoOperation, Plan
from nf_runtime.pipeline.schedule import Schedule
from nf_runtime.pipeline.workspace import Buffer, Place, Workspace

# `wide` has both columns; `left` and `right` share one each with it.
SHARING = {
    "wide": ("wide", "left", "right"),
    "left": ("wide", "left"),
    "right": ("wide", "right"),
}


def test_a_reader_depends_on_who_wrote_its_rows() -> None:
    hazards = Hazards(SHARING)
    assert hazards.write("left", 0b0011, 0) == set()
    assert hazards.write("left", 0b1100, 1) == set()
    assert hazards.read("left", 0b0001, 2) == {0}
    assert hazards.read("left", 0b0110, 3) == {0, 1}
    assert hazards.read("right", 0b1111, 4) == set()


def test_a_writer_depends_on_who_used_its_rows() -> None:
    hazards = Hazards(SHARING)
    hazards.write("left", 0b11, 0)
    hazards.read("left", 0b01, 1)
    assert hazards.write("left", 0b10, 2) == {0}
    assert hazards.write("left", 0b01, 3) == {0, 1}
    assert hazards.write("left", 0b11, 4) == {2, 3}


def test_who_reads_and_writes_does_not_depend_on_itself() -> None:
    hazards = Hazards(SHARING)
    hazards.write("left", 1, 0)
    assert hazards.read("left", 1, 1) == {0}
    assert hazards.write("left", 1, 1) == {0}


def test_a_write_beside_does_not_hide_who_used_the_other_columns() -> None:
    hazards = Hazards(SHARING)
    hazards.write("wide", 1, 0)
    hazards.read("wide", 1, 1)
    assert hazards.write("left", 1, 2) == {0, 1}
    assert hazards.write("right", 1, 3) == {0, 1}
    assert hazards.write("wide", 1, 4) == {0, 1, 2, 3}


def test_who_wrote_an_edge_has_waited_for_the_others_until_then() -> None:
    hazards = Hazards(SHARING)
    hazards.write("wide", 0b11, 0)
    assert hazards.write("left", 0b01, 1) == {0}
    assert hazards.write("left", 0b01, 2) == {1}
    assert hazards.write("left", 0b11, 3) == {0, 2}
    hazards.read("wide", 0b10, 4)
    assert hazards.write("left", 0b11, 5) == {3, 4}


def test_where_rows_lie_is_not_told_apart_everybody_waits_for_all() -> None:
    hazards = Hazards(SHARING, rows_apart=False)
    hazards.write("wide", 0b01, 0)
    assert hazards.write("left", 0b01, 1) == {0}
    assert hazards.write("left", 0b10, 2) == {0}
    assert hazards.write("left", 0b11, 3) == {1, 2}


def branches(lane_of_right: str) -> tuple[Schedule, Workspace]:
    """A layer whose branches write to columns beside each other that were one edge's before."""
    names = ("hidden", "wide", "left", "right")
    operations = (
        Operation("to_wide", "linear", reads={"x": "hidden"}, writes={"out": "wide"}),
        Operation("from_wide", "linear", reads={"x": "wide"}, writes={"out": "hidden"}),
        Operation("to_left", "linear", reads={"x": "hidden"}, writes={"out": "left"}),
        Operation("to_right", "linear", writes={"out": "right"}),
        Operation("join", "linear", reads={"x": "left", "y": "right"}, writes={"out": "hidden"}),
    )
    graph = LayerGraph(
        edges={name: Edge(name, 32) for name in names},
        prologue=(Operation("embedding", "embedding", writes={"out": "hidden"}),),
        layers=(operations,) * 2,
        epilogue=(),
    )
    places = {
        "hidden": Place(0, 0, 64),
        "wide": Place(0, 64, 128),
        "left": Place(0, 64, 64),
        "right": Place(0, 128, 64),
    }
    workspace = Workspace((Buffer(192, selected=False),), places)
    lanes = {"to_wide": "main", "from_wide": "main", "to_left": "main", "join": "main"}
    plan = Plan(
        name="branches",
        nano_batches=(NanoBatch(),),
        lanes=(Lane(name="main", share=0.5), Lane(name="beside", share=0.5)),
        operations=tuple(
            NanoOperation(operation=o.name, lane=lanes.get(o.name, lane_of_right))
            for o in operations
        ),
    )
    division = divide(plan.nano_batches, 3, np.array([], np.int64), selected=0)
    schedule = compile_plan(graph, plan, division.structure, workspace=workspace)
    assert find_races(schedule, division, workspace, np.array([1, 1, 1])) == []
    return schedule, workspace


def test_a_branch_waits_for_the_edge_that_had_its_columns() -> None:
    assert branches("main")[0].num_events == 1  # that of the embedding
    # The branch waits for `wide` to have been read, and is waited for: in each of two layers.
    assert branches("beside")[0].num_events == 5

"""Pictures of iterations, from times made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nf_runtime.models import decoder_graph, read_config
from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import divide_typical
from nf_runtime.pipeline.policy import Reason
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.timeline import IterationTrace
from nf_server.gantt import draw, lane_lines, middle_layers, span_of

DEMO_MODEL = Path(__file__).resolve().parents[3] / "models" / "nanoflow-demo"
GRAPH = decoder_graph(read_config(DEMO_MODEL))


def trace(plan: str, times: dict[tuple[str, int, int], tuple[int, int]]) -> IterationTrace:
    """An iteration with times in ns by (operation, layer, first nano-batch)."""
    built = TEMPLATES[plan](GRAPH)
    division = divide_typical(built.nano_batches)
    schedule = compile_plan(GRAPH, built, division.structure)
    noted = np.full((len(schedule.nodes), 2), -1, dtype=np.int64)
    for number in range(len(schedule.nodes)):
        node = schedule.node(number)
        noted[number] = times.get((node.operation.name, node.layer, node.first), (-1, -1))
    contexts = np.zeros(1, dtype=np.int64)
    return IterationTrace(0, 1, 1, contexts, Reason.PLANNED, schedule, division, times=noted)


OVERLAPPED = {
    ("embedding", -1, 0): (0, 900),
    ("qkv_proj", 2, 0): (1000, 1400),
    ("decode_attention", 2, 0): (1400, 1900),
    ("qkv_proj", 2, 1): (1500, 1800),
    ("rope_append", 2, 1): (1800, 1900),
    ("logits", 6, 0): (2000, 3000),
}


def test_a_lane_shows_what_it_does_most_in_each_slice() -> None:
    made = trace("nanoflow", OVERLAPPED)
    assert lane_lines(made, (1000, 2000), 100) == {
        "compute": "CCCC.cccm.",
        "memory": "....MMMMM.",
    }


def test_slices_that_are_idle_for_the_most_part_are_idle() -> None:
    made = trace("nanoflow", {("qkv_proj", 2, 0): (0, 149)})
    assert lane_lines(made, (0, 200), 100) == {"compute": "C."}


def test_the_picture_is_of_the_layers_in_the_middle_on_one_scale() -> None:
    overlapped = trace("nanoflow", OVERLAPPED)
    alone = trace("sequential", {("qkv_proj", 2, 0): (500, 900), ("down_proj", 3, 0): (900, 2500)})
    assert middle_layers(overlapped) == (2, 3)
    assert span_of(overlapped, (2, 3)) == (1000, 1900)
    lines = draw({"sequential": alone, "nanoflow": overlapped}, (2, 3), width=20)
    assert lines[0].startswith("Layers 2 to 3 of one iteration, 0.1 µs per character: C compute")
    assert lines[1:] == [
        "",
        "sequential",
        "  device  |CCCCCCCCCCCCCCCCCCCC|",
        "",
        "nanoflow",
        "  compute |CCCC.cccm|",
        "  memory  |....MMMMM|",
    ]


def test_layers_without_times_draw_nothing() -> None:
    lines = draw({"nanoflow": trace("nanoflow", {})}, (2, 3))
    assert lines[1:] == ["", "nanoflow"]

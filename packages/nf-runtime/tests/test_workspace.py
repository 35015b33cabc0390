"""Where edges are: what is alive at the same time shares no memory, and little is wasted."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from pipeline_graphs import MODELS, small_graph, with_collectives

from nf_runtime.graph import Edge, ElementType, LayerGraph, Operation, Rows
from nf_runtime.models import decoder_graph, read_config
from nf_runtime.pipeline.workspace import Workspace, plan_workspace

DEMO = Path(__file__).resolve().parents[3] / "models" / "nanoflow-demo"
GRAPHS = [
    *((model, small_graph(model, num_layers)) for model in MODELS for num_layers in (1, 4)),
    ("experts, two ranks", with_collectives(small_graph("experts"))),
    ("demo", decoder_graph(read_config(DEMO))),
]
every_graph = pytest.mark.parametrize("graph", [pytest.param(g, id=name) for name, g in GRAPHS])


def alive_together(graph: LayerGraph) -> set[frozenset[str]]:
    """Pairs of edges that hold what is still needed at the same time, row by row.

    While an operation runs, what it reads and writes is alive, and what was written before and is
    read later.
    """
    operations = [operation for part in graph.parts for operation in part]
    alive: list[set[str]] = [set() for _ in operations]
    for row in (Rows.DECODE, Rows.PREFILL):
        for edge in graph.edges:
            since: int | None = None
            for now, operation in enumerate(operations):
                whole = edge in operation.reads_all_rows
                mine = row in (Rows.ALL if whole else operation.rows).parts
                if edge in operation.reads.values() and mine:
                    assert since is not None
                    for moment in range(since, now + 1):
                        alive[moment].add(edge)
                    since = now if edge not in operation.writes.values() else since
                if edge in operation.writes.values():
                    alive[now].add(edge)
                    since = now if row in operation.rows.parts else since
    return {frozenset(pair) for edges in alive for pair in combinations(sorted(edges), 2)}


def bytes_of(edge: Edge, element_bytes: int) -> int:
    sizes = {ElementType.INT64: 8, ElementType.FLOAT32: 4, ElementType.MODEL: element_bytes}
    return edge.width * sizes[edge.element]


@every_graph
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_edges_alive_at_the_same_time_share_no_memory(
    graph: LayerGraph, element_bytes: int
) -> None:
    workspace = plan_workspace(graph, element_bytes)
    for pair in alive_together(graph):
        first, second = (workspace.places[edge] for edge in pair)
        assert not first.overlaps(second), pair


@every_graph
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_every_edge_has_its_columns(graph: LayerGraph, element_bytes: int) -> None:
    workspace = plan_workspace(graph, element_bytes)
    assert workspace.places.keys() == graph.edges.keys()
    for name, place in workspace.places.items():
        edge, buffer = graph.edges[name], workspace.buffers[place.buffer]
        assert place.num_bytes == bytes_of(edge, element_bytes)
        assert place.offset % 64 == 0
        assert place.offset + place.num_bytes <= buffer.row_bytes
        assert buffer.selected == (name in graph.selected_edges)
        if edge.contiguous:  # rows without gaps
            assert (place.offset, place.num_bytes) == (0, buffer.row_bytes)
        else:
            assert buffer.row_bytes % 64 == 0
            assert buffer.row_bytes % 4096


@every_graph
def test_sharing_is_symmetric_and_holds_what_overlaps(graph: LayerGraph) -> None:
    workspace = plan_workspace(graph, 2)
    sharing = workspace.sharing()
    for edge, others in sharing.items():
        assert edge in others
        for other in graph.edges:
            overlaps = workspace.places[edge].overlaps(workspace.places[other])
            assert (other in others) == (edge in sharing[other]) == overlaps


@every_graph
def test_a_workspace_is_smaller_than_a_buffer_per_edge(graph: LayerGraph) -> None:
    workspace = plan_workspace(graph, 2)
    assert workspace.num_bytes(tokens=256, selected=16) < apart(graph, tokens=256, selected=16)


def apart(graph: LayerGraph, *, tokens: int, selected: int) -> int:
    """Bytes of a buffer per edge, with rows as they are aligned in a workspace."""
    return sum(
        -(-bytes_of(edge, 2) // 64) * 64 * (selected if name in graph.selected_edges else tokens)
        for name, edge in graph.edges.items()
    )


def test_tokens_of_the_demo_model_take_two_thirds_of_a_buffer_per_edge() -> None:
    graph = decoder_graph(read_config(DEMO))
    workspace = plan_workspace(graph, 2)
    ratio = workspace.num_bytes(tokens=1024, selected=0) / apart(graph, tokens=1024, selected=0)
    assert 0.6 < ratio < 0.66


@every_graph
def test_a_row_is_no_wider_than_what_is_alive_and_a_third(graph: LayerGraph) -> None:
    """The lower bound: the most bytes of a row that are alive while one operation runs."""
    workspace = plan_workspace(graph, 2)
    pairs = alive_together(graph)
    names = [name for name in graph.edges if name not in graph.selected_edges]
    needed = max(
        sum(bytes_of(graph.edges[edge], 2) for edge in clique)
        for size in range(1, 5)
        for clique in combinations(names, size)
        if all(frozenset(pair) in pairs for pair in combinations(clique, 2))
    )
    assert needed <= workspace.num_bytes(tokens=1, selected=0) <= 4 / 3 * needed + 3 * 64


def test_rows_that_are_written_in_part_keep_the_others() -> None:
    """Decodes are overwritten while the prefills that were written before are still to be read."""
    edges = {name: Edge(name, 64) for name in ("a", "b", "c", "d")}

    def decodes(source: str, target: str) -> Operation:
        return Operation(f"to_{target}", "linear", {"x": source}, {"out": target}, rows=Rows.DECODE)

    operations = (
        Operation("start", "linear", writes={"out": "a"}),
        *(decodes(*pair) for pair in ("ab", "bc", "cd", "da")),
        Operation("end", "linear", reads={"x": "a"}, writes={"out": "a"}),
    )
    graph = LayerGraph(edges=edges, prologue=operations, layers=(), epilogue=())
    places = plan_workspace(graph, 2).places
    assert frozenset({"a", "c"}) in alive_together(graph)
    assert not any(places["a"].overlaps(places[other]) for other in "bcd")


def test_a_row_of_whole_pages_is_made_a_line_longer() -> None:
    edge = Edge("x", 4096)
    graph = LayerGraph(
        edges={"x": edge},
        prologue=(Operation("to_x", "linear", writes={"out": "x"}),),
        layers=(),
        epilogue=(),
    )
    assert plan_workspace(graph, 2).buffers[0].row_bytes == 8192 + 64
    contiguous = replace(graph, edges={"x": replace(edge, contiguous=True)})
    workspace: Workspace = plan_workspace(contiguous, 2)
    assert workspace.buffers[0].row_bytes == 8192
    assert workspace.num_bytes(tokens=3, selected=0) == 3 * 8192

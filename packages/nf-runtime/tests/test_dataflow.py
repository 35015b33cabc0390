"""Flows of data between operations, beside what walking over single rows finds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nf_runtime.dataflow import Flow, Step, flows, steps
from nf_runtime.graph import BatchInput, Edge, LayerGraph, Operation, Rows
from nf_runtime.model_config import ConfigReader
from nf_runtime.models import FAMILIES, decoder_graph

CACHES = frozenset({BatchInput.K_CACHE, BatchInput.V_CACHE})
SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}


Place = tuple[int, str]


def graph_of(architecture: str) -> LayerGraph:
    reader = ConfigReader(SMALL | {"architectures": [architecture]}, Path("config.json"))
    return decoder_graph(FAMILIES[architecture].read_config(reader, {}))


def place(step: Step) -> Place:
    return step.layer, step.operation.name


def by_rows(graph: LayerGraph) -> set[tuple[Place, Place, str]]:
    """The same, by remembering who wrote a row: one that decodes, and one that does not."""
    rows_of = {Rows.DECODE: "d", Rows.PREFILL: "p", Rows.ALL: "dp", Rows.SELECTED: "dp"}
    last: dict[tuple[str, str], Place] = {}
    found = set()
    for step in steps(graph):
        operation, here = step.operation, place(step)
        for edge in operation.reads.values():
            rows = Rows.ALL if edge in operation.reads_all_rows else operation.rows
            found |= {(last[edge, r], here, edge) for r in rows_of[rows] if (edge, r) in last}
        for part in CACHES & set(operation.inputs.values()):
            cache = f"{part.value} {step.layer}"
            if part in operation.updates:
                last[cache, "all"] = here
            elif (cache, "all") in last:
                found.add((last[cache, "all"], here, part.value))
        for edge in operation.writes.values():
            last |= {(edge, r): here for r in rows_of[operation.rows]}
    return found


def as_set(found: list[Flow]) -> set[tuple[Place, Place, str]]:
    result = {(place(f.source), place(f.target), f.data) for f in found}
    assert len(result) == len(found)
    return result


def test_flows_of_every_family() -> None:
    for architecture in FAMILIES:
        graph = graph_of(architecture)
        found = flows(graph)
        assert as_set(found) == by_rows(graph)
        # Whatever is read has a writer, and what leaves a layer is read in the next one.
        for step in steps(graph):
            read = set(step.operation.reads.values())
            assert read <= {flow.data for flow in found if place(flow.target) == place(step)}
        crossing = {(f.source.layer, f.target.layer) for f in found} - {(i, i) for i in range(4)}
        assert crossing == {(i, i + 1) for i in range(-1, 3)}


def test_decodes_and_prefills_join_and_read_their_layers_cache() -> None:
    found = flows(graph_of("LlamaForCausalLM"))

    def sources(layer: int, name: str) -> set[tuple[int, str, str]]:
        return {
            (f.source.layer, f.source.operation.name, f.data)
            for f in found
            if (f.target.layer, f.target.operation.name) == (layer, name)
        }

    assert sources(1, "output_proj") == {
        (1, "decode_attention", "attended"),
        (1, "prefill_attention", "attended"),
        (0, "down_proj", "hidden"),
    }
    assert sources(1, "decode_attention") == {
        (1, "rope_append", "query"),
        (1, "rope_append", "k_cache"),
        (1, "rope_append", "v_cache"),
    }


EDGES = ("a", "b", "c")
operations = st.builds(
    lambda reads, writes, rows, whole, kv: Operation(
        "",
        "linear",
        reads={edge: edge for edge in reads},
        writes={edge: edge for edge in writes},
        inputs={part.value: part for part in CACHES} if kv else {},
        updates=CACHES if kv == "append" else frozenset(),
        rows=rows,
        reads_all_rows=frozenset(reads) if whole else frozenset(),
    ),
    st.sets(st.sampled_from(EDGES)),
    st.sets(st.sampled_from(EDGES)),
    st.sampled_from([Rows.ALL, Rows.DECODE, Rows.PREFILL]),
    st.booleans(),
    st.sampled_from(["", "", "read", "append"]),
)


@given(st.lists(st.lists(operations, max_size=5), max_size=4))
def test_flows_of_any_graph(layers: list[list[Operation]]) -> None:
    start = Operation("start", "embedding", writes={edge: edge for edge in EDGES})
    graph = LayerGraph(
        edges={name: Edge(name, 8) for name in EDGES},
        prologue=(start,),
        layers=tuple(
            tuple(replace(operation, name=f"o{i}") for i, operation in enumerate(layer))
            for layer in layers
        ),
        epilogue=(),
    )
    assert as_set(flows(graph)) == by_rows(graph)

"""What iterations ask of a device, added up by hand; and what that is of its peaks."""

import numpy as np
import pytest
from pipeline_graphs import MODELS, small_config, small_graph, with_collectives

from nf_kernels.cost import Cost
from nf_runtime.graph import LayerGraph
from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import Division, divide
from nf_runtime.pipeline.node_cost import NodeCosts
from nf_runtime.pipeline.plan import DevicePeaks
from nf_runtime.pipeline.schedule import Schedule
from nf_runtime.pipeline.templates import TEMPLATES
from nf_runtime.pipeline.utilisation import Utilisation

DECODES, PREFILL = 6, 10
TOKENS, SELECTED = DECODES + PREFILL, DECODES + 1
CONTEXTS = np.array([30, 40, 50, 60, 70, 80, 20])


def costs_of(graph: LayerGraph, model: str, ranks: int = 1) -> NodeCosts:
    config = small_config(model)
    return NodeCosts(
        graph,
        head_dim=config.head_dim,
        element_bytes=4,
        experts=config.experts,
        expert_features=config.expert_intermediate_size,
        ranks=ranks,
    )


def iteration(graph: LayerGraph, plan: str) -> tuple[Schedule, Division]:
    built = TEMPLATES[plan](graph)
    division = divide(built.nano_batches, DECODES, np.array([PREFILL]), selected=SELECTED)
    return compile_plan(graph, built, division.structure), division


def test_the_flops_of_a_dense_model_by_hand() -> None:
    graph, config = small_graph("dense"), small_config("dense")
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    schedule, division = iteration(graph, "sequential")
    work = costs_of(graph, "dense").total(schedule, division, CONTEXTS)
    weights = hidden * head * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    products = 2 * TOKENS * weights * config.num_layers
    products += 2 * SELECTED * hidden * config.vocab_size
    # A query sees its context and itself; each token seen is two products of a head.
    seen = sum(CONTEXTS[:DECODES] + 1) + sum(20 + 1 + i for i in range(PREFILL))
    attention = 4 * int(seen) * heads * head * config.num_layers
    # What is neither (norms, rotation, activation, softmax) is little beside.
    assert products + attention < work.flops < 1.1 * (products + attention)
    assert work.bytes_moved > 4 * weights * config.num_layers
    assert work.bytes_sent == 0


@pytest.mark.parametrize("plan", ["sequential", "nanoflow", "co-resident"])
@pytest.mark.parametrize("model", list(MODELS))
def test_layers_alike_are_counted_as_often_as_they_are(model: str, plan: str) -> None:
    graph = small_graph(model)
    schedule, division = iteration(graph, plan)
    costs = costs_of(graph, model)
    one_by_one = Cost(0, 0, 0)
    for number in range(len(schedule.nodes)):
        one_by_one += costs.of(schedule.node(number), division, CONTEXTS)
    assert costs.total(schedule, division, CONTEXTS) == one_by_one
    assert one_by_one.flops > 0


def test_parts_of_the_peaks() -> None:
    graph = with_collectives(small_graph("dense"))
    schedule, division = iteration(graph, "sequential")
    costs = costs_of(graph, "dense", ranks=2)
    work = costs.total(schedule, division, CONTEXTS)
    # Two sums a layer, of which a rank of two sends as much as they have.
    assert work.bytes_sent == 3 * 2 * TOKENS * 32 * 4
    peaks = DevicePeaks(
        flops_per_second=work.flops, bytes_per_second=2 * work.bytes_moved, sent_per_second=1e6
    )
    used = Utilisation(costs, peaks).of(schedule, division, CONTEXTS, 0.5)
    assert used["flops_per_second"] == 2 * work.flops
    assert (used["compute"], used["memory"]) == (2.0, 1.0)
    assert used["network"] == pytest.approx(work.bytes_sent / 0.5 / 1e6)


def test_without_peaks_there_are_rates_alone() -> None:
    graph = small_graph("dense")
    schedule, division = iteration(graph, "nanoflow")
    used = Utilisation(costs_of(graph, "dense"), None).of(schedule, division, CONTEXTS, 1.0)
    assert set(used) == {"flops_per_second", "bytes_per_second"}

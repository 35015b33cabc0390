"""Plans that do not fit a model are refused, and the message says what to change."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from pipeline_graphs import MODELS, small_graph

from nf_runtime.graph import LayerGraph
from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import divide, strictest_structure
from nf_runtime.pipeline.plan import Lane, NanoBatch, NanoOperation, Plan, PlanError
from nf_runtime.pipeline.templates import TEMPLATES, sequential, two_batch

GRAPH = small_graph("dense")
NAMES = [operation.name for operation in GRAPH.layers[0]]
LANES = (Lane(name="first", share=0.5), Lane(name="second", share=0.5))


def plan_of(operations: Sequence[NanoOperation], nano_batches: int = 1) -> Plan:
    return Plan(
        name="mine",
        nano_batches=(NanoBatch(),) * nano_batches,
        lanes=LANES,
        operations=tuple(operations),
    )


def on(lane: str, names: Sequence[str], **values: object) -> list[NanoOperation]:
    return [NanoOperation.model_validate({"operation": n, "lane": lane} | values) for n in names]


def refuse(plan: Plan, message: str, graph: LayerGraph = GRAPH) -> None:
    division = divide(plan.nano_batches, 4, np.array([9, 5]), selected=4)
    for notices in (False, True):
        with pytest.raises(PlanError, match=re.escape(message)):
            compile_plan(graph, plan, division.structure, notices=notices)


def test_an_unknown_operation() -> None:
    refuse(
        plan_of([*on("first", NAMES), *on("first", ["router"])]),
        "plan 'mine' has the operation 'router', which no layer has; they have input_norm, "
        f"{', '.join(NAMES[1:])}",
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_that_is_missing(name: str) -> None:
    refuse(
        plan_of(on("first", [other for other in NAMES if other != name])),
        f"plan 'mine' has operation {name!r} on nano-batches []; expected each of [0] once",
    )


def test_a_nano_batch_that_is_missing() -> None:
    operations = on("first", NAMES, nano_batches=(0, 1))
    operations[1] = operations[1].model_copy(update={"nano_batches": (1,)})
    refuse(
        plan_of(operations, nano_batches=2),
        "plan 'mine' has operation 'qkv_proj' on nano-batches [1]; expected each of [0, 1] once",
    )


def test_an_operation_that_is_there_twice() -> None:
    refuse(
        plan_of([*on("first", NAMES), *on("second", ["swiglu"])]),
        "plan 'mine' has operation 'swiglu' on nano-batches [0, 0]; expected each of [0] once",
    )
    overlapping = on("first", NAMES, nano_batches=(0, 1))
    refuse(
        plan_of([*overlapping, *on("second", ["swiglu"], nano_batches=(1,))], nano_batches=2),
        "plan 'mine' has operation 'swiglu' on nano-batches [0, 1, 1]; expected each of [0, 1]",
    )


def swap(first: str, second: str) -> list[str]:
    other = {first: second, second: first}
    return [other.get(name, name) for name in NAMES]


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ("input_norm", "qkv_proj", "the first reads 'normed', which the second writes"),
        ("qkv_proj", "rope_append", "the first reads 'qkv', which the second writes"),
        ("swiglu", "down_proj", "the first reads 'activated', which the second writes"),
    ],
)
def test_an_operation_before_the_one_that_it_reads(first: str, second: str, why: str) -> None:
    refuse(
        plan_of(on("first", swap(first, second))),
        f"plan 'mine': on lane 'first' {second}:0 of layer 0 comes before {first}:0 of layer 0, "
        f"but {why}; change the order of operations",
    )


def test_attention_before_the_keys_of_the_nano_batch_before() -> None:
    """The second nano-batch, with the rest of the first's prompt, comes first."""
    operations = [*on("first", NAMES, nano_batches=(1,)), *on("first", NAMES, nano_batches=(0,))]
    refuse(
        plan_of(operations, nano_batches=2),
        "plan 'mine': on lane 'first' prefill_attention:1 of layer 0 comes before rope_append:0 of "
        "layer 0, but the first attends to keys and values that the second appends; change the "
        "order of operations",
    )


def test_a_plan_that_only_some_batches_could_not_be_run_by_is_refused_before_any_is() -> None:
    """It is legal for batches whose prompts are never cut, and refused for what may come."""
    operations = [*on("first", NAMES, nano_batches=(1,)), *on("first", NAMES, nano_batches=(0,))]
    plan = plan_of(operations, nano_batches=2)
    compile_plan(GRAPH, plan, divide(plan.nano_batches, 8, np.array([8]), selected=1).structure)
    with pytest.raises(PlanError, match="prefill_attention:1 of layer 0 comes before rope_append"):
        compile_plan(GRAPH, plan, strictest_structure(plan.nano_batches))


def test_a_layer_too_far_behind() -> None:
    behind = [
        o.model_copy(update={"layers_behind": int(o.operation == "down_proj")})
        for o in on("first", NAMES)
    ]
    refuse(
        plan_of(behind),
        "plan 'mine': on lane 'first' input_norm:0 of layer 1 comes before down_proj:0 of layer 0, "
        "but the first reads 'hidden', which the second writes; change the order of operations",
    )


def test_lanes_that_wait_for_each_other() -> None:
    first, second = NAMES[:6], NAMES[6:]  # attention, feed-forward
    operations = [
        *on("first", second, nano_batches=(0,)),
        *on("first", first, nano_batches=(1,)),
        *on("second", second, nano_batches=(1,)),
        *on("second", first, nano_batches=(0,)),
    ]
    refuse(
        plan_of(operations, nano_batches=2),
        "plan 'mine': lanes wait for each other: post_attention_norm:0 of layer 0 needs "
        "output_proj:0 of layer 0, the first reads 'hidden', which the second writes; "
        "post_attention_norm:1 of layer 0 needs output_proj:1 of layer 0, the first reads "
        "'hidden', which the second writes; and each of these comes behind the one before on its "
        "lane: change the order of operations",
    )


def with_starts(*pairs: tuple[int, str]) -> Callable[[int, NanoOperation], NanoOperation]:
    wanted = dict(pairs)
    return lambda place, operation: operation.model_copy(
        update={"after_start": (wanted[place],)} if place in wanted else {}
    )


def test_starts_in_a_circle() -> None:
    both = [*on("first", NAMES, nano_batches=(0,)), *on("second", NAMES, nano_batches=(1,))]
    change = with_starts((0, "qkv_proj:1"), (len(NAMES), "qkv_proj:0"))
    refuse(
        plan_of([change(i, operation) for i, operation in enumerate(both)], nano_batches=2),
        "plan 'mine': lanes wait for each other: input_norm:0 of layer 0 needs qkv_proj:1 of layer "
        "0, the first has the second in after_start; input_norm:1 of layer 0 needs qkv_proj:0 of "
        "layer 0, the first has the second in after_start; and each of these comes behind",
    )


def test_a_start_of_what_comes_later_on_the_lane() -> None:
    change = with_starts((2, "swiglu:0"))
    refuse(
        plan_of([change(i, operation) for i, operation in enumerate(on("first", NAMES))]),
        "plan 'mine': on lane 'first' rope_append:0 of layer 0 comes before swiglu:0 of layer 0, "
        "but the first has the second in after_start; change the order of operations",
    )


@pytest.mark.parametrize("model", MODELS)
def test_two_batch_without_collectives(model: str) -> None:
    with pytest.raises(
        PlanError,
        match="plan 'two-batch' overlaps collectives with the rest, and one rank has none; set "
        "tensor_parallel_size to 2 or more, or choose another plan",
    ):
        two_batch(small_graph(model))


@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - {"two-batch"}))
def test_a_plan_of_another_family(template: str) -> None:
    refuse(
        TEMPLATES[template](small_graph("experts")),
        f"plan {template!r} has the operation 'router', which no layer has",
    )


def test_a_plan_that_lists_nothing() -> None:
    plan = sequential(GRAPH).model_copy(update={"operations": ()})
    refuse(plan, "plan 'sequential' has operation 'input_norm' on nano-batches []")

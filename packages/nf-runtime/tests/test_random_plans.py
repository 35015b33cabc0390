"""Random plans are worth running: they differ, have lanes, and lanes that wait for each other."""

from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings
from pipeline_graphs import small_graph, waits_of
from random_plans import RandomBatch, batches, legal_plans

from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import divide
from nf_runtime.pipeline.plan import Plan

GRAPH = small_graph("mixed")


def test_many_random_plans_have_lanes_and_nano_batches_that_wait_for_each_other() -> None:
    seen: Counter[str] = Counter()

    @seed(0)
    @settings(
        deadline=None,
        max_examples=150,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(legal_plans(GRAPH), batches())
    def draw(plan: Plan, batch: RandomBatch) -> None:
        division = divide(
            plan.nano_batches, batch.num_decodes, batch.prefills, selected=batch.selected
        )
        schedule = compile_plan(GRAPH, plan, division.structure)
        lanes = {operation.lane for operation in plan.operations}
        seen["all"] += 1
        seen["lanes"] += len(lanes) > 1
        seen["nano-batches"] += len(plan.nano_batches) > 1
        seen["waits"] += len(waits_of(schedule)) > 2
        seen["behind"] += any(operation.layers_behind for operation in plan.operations)
        seen["starts"] += any(operation.after_start for operation in plan.operations)
        seen["groups"] += len({operation.nano_batches for operation in plan.operations}) > 2
        seen["empty"] += division.num_occupied < len(plan.nano_batches)
        seen["cut"] += division.structure.context_from != tuple(range(len(plan.nano_batches)))
        seen["by phase"] += plan.nano_batches[0].phase != "all"
        seen["one batch"] += len(plan.nano_batches) == 1

    draw()
    assert seen["all"] == 150
    for what in ("lanes", "nano-batches", "waits"):
        assert seen[what] > 75, (what, seen)
    for what in ("behind", "starts", "groups"):
        assert seen[what] > 40, (what, seen)
    for what in ("empty", "cut", "by phase", "one batch"):
        assert seen[what] > 10, (what, seen)

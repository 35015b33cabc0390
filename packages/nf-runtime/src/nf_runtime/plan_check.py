"""Whether a plan can be run here, before a batch asks for it."""

from nf_kernels.cost import Category
from nf_runtime.bound_graph import BoundGraph
from nf_runtime.pipeline.division import strictest_structure
from nf_runtime.pipeline.plan import Plan, PlanError
from nf_runtime.pipeline.schedules import Schedules


def check_plan(plan: Plan, schedules: Schedules, bound: BoundGraph) -> None:
    """Compile a plan for the strictest batches, and look for what it asks of operations.

    Args:
        plan: Of the model.
        schedules: Compile it.
        bound: Has the implementations.

    Raises:
        PlanError: It is not legal, there is no such implementation, or it has collectives on more
            than one lane: in which order they come there, each rank would find out alone.
    """
    schedule = schedules.get(plan, strictest_structure(plan.nano_batches), notices=False)
    networked = set()
    for number in range(len(schedule.nodes)):
        node = schedule.node(number)
        bound.function(node.operation, node.implementation)
        is_in_layer = 0 <= node.layer < len(schedule.graph.layers)
        if is_in_layer and node.operation.category is Category.NETWORK:
            networked.add(plan.lane_names[node.lane])
    if len(networked) > 1:
        raise PlanError(
            f"plan {plan.name!r} has collectives on the lanes {', '.join(sorted(networked))}; "
            f"expected one lane, on which all ranks do them in the same order"
        )

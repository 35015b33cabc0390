"""Where a plan lists each operation of a graph's layers. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from nf_runtime.graph import LayerGraph
from nf_runtime.pipeline.plan import Plan, PlanError


@dataclass(frozen=True, slots=True)
class Placement:
    """One of a plan's nano-operations.

    Attributes:
        number: In `plan.operations`; -1 for what the plan does not list.
        first: Its first nano-batch.
        end: The one behind its last.
        lane: Number of its lane.
    """

    number: int
    first: int
    end: int
    lane: int


def find_placements(graph: LayerGraph, plan: Plan) -> dict[str, list[Placement]]:
    """Where the plan lists each operation of the layers: by its name, by nano-batch.

    Raises:
        PlanError: It lists one that there is not, or not every nano-batch of one exactly once.
    """
    found: defaultdict[str, list[Placement]] = defaultdict(list)
    lanes = plan.lane_names
    for number, listed in enumerate(plan.operations):
        first, last = listed.nano_batches[0], listed.nano_batches[-1]
        found[listed.operation].append(Placement(number, first, last + 1, lanes.index(listed.lane)))
    names = list(dict.fromkeys(operation.name for layer in graph.layers for operation in layer))
    if unknown := [name for name in found if name not in names]:
        raise PlanError(
            f"plan {plan.name!r} has the operation {unknown[0]!r}, which no layer has; "
            f"they have {', '.join(names)}"
        )
    count = len(plan.nano_batches)
    for name in names:
        placements = sorted(found[name], key=lambda placement: (placement.first, placement.end))
        covered = [i for placement in placements for i in range(placement.first, placement.end)]
        if covered != list(range(count)):
            raise PlanError(
                f"plan {plan.name!r} has operation {name!r} on nano-batches {covered}; expected "
                f"each of {list(range(count))} once"
            )
        found[name] = placements
    return found

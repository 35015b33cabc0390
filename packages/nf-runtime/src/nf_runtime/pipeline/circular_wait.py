"""Why the lanes of a plan wait for each other, in words. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nf_runtime.pipeline.dependency_graph import DependencyGraph
from nf_runtime.pipeline.plan import PlanError


def circular_wait(
    dependencies: DependencyGraph, heads: Mapping[int, int], done: Sequence[bool]
) -> PlanError:
    """The error of a plan in which no lane can go on.

    Args:
        dependencies: The nodes.
        heads: The next node of each lane that has one.
        done: Which nodes have run.
    """
    nodes, plan = dependencies.nodes, dependencies.plan
    lane = next(iter(heads))
    path: list[tuple[int, int]] = []  # a node, and one that it needs
    seen: list[int] = []
    while lane not in seen:
        seen.append(lane)
        node = nodes[heads[lane]]
        needs = (*node.needs, *node.starts_after)
        needed = max(other for other in needs if not done[other])  # its input rather than memory
        path.append((heads[lane], needed))
        lane = nodes[needed].lane
    path = path[seen.index(lane) :]
    start = path.index(min(path))
    path = path[start:] + path[:start]
    if len(path) == 1:
        ((waiting, needed),) = path
        return PlanError(
            f"plan {plan.name!r}: on lane {plan.lane_names[lane]!r} {dependencies.name(waiting)} "
            f"comes before {dependencies.name(needed)}, but "
            f"{_reason(dependencies, waiting, needed)}; change the order of operations"
        )
    reasons = [
        f"{dependencies.name(waiting)} needs {dependencies.name(needed)}, "
        f"{_reason(dependencies, waiting, needed)}"
        for waiting, needed in path
    ]
    return PlanError(
        f"plan {plan.name!r}: lanes wait for each other: {'; '.join(reasons)}; and each "
        "of these comes behind the one before on its lane: change the order of operations"
    )


def _reason(dependencies: DependencyGraph, waiting: int, needed: int) -> str:
    """What makes one node, the first, depend on another, the second."""
    first, second = dependencies.nodes[waiting], dependencies.nodes[needed]
    if needed not in first.needs:
        return "the first has the second in after_start"
    read = [
        edge
        for edge, whole in first.access.reads
        if edge in second.access.writes and (whole or first.cells & second.cells)
    ]
    if read:
        return f"the first reads {read[0]!r}, which the second writes"
    if first.access.reads_cache and second.access.writes_cache:
        return "the first attends to keys and values that the second appends"
    return "the first writes to memory that the second still uses"

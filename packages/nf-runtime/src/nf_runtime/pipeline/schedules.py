"""Compiled schedules, kept for batches alike. Torch-free."""

from __future__ import annotations

from collections import OrderedDict

from nf_runtime.graph import LayerGraph
from nf_runtime.pipeline.compiler import compile_plan
from nf_runtime.pipeline.division import Structure
from nf_runtime.pipeline.plan import Plan
from nf_runtime.pipeline.schedule import Schedule
from nf_runtime.pipeline.workspace import Workspace

_MOST = 256  # structures of batches, over all plans


class Schedules:
    """What was compiled, the least recently used given up first.

    Args:
        graph: The model.
        workspace: Where its edges are.

    Attributes:
        compiled: How many schedules were compiled; grows.
    """

    def __init__(self, graph: LayerGraph, workspace: Workspace) -> None:
        self.compiled = 0
        self._graph = graph
        self._workspace = workspace
        self._kept: OrderedDict[tuple[int, Structure, bool], tuple[Plan, Schedule]] = OrderedDict()

    def get(self, plan: Plan, structure: Structure, *, notices: bool) -> Schedule:
        """The schedule of a plan for batches of a structure; as `compile_plan`.

        Raises:
            PlanError: The plan is not legal.
        """
        key = id(plan), structure, notices  # a plan is long to compare; it is kept, so is its id
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][1]
        schedule = compile_plan(
            self._graph, plan, structure, workspace=self._workspace, notices=notices
        )
        self.compiled += 1
        self._kept[key] = plan, schedule
        if len(self._kept) > _MOST:
            self._kept.popitem(last=False)
        return schedule

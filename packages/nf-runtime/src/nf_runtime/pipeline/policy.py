"""Which plan a batch is run by, and why. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from nf_runtime.graph import LayerGraph
from nf_runtime.pipeline.plan import (
    Bucket,
    Plan,
    PlanError,
    PlanSet,
    for_all_batches,
    read_plan_set,
)
from nf_runtime.pipeline.templates import TEMPLATES, sequential
from nf_scheduler import TokenBudget


class Reason(StrEnum):
    """Why an iteration ran by the plan by which it ran."""

    PLANNED = "planned"  # its bucket has the plan
    OFF = "off"  # overlap is switched off
    NO_PLAN = "no_plan"  # there is no plan set for this model on this device
    NO_BUCKET = "no_bucket"  # no bucket of the plan set holds the batch
    NO_GAIN = "no_gain"  # its bucket's plan was not measured to be faster
    ONE_NANO_BATCH = "one_nano_batch"  # cut by its plan, the batch is in one piece
    REFERENCE = "reference"  # run so to measure what overlap gains
    HOOKS = "hooks"  # somebody looks at each layer


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan of an iteration.

    Attributes:
        plan: By which it runs.
        reason: Why.
    """

    plan: Plan
    reason: Reason


class OverlapPolicy:
    """Chooses a plan for every batch.

    Args:
        graph: The model.
        plan_set: Plans by bucket; None runs everything sequentially.
        reason: Why there is none.
        only_gains: Whether plans that were not measured to be faster are left alone.
    """

    def __init__(
        self,
        graph: LayerGraph,
        plan_set: PlanSet | None = None,
        *,
        reason: Reason = Reason.OFF,
        only_gains: bool = False,
    ) -> None:
        self.plan_set = plan_set
        self.sequential = sequential(graph)
        self._graph = graph
        self._without = reason
        self._only_gains = only_gains

    def describe(self, overlap: str) -> str:
        """What runs by which plans, in a line.

        Args:
            overlap: What it was made for, as `EngineConfig.overlap`.
        """
        if self.plan_set is None and self._without is Reason.NO_PLAN:
            return (
                f"{overlap}, no plans measured for this model on this device: sequential "
                "(nanoflow plan measure)"
            )
        if self.plan_set is None:
            return f"{overlap}: sequential"
        counts: dict[str, int] = {}
        for bucket in self.plan_set.buckets:
            plan = self.plan_set.plan(bucket.plan)
            if not plan.is_sequential and not self._is_no_gain(bucket):
                counts[plan.name] = counts.get(plan.name, 0) + 1
        total = len(self.plan_set.buckets)
        if not counts:
            slower = ", no plan was measured to be faster" if self._only_gains else ""
            return f"{overlap}{slower}: sequential"
        if total == 1:
            (name,) = counts
            return overlap if name == overlap else f"{overlap}, plan {name}"
        plans = ", ".join(f"{name} for {count}" for name, count in counts.items())
        return f"{overlap}, of {total} kinds of batches {plans}; else sequential"

    def budgets(self, most: int) -> tuple[TokenBudget, ...]:
        """Tokens of a batch by number of decodes, as the buckets say.

        Args:
            most: Tokens that any batch may have.
        """
        found: dict[int, TokenBudget] = {}
        for bucket in self.plan_set.buckets if self.plan_set is not None else ():
            if bucket.token_budget is None or self._is_no_gain(bucket):
                continue
            tokens = min(bucket.token_budget, most)
            decodes = max(1, int(bucket.decode_share[1] * tokens))
            chunk = min(bucket.prefill_chunk or tokens, tokens)
            found.setdefault(decodes, TokenBudget(decodes, tokens, chunk))
        return tuple(found[decodes] for decodes in sorted(found))

    def lanes_of(self, kind: str) -> frozenset[int]:
        """Numbers of the lanes (as in `Plan.lane_names`) on which plans run operations of a kind.

        Args:
            kind: Of operations of the layers.
        """
        names = {
            operation.name
            for layer in self._graph.layers
            for operation in layer
            if operation.kind == kind
        }
        plans = self.plan_set.plans if self.plan_set is not None else ()
        return frozenset(
            plan.lane_names.index(listed.lane)
            for plan in (self.sequential, *plans)
            for listed in plan.operations
            if listed.operation in names
        )

    def choose(self, tokens: int, decodes: int) -> Choice:
        """The plan of a batch.

        Args:
            tokens: Of the batch.
            decodes: So many of them.
        """
        if self.plan_set is None:
            return Choice(self.sequential, self._without)
        bucket = self.plan_set.find(tokens, decodes)
        if bucket is None:
            return Choice(self.sequential, Reason.NO_BUCKET)
        plan = self.plan_set.plan(bucket.plan)
        if plan.is_sequential:
            return Choice(plan, Reason.PLANNED)
        if self._is_no_gain(bucket):
            return Choice(self.sequential, Reason.NO_GAIN)
        return Choice(plan, Reason.PLANNED)

    def _is_no_gain(self, bucket: Bucket) -> bool:
        """Whether a bucket's plan is left alone."""
        return self._only_gains and (bucket.gain is None or bucket.gain <= 1)


OVERLAP_WORDS = ("auto", "off", *(name for name in TEMPLATES if name != "sequential"))
"""What `overlap` may say besides the name of a file."""


def make_policy(
    overlap: str, graph: LayerGraph, *, measured: PlanSet | None = None
) -> OverlapPolicy:
    """The policy that a word or a file asks for.

    Args:
        overlap: `auto`, `off`, the name of a template, or the path of a plan or plan set.
        graph: The model.
        measured: What was measured for this model on this device, for `auto`.

    Raises:
        PlanError: It is none of these, or the plan does not fit the model.
    """
    if overlap == "off" or overlap == "sequential":
        return OverlapPolicy(graph)
    if overlap == "auto":
        return OverlapPolicy(graph, measured, reason=Reason.NO_PLAN, only_gains=True)
    if overlap in TEMPLATES:
        return OverlapPolicy(graph, for_all_batches(TEMPLATES[overlap](graph)))
    try:
        path = Path(overlap).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError):  # too long for a file, or of a user that there is not
        is_there = False
    if not is_there:
        words = ", ".join(OVERLAP_WORDS)
        raise PlanError(
            f"overlap is {overlap!r}, which is no file; expected one of {words}, or the path of a "
            "plan or plan set"
        )
    return OverlapPolicy(graph, read_plan_set(path))

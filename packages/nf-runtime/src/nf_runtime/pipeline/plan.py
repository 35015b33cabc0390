"""Plans: which nano-operation runs on which lane, in which order. Data, as JSON. Torch-free."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nf_runtime.errors import NanoFlowError

WHOLE_DEVICE = "device"
"""The lane that has all units: what comes before and after the layers runs there."""

MAX_NANO_BATCHES = 16
_NAME = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][\w.-]*$")]
_SHARE = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class PlanError(NanoFlowError):
    """A plan, or a file of plans, is not legal."""


class Phase(StrEnum):
    """Which tokens of the batch a nano-batch is cut from."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"


class Partition(StrEnum):
    """How lanes divide the device."""

    EXCLUSIVE = "exclusive"  # each has units of its own
    CAPPED = "capped"  # kernels that can keep to a number of units; on a CPU as `exclusive`
    SHARED = "shared"  # all have all units, and the device divides them


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NanoBatch(_Part):
    """A contiguous range of the batch's tokens.

    Attributes:
        share: Its part of the tokens of its phase, beside the shares of the others.
        phase: What it is cut from. Either all nano-batches of a plan are cut from `all`, or each
            from decodes or prefills, decodes first.
    """

    share: _SHARE = 1.0
    phase: Phase = Phase.ALL


class Lane(_Part):
    """A share of the device's units with a queue of its own.

    Attributes:
        name: Unique in its plan; `device` is the lane of the whole device, which every plan has.
        share: Of the units, beside the shares of the other lanes.
    """

    name: _NAME
    share: _SHARE


class NanoOperation(_Part):
    """An operation of every layer on some nano-batches that follow each other.

    Attributes:
        operation: Name of the operation in the graph; layers that have none of the name skip it.
        nano_batches: Numbers, ascending and without gaps.
        lane: Where it runs.
        implementation: One of `OperationSet.implementations`; None is the set's own.
        layers_behind: In a lane's list, which is repeated for every layer, this is the operation of
            so many layers before.
        after_start: Names (`operation:first nano-batch`) of nano-operations of the same place in
            the list that must have started before this one does.
    """

    operation: _NAME
    nano_batches: tuple[Annotated[int, Field(ge=0, lt=MAX_NANO_BATCHES)], ...] = (0,)
    lane: _NAME = WHOLE_DEVICE
    implementation: _NAME | None = None
    layers_behind: Annotated[int, Field(ge=0, le=8)] = 0
    after_start: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What tells it from the others of its plan."""
        return f"{self.operation}:{self.nano_batches[0]}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        numbers = self.nano_batches
        if not numbers or numbers != tuple(range(numbers[0], numbers[0] + len(numbers))):
            raise ValueError(
                f"nano_batches of {self.operation!r} is {list(numbers)}; expected at least one "
                "number, ascending and without gaps"
            )
        return self


class Plan(_Part):
    """How one layer after the other is run.

    Attributes:
        name: For people, metrics and plan sets.
        nano_batches: The cuts; the first has the first tokens.
        lanes: Besides `device`.
        partition: How they divide the device.
        operations: The nano-operations of a layer. Those of one lane run in this order, layer by
            layer. What comes before and after the layers is not listed: it runs on `device`.
        schema_version: Of this format.
    """

    schema_version: Literal[1] = 1
    name: _NAME
    nano_batches: Annotated[tuple[NanoBatch, ...], Field(min_length=1, max_length=MAX_NANO_BATCHES)]
    lanes: tuple[Lane, ...] = ()
    partition: Partition = Partition.EXCLUSIVE
    operations: tuple[NanoOperation, ...]

    @property
    def lane_names(self) -> tuple[str, ...]:
        """All lanes, `device` first."""
        return (WHOLE_DEVICE, *(lane.name for lane in self.lanes))

    @property
    def is_sequential(self) -> bool:
        """Whether one operation runs after the other, each on the whole batch."""
        return len(self.nano_batches) == 1 and not self.lanes

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = self.lane_names
        if len(set(names)) != len(names):
            raise ValueError(
                f"lanes are named {list(names[1:])}; expected different names, and none "
                f"{WHOLE_DEVICE!r}"
            )
        phases = [nano_batch.phase for nano_batch in self.nano_batches]
        order = {Phase.ALL: 0, Phase.DECODE: 1, Phase.PREFILL: 2}
        mixed = Phase.ALL in phases and len(set(phases)) > 1
        halves = Phase.ALL not in phases and len(set(phases)) == 1
        if mixed or halves or phases != sorted(phases, key=order.__getitem__):
            raise ValueError(
                f"nano_batches have the phases {[str(phase) for phase in phases]}; expected 'all' "
                "for each, or some of 'decode' and then some of 'prefill'"
            )
        seen: set[str] = set()
        for operation in self.operations:
            if operation.lane not in names:
                raise ValueError(
                    f"{operation.name} is on lane {operation.lane!r}; expected one of {list(names)}"
                )
            if operation.nano_batches[-1] >= len(phases):
                raise ValueError(
                    f"{operation.operation} is on nano-batches {list(operation.nano_batches)}; "
                    f"the plan has {len(phases)}, counted from 0"
                )
            seen.add(operation.name)
        for operation in self.operations:
            if operation.name in operation.after_start:
                raise ValueError(
                    f"{operation.name} has itself in after_start; expected others that start first"
                )
            if unknown := sorted(set(operation.after_start) - seen):
                raise ValueError(
                    f"{operation.name} starts after {unknown}, which are none of the plan's "
                    "nano-operations; expected names such as 'qkv_proj:0'"
                )
        return self


class Bucket(_Part):
    """Batches that one plan is for.

    Attributes:
        tokens: Fewest and most tokens of the batch, both included.
        decode_share: Least and greatest part of them that are decodes, both included.
        plan: Name of the plan.
        token_budget: Tokens that a batch of so many decodes should have; None leaves it to the
            scheduler.
        prefill_chunk: Most prompt tokens of one request in it; likewise.
        gain: Measured time of the sequential plan by that of this one; None: not measured.
    """

    tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    decode_share: tuple[
        Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]
    ] = (
        0.0,
        1.0,
    )
    plan: _NAME
    token_budget: Annotated[int, Field(ge=1)] | None = None
    prefill_chunk: Annotated[int, Field(ge=1)] | None = None
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("tokens", "decode_share"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is [{low}, {high}]; expected the lower bound first")
        return self

    def holds(self, tokens: int, decodes: int) -> bool:
        """Whether a batch belongs here, of at least one token."""
        share = decodes / tokens
        return (
            self.tokens[0] <= tokens <= self.tokens[1]
            and self.decode_share[0] <= share <= self.decode_share[1]
        )


class DevicePeaks(_Part):
    """What a device can do at most, measured.

    Attributes:
        flops_per_second: Of a large product of matrices.
        bytes_per_second: Of reading weights for one row.
        sent_per_second: Bytes that a rank sends in a large sum over all ranks; 0 where there is one
            rank.
    """

    flops_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    bytes_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sent_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class PlanSet(_Part):
    """Plans by bucket, for one model on one device.

    Attributes:
        model: Fingerprint of the model's shapes (`model_fingerprint`); empty: any.
        device: Name of the device; empty: any.
        dtype: Such as `bfloat16`; empty: any.
        tensor_parallel_size: Ranks of a replica.
        plans: By name.
        buckets: The first that holds a batch says its plan; a batch that none holds runs
            sequentially.
        peaks: Of the device, measured beside the plans.
        schema_version: Of this format.
    """

    schema_version: Literal[1] = 1
    model: str = ""
    device: str = ""
    dtype: str = ""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    plans: tuple[Plan, ...]
    buckets: tuple[Bucket, ...]
    peaks: DevicePeaks | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [plan.name for plan in self.plans]
        if len(set(names)) != len(names):
            raise ValueError(f"plans are named {names}; expected different names")
        for bucket in self.buckets:
            if bucket.plan not in names:
                raise ValueError(f"a bucket has the plan {bucket.plan!r}; expected one of {names}")
        return self

    def find(self, tokens: int, decodes: int) -> Bucket | None:
        """The bucket of a batch, if it has one."""
        return next((bucket for bucket in self.buckets if bucket.holds(tokens, decodes)), None)

    def plan(self, name: str) -> Plan:
        """A plan by its name.

        Raises:
            PlanError: There is none of the name.
        """
        for plan in self.plans:
            if plan.name == name:
                return plan
        raise PlanError(f"plan is {name!r}; expected one of {[plan.name for plan in self.plans]}")

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # an engine may read now
        try:
            unfinished.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def read_plan_set(path: Path) -> PlanSet:
    """Read a plan set, or one plan, which then is for all batches.

    Raises:
        PlanError: The file cannot be read, or holds neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is no JSON: {error}; expected a plan or a plan set") from error
    is_set = isinstance(value, dict) and not value.keys().isdisjoint({"buckets", "plans"})
    try:
        if is_set:
            return PlanSet.model_validate(value)
        return for_all_batches(Plan.model_validate(value))
    except ValidationError as error:
        what = "plan set" if is_set else "plan"
        raise PlanError(f"{path} is no {what}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """Where the first problem is, its value where that is short, and how many more there are."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    value = first["input"]
    given = f" is {value!r:.80}" if isinstance(value, str | int | float | None) else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}{given}: {first['msg'].removeprefix('Value error, ')}{more}"


def for_all_batches(plan: Plan) -> PlanSet:
    """A plan set that runs every batch by one plan."""
    return PlanSet(plans=(plan,), buckets=(Bucket(tokens=(1, 1 << 30), plan=plan.name),))

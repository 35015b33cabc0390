"""`nanoflow plan show`: the lanes of a plan, and what each runs in which order."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf_server.commands.failure import fail

if TYPE_CHECKING:
    from nf_runtime.graph import LayerGraph
    from nf_runtime.pipeline.plan import NanoBatch, NanoOperation, Plan, PlanSet
    from nf_runtime.pipeline.schedule import Schedule

_ELEMENT_BYTES = 2  # decides where edges are, not who shares memory with whom


def show(source: str, engine_options: dict[str, Any], *, as_json: bool) -> int:
    """Print plans, once it is clear that the model can be run by them; the exit code.

    Args:
        source: Name of a template, or path of a plan or plan set.
        engine_options: Fields of `EngineConfig`. Of the model, config.json is all that is read.
        as_json: Print a plan or plan set as it is read from a file.
    """
    from nf_runtime import EngineConfig, NanoFlowError
    from nf_runtime.model_source import find_model
    from nf_runtime.models import decoder_graph, read_config
    from nf_runtime.pipeline.compiler import compile_plan
    from nf_runtime.pipeline.division import divide_typical, strictest_structure
    from nf_runtime.pipeline.workspace import plan_workspace

    try:
        config = EngineConfig(**engine_options)
        model = read_config(find_model(config.model, config_only=True))
        graph = decoder_graph(model, config.shard())
        found = _find(source, graph)
        workspace = plan_workspace(graph, _ELEMENT_BYTES)
        for plan in found.plans:  # refused here, if some batch could not be run by it
            structure = strictest_structure(plan.nano_batches)
            compile_plan(graph, plan, structure, workspace=workspace)
        schedules = [
            compile_plan(
                graph, plan, divide_typical(plan.nano_batches).structure, workspace=workspace
            )
            for plan in found.plans
        ]
    except NanoFlowError as error:
        fail(error)
    if as_json:
        alone = len(found.plans) == 1 and not found.model
        print((found.plans[0] if alone else found).model_dump_json(indent=1))
        return 0
    print("\n\n".join(_plan_text(schedule) for schedule in schedules))
    if found.model:
        print(_buckets_text(found))
    return 0


def _find(source: str, graph: LayerGraph) -> PlanSet:
    """The plans of a name or a file.

    Raises:
        PlanError: There are none, or they do not apply to the model.
    """
    from nf_runtime.pipeline.plan import PlanError, for_all_batches, read_plan_set
    from nf_runtime.pipeline.templates import TEMPLATES

    if source in TEMPLATES:
        return for_all_batches(TEMPLATES[source](graph))
    path = Path(source).expanduser()
    if not path.exists():
        raise PlanError(
            f"{source!r} is no file; expected one of {', '.join(TEMPLATES)}, or the path of a plan "
            "or plan set"
        )
    return read_plan_set(path)


def _plan_text(schedule: Schedule) -> str:
    from nf_runtime.pipeline.schedule import Code

    plan = schedule.plan
    cuts = ", ".join(
        f"{number}: {nano_batch.share:.0%} of {_PHASES[nano_batch.phase.value]}"
        for number, nano_batch in enumerate(_normalised(plan))
    )
    lines = [f"plan {plan.name}", f"  nano-batches  {cuts}"]
    if plan.lanes:
        lanes = ", ".join(f"{lane.name} {lane.share:.0%}" for lane in plan.lanes)
        lines.append(f"  lanes         {lanes}; {plan.partition.value}")
    waits = sum(int((commands[:, 0] == Code.WAIT).sum()) for commands in schedule.commands)
    lines.append(
        f"  an iteration  {len(schedule.nodes)} nano-operations, {waits} waits between lanes"
    )
    for name in plan.lane_names:
        listed = [operation for operation in plan.operations if operation.lane == name]
        if listed:
            names = ", ".join(_name(operation) for operation in listed)
            lines.append(f"  lane {name}, for every layer:")
            lines += textwrap.wrap(
                names, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
    return "\n".join(lines)


_PHASES = {"all": "all tokens", "decode": "the decodes", "prefill": "the prefill tokens"}


def _normalised(plan: Plan) -> list[NanoBatch]:
    """The nano-batches, with shares that add up to 1 in each phase."""
    totals: dict[str, float] = {}
    for nano_batch in plan.nano_batches:
        totals[nano_batch.phase] = totals.get(nano_batch.phase, 0.0) + nano_batch.share
    return [
        nano_batch.model_copy(update={"share": nano_batch.share / totals[nano_batch.phase]})
        for nano_batch in plan.nano_batches
    ]


def _name(operation: NanoOperation) -> str:
    """Operation and nano-batches, and what else is said of it."""
    first, last = operation.nano_batches[0], operation.nano_batches[-1]
    text = f"{operation.operation}:{first}" + (f"-{last}" if last > first else "")
    notes = []
    if operation.implementation is not None:
        notes.append(operation.implementation)
    if operation.layers_behind == 1:
        notes.append("of the layer before")
    elif operation.layers_behind:
        notes.append(f"of {operation.layers_behind} layers before")
    if operation.after_start:
        notes.append(f"after the start of {' and '.join(operation.after_start)}")
    return text + (f" ({', '.join(notes)})" if notes else "")


def _buckets_text(found: PlanSet) -> str:
    lines = ["", f"for {found.dtype} on {found.device}, model {found.model}"]
    for bucket in found.buckets:
        gain = "" if bucket.gain is None else f", gain {bucket.gain:.3f}"
        low, high = bucket.decode_share
        lines.append(
            f"  {bucket.tokens[0]} to {bucket.tokens[1]} tokens, {low:.0%} to {high:.0%} of them "
            f"decodes: {bucket.plan}{gain}"
        )
    return "\n".join(lines)

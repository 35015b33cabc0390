"""`nanoflow plan measure`: which plans are faster, for `--overlap auto`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nf_server.commands.failure import fail
from nf_server.commands.flags import as_flags
from nf_server.commands.probing import INTERRUPTED, check_output, probing

if TYPE_CHECKING:
    from nf_runtime.engine import Engine
    from nf_runtime.measured import Load, Measured
    from nf_runtime.pipeline.plan import Plan, PlanSet
    from nf_runtime.probe import Probe


def measure(
    engine_options: dict[str, Any],
    loads: str | None,
    *,
    rounds: int,
    plan_dir: str | None,
    output: str | None,
) -> int:
    """Measure all templates with all loads, and write a plan set; the exit code.

    One that is there and knows more stays, and the new one is written beside it; unless `output`
    says where, and all was measured.

    Args:
        engine_options: Fields of `EngineConfig`.
        loads: As `Load.parse` takes them, with commas between; None takes the usual ones.
        rounds: Iterations of each plan with each load.
        plan_dir: Where the plan sets of `auto` are; None is the user's cache directory.
        output: Path of the file instead.
    """
    from nf_runtime import NanoFlowError
    from nf_runtime.measured import Load
    from nf_runtime.pipeline.plan_store import default_directory, file_name
    from nf_runtime.plan_buckets import form_plan_set

    measured: dict[Load, list[Measured]] = {}
    path = None if output is None else Path(output)
    kept = ""
    try:
        if output is not None:
            check_output("--output", output)
        asked = None if loads is None else [Load.parse(text) for text in loads.split(",")]
        with probing(engine_options | {"overlap": "off", "timeline_every": 0}) as (engine, probe):
            target, peaks = engine.plan_target, probe.peaks
            print(f"{engine.info.model}, {target.dtype} on {target.device}; {rounds} rounds")
            plans = _plans(engine)
            interrupted = _measure(probe, plans[1:], _loads(engine, probe, asked), rounds, measured)
        if measured:
            plan_set = form_plan_set(measured, plans, target, peaks=peaks)
            if path is None:
                directory = default_directory() if plan_dir is None else Path(plan_dir)
                path = directory / file_name(plan_set)
            if (interrupted or output is None) and _knows_more(path, plan_set):
                kept = f"{path} knows more and stays as it is"
                path = path.with_name(f"{path.name}.partial")  # which `auto` does not look at
            plan_set.save(path)
    except (NanoFlowError, ValueError) as error:
        fail(as_flags(str(error)))
    except OSError as error:
        fail(f"the plan set cannot be written to {path}: {error.strerror}")
    except KeyboardInterrupt:  # while the model was loaded
        raise SystemExit(INTERRUPTED) from None
    if measured:
        print("\n".join(_table(measured)))
    if interrupted:
        saved = f"what was measured by then is in {path}" if measured else "nothing is saved"
        print(f"Interrupted: {saved}{kept and '; '}{kept}.")
        return INTERRUPTED
    if output is not None or kept:
        how = f"`--overlap {path}` takes it"
    else:
        where = "" if plan_dir is None else f" --plan-dir {plan_dir}"
        how = f"`--overlap auto{where}` finds it"
    print(f"Plan set: {path} ({how})")
    if kept:
        print(f"{kept}; remove it first to replace it.")
    return 0


def _knows_more(path: Path, plan_set: PlanSet) -> bool:
    """Whether there is a plan set that would be a loss."""
    from nf_runtime.pipeline.plan import PlanError, read_plan_set
    from nf_runtime.plan_buckets import loses

    try:
        return loses(read_plan_set(path), plan_set)
    except PlanError:  # there is none, or nothing that can be read
        return False


def _plans(engine: Engine) -> list[Plan]:
    """The sequential plan and all templates that apply to the model; says which do not."""
    from nf_runtime.pipeline.plan import PlanError
    from nf_runtime.pipeline.templates import TEMPLATES

    plans = []
    for name, template in TEMPLATES.items():
        try:
            plan = template(engine.graph)
            engine.executor.check(plan)
            plans.append(plan)
        except PlanError as error:
            print(f"{name} is left out: {as_flags(str(error))}")
    return plans


def _loads(engine: Engine, probe: Probe, asked: list[Load] | None) -> list[Load]:
    """The batches to measure: those that were asked for, or the usual ones that fit.

    Raises:
        ValueError: One that was asked for does not fit, or no usual one does.
    """
    from nf_runtime.plan_buckets import default_loads

    if asked is not None:
        for load in asked:
            probe.check(load)
        return list(dict.fromkeys(asked))
    fitting, others = [], []
    for load in default_loads(engine.config.max_num_seqs, engine.config.batch_tokens):
        try:
            probe.check(load)
            fitting.append(load)
        except ValueError as error:
            others.append(str(load))
            problem = error
    if not fitting:
        raise problem
    if others:
        print(f"Loads that do not fit are left out: {', '.join(others)}")
    return fitting


def _measure(
    probe: Probe,
    plans: list[Plan],
    loads: list[Load],
    rounds: int,
    measured: dict[Load, list[Measured]],
) -> bool:
    """Measure load by load into `measured`; whether Ctrl+C came in between."""
    from nf_runtime.interrupts import interrupts_held_back

    try:
        with (
            interrupts_held_back() as check,
            tqdm(total=len(loads) * rounds, disable=None, file=sys.stderr) as bar,
        ):

            def progress() -> None:
                bar.update()
                check()

            for load in loads:
                bar.set_description(str(load))
                # A plan that leaves the batch in one piece overlaps nothing.
                cutting = [plan for plan in plans if probe.cuts(plan, load)]
                if cutting:
                    result = probe.measure(cutting, load, rounds=rounds, progress=progress)
                    measured[load] = result[1:]
                else:
                    measured[load] = []
                    bar.update(rounds)
                check()
    except KeyboardInterrupt:
        return True
    return False


def _table(measured: dict[Load, list[Measured]]) -> list[str]:
    """A line per load: the plan with the greatest gain, and whether it is taken."""
    from nf_runtime.plan_buckets import adopted

    width = max(len(str(load)) for load in measured)
    names = [one.plan for results in measured.values() for one in results]
    plan_width = max((len(name) for name in ("sequential", *names)), default=0)
    lines = ["", f"{'load':<{width}}  {'best plan':<{plan_width}}   gain  quartiles"]
    for load, results in measured.items():
        if not results:
            lines.append(f"{load!s:<{width}}  no plan cuts it in two")
            continue
        best = max(results, key=lambda one: (adopted(one), one.gain))
        low, high = best.quartiles
        taken = "" if adopted(best) else "  not faster often enough: sequential"
        lines.append(
            f"{load!s:<{width}}  {best.plan:<{plan_width}}  {best.gain:5.3f}  "
            f"{low:.3f} to {high:.3f}{taken}"
        )
    return [*lines, ""]

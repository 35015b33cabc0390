"""`nanoflow replay`: the decisions of an engine, repeated from its log."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nf_server.commands.failure import fail

if TYPE_CHECKING:
    from nf_runtime.replay import ReplayedStep, ReplayReport
    from nf_scheduler import Batch

DIVERGED = 3
"""Exit code where the replay did something else than the log says."""

_ENDS = {
    "CLOSED": "the engine was shut down",
    "FULL": "the log had reached its bound",
    "INTERRUPTED": "the engine was interrupted in the middle of a step",
    "CUT": "the process was killed, or the engine still runs",
}


def run(log: str, *, show: str | None, as_json: bool) -> int:
    """Repeat what a log tells, and print what came of it; the exit code.

    Args:
        log: Path of the log.
        show: Iterations to print, as `FIRST:LAST`; None prints none.
        as_json: Print JSON: an object per iteration shown, and at last one for the whole.
    """
    from nf_runtime import NanoFlowError
    from nf_runtime.replay import DivergenceError, Replay

    try:
        shown = range(0) if show is None else _parse_range(show)
        replay = Replay(log)
        with tqdm(
            total=Path(log).stat().st_size,
            desc="replay",
            unit="B",
            unit_scale=True,
            disable=None,
            file=sys.stderr,
        ) as bar:
            for step in replay.steps():
                bar.update(replay.position - bar.n)
                if step.batch is not None and step.batch.iteration in shown:
                    values = _values(step, step.batch)
                    bar.write(json.dumps(values) if as_json else _line(values), file=sys.stdout)
            bar.update(replay.position - bar.n)
    except (NanoFlowError, DivergenceError, ValueError) as error:
        fail(error)
    report = replay.report
    if as_json:
        end = None if report.end is None else report.end.name.lower()
        print(json.dumps(asdict(report) | {"end": end, "header": replay.header}))
    else:
        print(_text(replay.header, report))
    return 0 if report.divergence is None else DIVERGED


def _parse_range(text: str) -> range:
    """The iterations `FIRST:LAST`, of which either may be left out."""
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (first, last)):
        raise ValueError(f"--show is {text!r}; expected FIRST:LAST, such as 100:120, or 100:")
    return range(int(first or 0), int(last or sys.maxsize - 1) + 1)


def _values(step: ReplayedStep, batch: Batch) -> dict[str, Any]:
    """What happened in a step, as JSON takes it."""
    lengths = np.diff(batch.query_start).tolist()
    split = batch.num_decodes
    return {
        "iteration": batch.iteration,
        "seconds": step.seconds,
        "running": step.num_running,
        "waiting": step.num_waiting,
        "pages_used": step.pages_used,
        "preemptions": step.preemptions,
        "decodes": batch.request_ids[:split],
        "prefills": dict(zip(batch.request_ids[split:], lengths[split:], strict=True)),
        "ended": {name: end.reason.value for name, end in step.progress.ends.items()},
    }


def _line(values: dict[str, Any]) -> str:
    """The same in one line."""
    prefills = [f"{name}:{tokens}" for name, tokens in values["prefills"].items()]
    ended = [f"{name}:{reason}" for name, reason in values["ended"].items()]
    parts = [
        f"{values['iteration']:>7} at {values['seconds']:.6f} s",
        f"running {values['running']}, waiting {values['waiting']}, pages {values['pages_used']}",
        f"decodes {len(values['decodes'])}",
    ]
    parts += [f"prefills {' '.join(prefills)}"] if prefills else []
    parts += [f"preemptions {values['preemptions']}"] if values["preemptions"] else []
    parts += [f"ended {' '.join(ended)}"] if ended else []
    return "; ".join(parts)


def _text(header: dict[str, Any], report: ReplayReport) -> str:
    lines = [
        f"{header['model']}, NanoFlow {header['version']}, {header['created']}",
        f"{report.iterations} iterations, {report.requests} requests ({report.refused} refused), "
        f"{report.preemptions} preemptions, {report.seconds:.3f} s",
    ]
    if report.divergence is not None:
        lines.append(f"DIVERGED {report.divergence}")
    elif report.end is not None:
        lines.append(f"the same decisions, to the end of the log: {_ENDS[report.end.name]}")
    return "\n".join(lines)

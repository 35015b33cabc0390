"""Compare runs of the benchmarks with the committed baseline; fail on a loss of speed.

``python scripts/bench_check.py RUN.json [RUN.json …] [--baseline FILE] [--update]``, where a
RUN.json is what ``pytest --benchmark-json`` writes. A time alone says little on a busier machine.
So every benchmark is divided by the calibration loop measured in the same run (the benchmark whose
group is ``calibration``), and that ratio is compared. The fastest round of a run counts, and of
several runs the best one in a check, the median one in the baseline: noise only adds time. Ratios
differ between kinds of processors: the baseline has a section for each, and a processor without one
is measured and reported, but not judged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "tests" / "benchmarks" / "baseline.json"
ALLOWED_LOSS = 0.25
CALIBRATION = "calibration"


def calibrated_ratios(run: dict[str, Any]) -> dict[str, float]:
    """Time of each benchmark in units of the run's calibration loop, by full name."""
    calibrations = [b for b in run["benchmarks"] if b["group"] == CALIBRATION]
    if len(calibrations) != 1:
        raise ValueError(
            f"the run has {len(calibrations)} benchmarks of group {CALIBRATION!r}; expected one"
        )
    unit = calibrations[0]["stats"]["min"]
    return {
        b["fullname"]: b["stats"]["min"] / unit
        for b in run["benchmarks"]
        if b["group"] != CALIBRATION
    }


def combined_ratios(
    runs: list[dict[str, Any]], combine: Callable[[list[float]], float]
) -> dict[str, float]:
    """One ratio for each benchmark, of those it has in some runs."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, ratio in calibrated_ratios(run).items():
            found.setdefault(name, []).append(ratio)
    return {name: combine(ratios) for name, ratios in found.items()}


def processor(run: dict[str, Any]) -> str:
    """What the baseline's sections are called."""
    cpu = run["machine_info"]["cpu"]
    return f"{cpu['brand_raw']}, {cpu['count']} cores"


def compare(baseline: dict[str, float], ratios: dict[str, float]) -> int:
    """Print a line per benchmark, slowest first; return how many fail."""
    failures = 0
    both = baseline.keys() & ratios.keys()
    for speed, name in sorted((baseline[name] / ratios[name], name) for name in both):
        slow = speed < 1 - ALLOWED_LOSS
        failures += slow
        print(f"{speed:6.2f}x the baseline's speed  {name}{'  TOO SLOW' if slow else ''}")
    for names, what in (
        (baseline.keys() - ratios.keys(), "not measured        "),
        (ratios.keys() - baseline.keys(), "not in the baseline "),
    ):
        for name in sorted(names):
            failures += 1
            print(f"   {what}     {name}")
    return failures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare benchmarks with the committed baseline.")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="JSON written by pytest --benchmark-json"
    )
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--update", action="store_true", help="make these runs the baseline")
    options = parser.parse_args(arguments)

    runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.runs]
    # The baseline is what is usual; a check looks at the best it can do.
    ratios = combined_ratios(runs, statistics.median if options.update else min)
    section = processor(runs[0])
    baselines = {}
    if options.baseline.exists():
        baselines = json.loads(options.baseline.read_text(encoding="utf-8"))
    if options.update:
        baselines[section] = {name: float(f"{ratios[name]:.4g}") for name in sorted(ratios)}
        options.baseline.write_text(json.dumps(baselines, indent=2) + "\n", encoding="utf-8")
        print(f"bench-check: wrote {len(ratios)} ratios for {section} to {options.baseline}")
        return 0
    if section not in baselines:
        for name, ratio in sorted(ratios.items()):
            print(f"{ratio:10.3f} calibration loops  {name}")
        print(
            f"bench-check: no baseline for {section}, so nothing was compared. "
            f"`make bench-baseline` adds one."
        )
        return 0
    failures = compare(baselines[section], ratios)
    if failures:
        print(
            f"bench-check: {failures} benchmarks lost more than {ALLOWED_LOSS:.0%} or were not "
            f"compared. If that is meant: make bench-baseline, and commit {options.baseline.name}."
        )
        return 1
    print(f"bench-check: {len(ratios)} benchmarks within {ALLOWED_LOSS:.0%} of the baseline")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

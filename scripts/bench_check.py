"""Compare a run of the benchmarks with the committed baseline; fail on a loss of speed.

A time alone says little on another or a busier machine. So every benchmark is divided by the
calibration loop measured in the same run (the benchmark whose group is ``calibration``), and that
ratio is compared: ``python scripts/bench_check.py RUN.json [--baseline FILE] [--update]``.
RUN.json is what ``pytest --benchmark-json`` writes. The fastest round counts: noise only adds time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "tests" / "benchmarks" / "baseline.json"
ALLOWED_LOSS = 0.25
CALIBRATION = "calibration"


def calibrated_ratios(run: dict) -> dict[str, float]:
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


def speed_table(baseline: dict[str, float], ratios: dict[str, float]) -> list[tuple[str, float]]:
    """Speed of each benchmark relative to the baseline's, slowest first. 1.0 is no change."""
    speeds = [(name, baseline[name] / ratios[name]) for name in baseline if name in ratios]
    return sorted(speeds, key=lambda row: row[1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare benchmarks with the committed baseline.")
    parser.add_argument("run", type=Path, help="JSON written by pytest --benchmark-json")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--update", action="store_true", help="make this run the baseline")
    options = parser.parse_args(arguments)

    ratios = calibrated_ratios(json.loads(options.run.read_text(encoding="utf-8")))
    if options.update:
        text = json.dumps({name: float(f"{ratios[name]:.4g}") for name in sorted(ratios)}, indent=2)
        options.baseline.write_text(text + "\n", encoding="utf-8")
        print(f"bench-check: wrote {len(ratios)} ratios to {options.baseline}")
        return 0

    baseline = json.loads(options.baseline.read_text(encoding="utf-8"))
    failures = 0
    for name, speed in speed_table(baseline, ratios):
        slow = speed < 1 - ALLOWED_LOSS
        failures += slow
        print(f"{speed:6.2f}x the baseline's speed  {name}{'  TOO SLOW' if slow else ''}")
    for name in sorted(baseline.keys() - ratios.keys()):
        failures += 1
        print(f"   not measured             {name}")
    for name in sorted(ratios.keys() - baseline.keys()):
        failures += 1
        print(f"   not in the baseline      {name}")
    total = len(baseline.keys() | ratios.keys())
    if failures:
        print(
            f"bench-check: {failures} of {total} benchmarks lost more than {ALLOWED_LOSS:.0%} or "
            f"were not compared. If that is meant: make bench-baseline, and commit "
            f"{options.baseline.name}."
        )
        return 1
    print(f"bench-check: {total} benchmarks within {ALLOWED_LOSS:.0%} of the baseline")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

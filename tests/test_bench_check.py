"""scripts/bench_check.py: ratios to the calibration loop, and the 25 % that may be lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_check.py"


def check(
    folder: Path, *options: str, calibration: float, cpu: str = "one", **seconds: float
) -> tuple[int, str]:
    benchmarks = [{"fullname": "loop", "group": "calibration", "stats": {"min": calibration}}]
    benchmarks += [
        {"fullname": name, "group": None, "stats": {"min": value}}
        for name, value in seconds.items()
    ]
    run = folder / "run.json"
    machine = {"cpu": {"brand_raw": cpu, "count": 2}}
    run.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
    command = [sys.executable, SCRIPT, run, *options, "--baseline", folder / "baseline.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout


def test_a_slower_machine_is_no_loss(tmp_path: Path) -> None:
    check(tmp_path, "--update", calibration=1.0, prefill=2.0, decode=0.5)
    code, output = check(tmp_path, calibration=3.0, prefill=6.0, decode=1.5)
    assert code == 0, output
    assert "2 benchmarks within 25%" in output


def test_a_loss_of_a_quarter_passes_and_more_fails(tmp_path: Path) -> None:
    check(tmp_path, "--update", calibration=1.0, prefill=3.0)
    assert check(tmp_path, calibration=1.0, prefill=3.99)[0] == 0
    code, output = check(tmp_path, calibration=1.0, prefill=4.1)
    assert code == 1
    assert "0.73x the baseline's speed  prefill  TOO SLOW" in output


def test_what_cannot_be_compared_fails(tmp_path: Path) -> None:
    check(tmp_path, "--update", calibration=1.0, old=1.0)
    code, output = check(tmp_path, calibration=1.0, new=1.0)
    assert code == 1
    assert "not measured             old" in output
    assert "not in the baseline      new" in output


def test_another_processor_is_measured_but_not_judged(tmp_path: Path) -> None:
    check(tmp_path, "--update", calibration=1.0, prefill=3.0)
    code, output = check(tmp_path, calibration=1.0, prefill=9.0, cpu="other")
    assert code == 0
    assert "no baseline for other, 2 cores" in output
    check(tmp_path, "--update", calibration=1.0, prefill=9.0, cpu="other")
    assert check(tmp_path, calibration=1.0, prefill=9.0, cpu="other")[0] == 0
    assert check(tmp_path, calibration=1.0, prefill=9.0)[0] == 1


def test_the_best_of_several_runs_counts(tmp_path: Path) -> None:
    check(tmp_path, "--update", calibration=1.0, prefill=3.0)
    assert check(tmp_path, calibration=1.0, prefill=6.0)[0] == 1
    (tmp_path / "run.json").rename(tmp_path / "slow.json")
    assert check(tmp_path, str(tmp_path / "slow.json"), calibration=1.0, prefill=3.1)[0] == 0

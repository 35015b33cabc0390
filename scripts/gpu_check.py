"""Check and measure what needs a CUDA device, with this Python, straight from the sources.

`python3 scripts/gpu_check.py [pytest arguments]` builds the CUDA library where nvcc is, runs the
tests that are marked `gpu`, and measures the kernels: every operation against its roofline, our
products against cuBLAS's, and what shares of the device are worth, alone and beside each other. It
writes docs/measurements/<device>-kernels.json and .md in less than ten minutes: each section has a
time limit and a process of its own, and the files are written after each, so that a run that is cut
keeps what it has; `--only SECTION` adds to them. What cannot run is in them, with the reason.

Nothing needs to be installed but torch, pytest and what the tests import. Without a CUDA device it
says so and fails, because nothing was checked; `--rehearse` runs all of it on the CPU, small.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import gpu_report

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = ROOT / "packages/nf-kernels/tests"
GRACE_S = 20  # for a section to notice that its time is up, before it is ended

# Seconds that each section may take. What others need, and what is wanted most, comes first.
LIMITS = {
    "build": 150,
    "kernel tests": 150,
    "roofs": 40,
    "attention": 80,
    "cutlass": 60,
    "curves": 60,
    "pairs": 80,
    "products": 40,
    "operations": 60,
    "pipeline": 120,
    "other tests": 120,
}

# Says "built", "to build", or what is missing to do so.
LIBRARY_PROBE = """
from nf_kernels.cuda import library
from nf_kernels.cuda.toolchain import find_toolchain

if library.status().available:
    print("built")
else:
    try:
        find_toolchain()
        print("to build")
    except RuntimeError as error:
        print(f"missing: {error}")
"""


class Run:
    """One run: its environment, what is left of its time, and its results on disk."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        import torch

        self.options = options
        self.rehearse: bool = options.rehearse
        self._deadline = time.monotonic() + options.budget
        sources = [str(path) for path in sorted(ROOT.glob("*/*/src"))]
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([*sources, *([inherited] if inherited else [])])
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self.results: dict[str, Any] = {
            "device": device,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "rehearsal": self.rehearse,
            "functions": {},
            "sections": {},
        }
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.stem = options.out / f"{name}-kernels"
        if options.only:
            self._continue(self.stem.with_suffix(".json"))

    def _continue(self, path: Path) -> None:
        """Keep the sections of an earlier run with the same device and torch."""
        if not path.exists():
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if all(earlier[name] == self.results[name] for name in ("device", "torch", "cuda")):
            self.results = earlier | {"date": self.results["date"]}

    def left(self, section: str) -> float:
        """Seconds for a section."""
        return min(LIMITS[section] * self.options.patience, self._deadline - time.monotonic())

    def add(self, section: str, result: dict[str, Any]) -> None:
        """Keep a section's result, and write all that there is."""
        functions = result.pop("functions", {})
        known = self.results["functions"]
        for name, entry in functions.items():
            before = known.get(name, {"status": entry["status"], "detail": {}})
            # A failure stays one, whatever was measured.
            failed = "failed" in (before["status"], entry["status"])
            status = "failed" if failed else entry["status"]
            known[name] = {"status": status, "detail": before["detail"] | entry["detail"]}
        self.results["sections"][section] = result
        gpu_report.write(self.results, self.stem)
        reason = f": {result['reason']}" if result.get("reason") else ""
        print(f"gpu-check: {section} {result['status']}{reason}", flush=True)

    def call(
        self, command: list[str], limit: float, *, quiet: bool = False
    ) -> tuple[int | None, str]:
        """Run a command: its exit code, None where it was ended, and its last line."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdout=log if quiet else None,
                stderr=subprocess.STDOUT if quiet else None,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # compilers that it left behind, too
                process.wait()
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
        return code, lines[-1] if lines else ""


def skipped(reason: str) -> dict[str, Any]:
    return {"status": "skipped", "reason": reason}


def build(run: Run, limit: float) -> dict[str, Any]:
    """Build the CUDA library."""
    if run.rehearse:
        return skipped("a rehearsal builds nothing")
    code, said = run.call([sys.executable, "-c", LIBRARY_PROBE], 60, quiet=True)
    if code or said.startswith("missing: "):
        return skipped(said.removeprefix("missing: "))
    if said == "built":
        return {"status": "done", "reason": "it was built already"}
    code, _ = run.call([sys.executable, "-m", "nf_kernels.cuda.build"], limit)
    if code is None:
        return {"status": "cut", "reason": f"not built after {limit:.0f} s"}
    reason = f"nf_kernels.cuda.build ended with {code}" if code else ""
    return {"status": "failed" if code else "done", "reason": reason}


def tests(run: Run, limit: float, paths: list[Path]) -> dict[str, Any]:
    """Run tests that are marked `gpu`; in a rehearsal they are only collected."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *map(str, paths)]
        command += ["--collect-only"] if run.rehearse else [f"--junitxml={junit}"]
        if importlib.util.find_spec("pytest_timeout") is not None:
            # Ends between two tests, and then still writes what there was.
            command += [f"--session-timeout={limit}", f"--timeout={limit}"]
        command += run.options.pytest
        code, last = run.call(command, limit + GRACE_S, quiet=run.rehearse)
        outcomes = _outcomes(junit) if junit.exists() else []
    if code is None:
        return {"status": "cut", "reason": f"the tests were ended after {limit:.0f} s"}
    if run.rehearse:
        status = "failed" if code else "done"
        return {"status": status, "reason": f"collected alone: {last.strip('= ')}"}
    functions: dict[str, dict[str, Any]] = {}
    rows = []
    for name, function, outcome, message in outcomes:
        if outcome != "passed":
            rows.append({"test": name, "outcome": outcome, "message": message[:300]})
        if function and outcome in ("passed", "failed"):
            entry = functions.setdefault(function, {"status": "executed", "detail": {"tests": 0}})
            entry["detail"]["tests"] += 1
            if outcome == "failed":
                entry["status"] = "failed"
    counts = {o: sum(x == o for _, _, x, _ in outcomes) for o in ("passed", "failed", "skipped")}
    reason = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    status = "failed" if counts["failed"] else "cut" if code else "done"
    return {"status": status, "reason": reason, "rows": rows, "functions": functions}


def _outcomes(junit: Path) -> list[tuple[str, str, str, str]]:
    """Of each test: name, function of the project or nothing, outcome, and what was said."""
    outcomes = []
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name', '')}"
        function = next(
            (p.get("value", "") for p in case.iter("property") if p.get("name") == "function"), ""
        )
        if not function and "nccl" in name:
            function = "collectives/nccl"
        if not function and "mscclpp" in name:
            function = "collectives/mscclpp"
        bad = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        outcomes.append((name, function, outcome, "" if bad is None else bad.get("message", "")))
    return outcomes


def kernel_tests(run: Run, limit: float) -> dict[str, Any]:
    return tests(run, limit, [KERNEL_TESTS])


def other_tests(run: Run, limit: float) -> dict[str, Any]:
    """Those of the other packages, whose needs this Python may not have."""
    marked = [
        path
        for folder in ("packages", "apps", "tests")
        for path in sorted((ROOT / folder).rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8") and KERNEL_TESTS not in path.parents
    ]
    marked = [path for path in marked if path.name != "test_gpu_check.py"]
    if not marked:
        return skipped("there are none")
    code, last = run.call([sys.executable, "-c", "import nf_runtime.llm"], 60, quiet=True)
    if code != 0:
        return skipped(f"nf_runtime does not import: {last}")
    return tests(run, limit, marked)


def section(run: Run, name: str, limit: float) -> dict[str, Any]:
    """Measure one section in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, known = Path(folder) / "section.json", Path(folder) / "roofs.json"
        known.write_text(json.dumps(run.results.get("roofs", {})), encoding="utf-8")
        command = [sys.executable, str(ROOT / "scripts/gpu_sections.py"), name]
        command += ["--out", str(out), "--limit", str(limit), "--roofs", str(known)]
        if run.rehearse:
            command.append("--rehearse")
        code, _ = run.call(command, limit + GRACE_S)
        result: dict[str, Any] = {"rows": [], "functions": {}}
        if out.exists():
            result = json.loads(out.read_text(encoding="utf-8"))
    if code is None:
        return result | {"status": "cut", "reason": f"ended after {limit + GRACE_S:.0f} s"}
    if result.get("status") in (None, "running"):
        return result | {"status": "failed", "reason": f"its process ended with {code}"}
    return result


def measure(run: Run, name: str, limit: float) -> dict[str, Any]:
    if name != "roofs" and "roofs" not in run.results:
        return skipped("without its roofs nothing can be compared")
    result = section(run, name, limit)
    if name == "roofs" and result["status"] == "done":
        roofs: dict[str, float] = {}
        for row in result["rows"]:
            roofs |= {k: v for k, v in row.items() if k.endswith("_per_second")}
        run.results["roofs"] = roofs
    return result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rehearse", action="store_true", help="run all of it on the CPU, small")
    parser.add_argument("--out", type=Path, default=None, help="folder of the measurements")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds, all together")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on sections' limits")
    parser.add_argument(
        "--only",
        action="append",
        choices=LIMITS,
        help="run this section alone (repeatable) and keep the others of an earlier run",
    )
    options, options.pytest = parser.parse_known_args(arguments)
    if options.out is None:
        options.out = ROOT / ("build/rehearsal" if options.rehearse else "docs/measurements")
    missing = [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu-check: {sys.executable} has no {' and no '.join(missing)}; nothing was checked")
        return 1
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA device; nothing was checked")
        return 1
    device = "rehearsal on a CPU" if options.rehearse else torch.cuda.get_device_name()
    print(f"gpu-check: {device}, torch {torch.__version__}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options, device)
    own = {"build": build, "kernel tests": kernel_tests, "other tests": other_tests}
    for name in LIMITS:
        if options.only and name not in options.only:
            continue
        limit = run.left(name)
        if limit <= 0:
            run.add(name, skipped(f"the {options.budget:.0f} s of the run were up"))
        elif name in own:
            run.add(name, own[name](run, limit))
        else:
            run.add(name, measure(run, name, limit))
    print(f"gpu-check: wrote {run.stem}.json and .md")
    statuses = [run.results["sections"][name]["status"] for name in options.only or LIMITS]
    return 1 if "failed" in statuses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

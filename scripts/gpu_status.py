"""Write docs/gpu-status.md: which CUDA functions are compiled, executed, measured.

``python scripts/gpu_status.py [--check]``. What is compiled comes from the last build of the CUDA
library (``make cuda-build``), whose record is kept as docs/measurements/cuda-build.json; what is
executed and measured from the files that ``make gpu-check`` leaves as
docs/measurements/<device>-kernels.json. With --check nothing is written, and a document that does
not say what these files say is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "packages" / "nf-kernels" / "src"))

from nf_kernels.cost import CATEGORIES, Category  # noqa: E402
from nf_kernels.cuda import build, place, sources  # noqa: E402
from nf_kernels.cuda.tiles import all_tiles  # noqa: E402

MECHANISMS = ("green_contexts", "capped", "shared")
COLLECTIVES = ("nccl", "mscclpp")
ITERATIONS = ("streams", "graphs")
STATUSES = ("executed", "failed", "measured")
RECORD_KEYS = ("date", "fingerprint", "nvcc", "cutlass", "kernels")
RUN_KEYS = ("device", "date", "torch", "functions")

HEADING = """# What of the CUDA code has run

Written by `make gpu-status` from the records under `docs/measurements`; do not edit.

- *compiled*: by nvcc, for sm_90a, from today's sources (`make cuda-build`); what is written in
  Python has nothing to compile.
- *executed*: its tests passed on a device (`make gpu-check`).
- *measured*: it was timed there, too.
"""


def function_names() -> list[str]:
    """Every function of the project that runs on a CUDA device, and on nothing else."""
    operations = [name for name, kind in CATEGORIES.items() if kind is not Category.NETWORK]
    return [
        *(f"gemm/{tile}" for tile in all_tiles()),
        "copy",
        *(f"op/{name}" for name in operations),
        *(f"lanes/{name}" for name in MECHANISMS),
        *(f"collectives/{name}" for name in COLLECTIVES),
        *(f"iterations/{name}" for name in ITERATIONS),
    ]


def read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """A record with at least these keys."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeError(f"{path} is no JSON: {error}") from error
    missing = [key for key in keys if key not in data] if isinstance(data, dict) else list(keys)
    if missing:
        raise RuntimeError(f"{path} has no {', '.join(missing)}; write it anew")
    return data


def read_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What `make gpu-check` found on each device, the latest last; rehearsals do not count."""
    runs = []
    for path in sorted(folder.glob("*-kernels.json")):
        run = read(path, RUN_KEYS)
        unknown = sorted(set(run["functions"]) - set(function_names()))
        statuses = {entry.get("status") for entry in run["functions"].values()}
        if unknown:
            raise RuntimeError(
                f"{path} names {', '.join(unknown)}, which the project does not have"
            )
        if not statuses <= set(STATUSES):
            raise RuntimeError(f"{path} has a status that is none of {', '.join(STATUSES)}")
        if not run.get("rehearsal"):
            runs.append((path, run))
    return sorted(runs, key=lambda item: item[1]["date"])


def compiled(name: str, record: dict[str, Any] | None) -> str:
    """What is known of a function's compilation."""
    if name == "copy":
        kernels = {"copy"}
    elif name.startswith("gemm/"):
        tile = name.removeprefix("gemm/")
        kernels = {f"gemm_{tile}_{dtype}" for dtype in sources.DTYPES}
    else:
        return "in Python"
    if record is None or not kernels <= set(record["kernels"]):
        return "no"
    if record["fingerprint"] != sources.fingerprint():
        return f"{record['date']}, from earlier sources"
    return str(record["date"])


def executed_and_measured(name: str, runs: list[tuple[Path, dict[str, Any]]]) -> tuple[str, str]:
    """What each device said last of a function."""
    executed, measured = [], []
    for path, run in runs:
        status = run["functions"].get(name, {}).get("status")
        where = f"{run['date']}, {run['device']}"
        if status == "failed":
            executed.append(f"**failed** {where}")
        elif status is not None:
            executed.append(where)
        if status == "measured":
            measured.append(f"[{where}](measurements/{path.stem}.md)")
    return "; ".join(executed) or "no", "; ".join(measured) or "no"


def render(record: dict[str, Any] | None, runs: list[tuple[Path, dict[str, Any]]]) -> str:
    """The document."""
    lines = [HEADING]
    rows, counts = [], {"executed": 0, "measured": 0}
    for name in function_names():
        executed, measured = executed_and_measured(name, runs)
        counts["executed"] += executed != "no" and "failed" not in executed
        counts["measured"] += measured != "no"
        rows.append(f"| `{name}` | {compiled(name, record)} | {executed} | {measured} |")
    lines.append(
        f"Of {len(rows)} functions, {counts['executed']} have been executed and "
        f"{counts['measured']} measured."
    )
    if record is not None:
        lines.append(f"Compiled with nvcc {record['nvcc']} and CUTLASS {record['cutlass']}.")
    lines += ["", "| function | compiled | executed | measured |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *rows, ""])


def adopt_last_build(kept: Path, objects: Path) -> None:
    """Keep the record of the last build, if it is of today's sources and of no fewer kernels."""
    last = objects / build.RECORD
    if not last.is_file():
        return
    record = read(last, RECORD_KEYS)
    before = read(kept, RECORD_KEYS) if kept.is_file() else None
    if record["fingerprint"] != sources.fingerprint():
        return
    same_sources = before is not None and before["fingerprint"] == record["fingerprint"]
    if same_sources and set(record["kernels"]) <= set(before["kernels"]):
        return
    kept.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write docs/gpu-status.md.")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of documents")
    parser.add_argument("--objects", type=Path, help="folder of the last build")
    options = parser.parse_args(arguments)
    document, kept = options.docs / "gpu-status.md", options.docs / "measurements/cuda-build.json"
    try:
        if not options.check:
            adopt_last_build(kept, options.objects or place.object_folder())
        record = read(kept, RECORD_KEYS) if kept.is_file() else None
        text = render(record, read_runs(kept.parent))
        if not options.check:
            document.write_text(text, encoding="utf-8")
        elif not document.is_file() or document.read_text(encoding="utf-8") != text:
            raise RuntimeError(f"{document} is stale; run 'make gpu-status' and commit it")
    except RuntimeError as error:
        print(f"gpu-status: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

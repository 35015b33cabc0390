"""docs/gpu-status.md says what the records under docs/measurements say, and nothing more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nf_kernels.cuda import sources
from nf_kernels.cuda.tiles import all_tiles
from nf_kernels.ops import OPERATION_NAMES

ROOT = Path(__file__).resolve().parent.parent
TILE = all_tiles()[0].name
KERNELS = [f"gemm_{TILE}_bfloat16", f"gemm_{TILE}_float16", "copy"]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """An empty folder of documents."""
    (tmp_path / "docs" / "measurements").mkdir(parents=True)
    (tmp_path / "objects").mkdir()
    return tmp_path / "docs"


def gpu_status(docs: Path, *options: str) -> tuple[int, str]:
    """Run the script; gives its exit status and what it complains about."""
    command = [sys.executable, ROOT / "scripts/gpu_status.py", *options]
    folders = ["--docs", docs, "--objects", docs.parent / "objects"]
    result = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=60)
    return result.returncode, result.stderr


def rows(docs: Path) -> dict[str, list[str]]:
    """The table: compiled, executed, measured by function."""
    lines = (docs / "gpu-status.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    return {name.strip("`"): rest for name, *rest in cells}


def record(**changed: Any) -> str:
    fields = {
        "date": "2026-02-03",
        "fingerprint": sources.fingerprint(),
        "nvcc": "Build 13",
        "cutlass": "4.2.0",
        "kernels": KERNELS,
    }
    return json.dumps(fields | changed)


def run(date: str = "2026-03-04", device: str = "NVIDIA H200", **statuses: str) -> str:
    functions = {
        name.replace("__", "/"): {"status": status, "detail": {}}
        for name, status in statuses.items()
    }
    return json.dumps({"device": device, "date": date, "torch": "2.11", "functions": functions})


def test_the_document_of_this_repository_is_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/gpu_status.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_without_records_nothing_is_claimed(docs: Path) -> None:
    assert gpu_status(docs) == (0, "")
    table = rows(docs)
    assert table[f"gemm/{TILE}"] == table["copy"] == ["no", "no", "no"]
    assert {name for name in table if name.startswith("op/")} == {
        f"op/{name}" for name in OPERATION_NAMES
    }
    assert {cell for name, cells in table.items() if "/" in name for cell in cells} == {
        "no",
        "in Python",
    }
    assert len([name for name in table if name.startswith("gemm/")]) == len(all_tiles())
    assert "0 have been executed and 0 measured" in (docs / "gpu-status.md").read_text()


def test_a_build_of_these_sources_is_kept_and_a_smaller_one_does_not_replace_it(
    docs: Path,
) -> None:
    last, kept = docs.parent / "objects/build.json", docs / "measurements/cuda-build.json"
    last.write_text(record())
    gpu_status(docs)
    assert json.loads(kept.read_text())["kernels"] == KERNELS
    assert rows(docs)[f"gemm/{TILE}"][0] == rows(docs)["copy"][0] == "2026-02-03"
    assert rows(docs)[f"gemm/{all_tiles()[1]}"][0] == "no"
    last.write_text(record(kernels=["copy"], date="2026-02-04"))
    gpu_status(docs)
    assert json.loads(kept.read_text())["date"] == "2026-02-03"


def test_a_tile_that_lacks_a_dtype_is_not_compiled(docs: Path) -> None:
    (docs.parent / "objects/build.json").write_text(record(kernels=KERNELS[1:]))
    gpu_status(docs)
    assert rows(docs)[f"gemm/{TILE}"][0] == "no"
    assert rows(docs)["copy"][0] == "2026-02-03"


def test_a_build_of_other_sources_is_neither_kept_nor_passed_for_one_of_these(docs: Path) -> None:
    (docs.parent / "objects/build.json").write_text(record(fingerprint="another"))
    gpu_status(docs)
    assert not (docs / "measurements/cuda-build.json").exists()
    (docs / "measurements/cuda-build.json").write_text(record(fingerprint="another"))
    gpu_status(docs)
    assert rows(docs)["copy"][0] == "2026-02-03, from earlier sources"


def test_each_device_counts_and_a_failure_is_no_execution(docs: Path) -> None:
    folder = docs / "measurements"
    statuses = {"copy": "executed", "op__linear": "failed", "lanes__capped": "measured"}
    (folder / "h200-kernels.json").write_text(run(**statuses))
    (folder / "h100-kernels.json").write_text(
        run(date="2026-01-01", device="NVIDIA H100", copy="measured")
    )
    (folder / "cpu-benchmarks.json").write_text("{}")
    gpu_status(docs)
    table = rows(docs)
    both = "2026-01-01, NVIDIA H100; 2026-03-04, NVIDIA H200"
    h100 = "[2026-01-01, NVIDIA H100](measurements/h100-kernels.md)"
    assert table["copy"][1:] == [both, h100]
    assert table["op/linear"][1:] == ["**failed** 2026-03-04, NVIDIA H200", "no"]
    h200 = "[2026-03-04, NVIDIA H200](measurements/h200-kernels.md)"
    assert table["lanes/capped"][1:] == ["2026-03-04, NVIDIA H200", h200]
    assert "2 have been executed and 2 measured" in (docs / "gpu-status.md").read_text()


def test_a_rehearsal_is_no_execution(docs: Path) -> None:
    data = json.loads(run(copy="measured")) | {"rehearsal": True}
    (docs / "measurements/cpu-kernels.json").write_text(json.dumps(data))
    gpu_status(docs)
    assert rows(docs)["copy"] == ["no", "no", "no"]


def test_a_stale_document_fails_the_check_and_is_left_as_it_is(docs: Path) -> None:
    code, output = gpu_status(docs, "--check")
    assert (code, "gpu-status.md is stale; run 'make gpu-status'" in output) == (1, True)
    assert not (docs / "gpu-status.md").exists()
    gpu_status(docs)
    assert gpu_status(docs, "--check") == (0, "")
    (docs / "measurements/h200-kernels.json").write_text(run(copy="executed"))
    assert gpu_status(docs, "--check")[0] == 1
    assert rows(docs)["copy"] == ["no", "no", "no"]


@pytest.mark.parametrize(("text", "message"), [
    ("{", "h200-kernels.json is no JSON"),
    ("[]", "h200-kernels.json has no device, date, torch, functions; write it anew"),
    (run(gemm__9x9="executed"), "names gemm/9x9, which the project does not have"),
    (run(copy="fine"), "has a status that is none of executed, failed, measured"),
])  # fmt: skip
def test_a_damaged_record_is_one_clear_line(docs: Path, text: str, message: str) -> None:
    (docs / "measurements/h200-kernels.json").write_text(text)
    code, output = gpu_status(docs)
    assert code == 1
    assert message in output
    assert len(output.splitlines()) == 1

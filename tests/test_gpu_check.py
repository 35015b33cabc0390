"""`make gpu-check`, rehearsed on the CPU: all of it but the device."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nf_kernels import native_status
from nf_kernels.cuda.library import CudaLibrary
from nf_kernels.ops import CUDA, OPERATION_NAMES, REFERENCE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
FAILED_AND_MEASURED = {"op/swiglu", "op/sample"}

needs_lanes = pytest.mark.skipif(not native_status().available, reason="needs lanes of a CPU")


def rehearse(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, SCRIPTS / "gpu_check.py", "--rehearse", "--out", out, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    text = (out / "rehearsal-on-a-cpu-kernels.json").read_text(encoding="utf-8")
    return result, json.loads(text)


@needs_lanes
def test_a_rehearsal_runs_every_section(tmp_path: Path) -> None:
    result, results = rehearse(tmp_path, "--patience", "10", "--budget", "2000")
    assert result.returncode == 0, result.stdout + result.stderr
    sections = results["sections"]
    statuses = {name: section["status"] for name, section in sections.items()}
    assert statuses.pop("build") == "skipped"
    assert sections["build"]["reason"] == "a rehearsal builds nothing"
    other = statuses.pop("other tests")
    assert other == "done" or sections["other tests"]["reason"].startswith("nf_runtime does not")
    assert statuses == dict.fromkeys(statuses, "done"), result.stdout
    functions = results["functions"]
    assert {f"op/{name}" for name in OPERATION_NAMES} <= set(functions)
    assert {"gemm/rehearsal_64x64", "copy", "lanes/cores", "lanes/shared"} <= set(functions)
    assert {entry["status"] for entry in functions.values()} == {"measured"}
    works = {row["work"] for row in sections["curves"]["rows"] if "rate" in row}
    assert works == {"product", "attention", "copy"}
    both = [row for row in sections["pairs"]["rows"] if "gain" in row]
    assert {row["mechanism"] for row in both} >= {"shared"}
    assert len(results["bars"]) == 6
    document = (tmp_path / "rehearsal-on-a-cpu-kernels.md").read_text(encoding="utf-8")
    assert "no number means anything" in document
    assert "| decode attention, 4 requests of 32 tokens" in document


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    result, results = rehearse(tmp_path, "--budget", "0")
    assert result.returncode == 0
    assert {section["status"] for section in results["sections"].values()} == {"skipped"}
    reasons = {section["reason"] for section in results["sections"].values()}
    assert reasons == {"the 0 s of the run were up"}


@needs_lanes
def test_a_section_whose_time_is_up_keeps_what_it_has(tmp_path: Path) -> None:
    out, roofs = tmp_path / "section.json", tmp_path / "roofs.json"
    roofs.write_text('{"flops_per_second": 1e11, "bytes_per_second": 1e10}', encoding="utf-8")
    subprocess.run(
        [sys.executable, SCRIPTS / "gpu_sections.py", "products", "--out", out, "--rehearse",
         "--limit", "0", "--roofs", roofs],
        check=True,
        timeout=120,
    )  # fmt: skip
    results = json.loads(out.read_text(encoding="utf-8"))
    assert (results["status"], results["reason"]) == ("cut", "its 0 s were up")


@needs_lanes
def test_a_section_that_fails_says_why(tmp_path: Path) -> None:
    out, broken = tmp_path / "section.json", tmp_path / "roofs.json"
    broken.write_text("{}", encoding="utf-8")
    process = subprocess.run(
        [sys.executable, SCRIPTS / "gpu_sections.py", "attention", "--out", out, "--rehearse",
         "--limit", "60", "--roofs", broken],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert process.returncode == 1
    results = json.loads(out.read_text(encoding="utf-8"))
    assert (results["status"], results["reason"]) == ("failed", "KeyError: 'bytes_per_second'")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def a_run(scripts: Any, out: Path, *, only: list[str] | None = None) -> Any:
    options = argparse.Namespace(
        rehearse=True, budget=100.0, patience=1.0, out=out, pytest=[], only=only
    )
    return scripts("gpu_check").Run(options, "NVIDIA H200")


def test_a_command_that_does_not_end_is_ended_with_its_children(
    scripts: Any, tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    parent = (
        f"import subprocess, sys; print('begun', flush=True); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    run = a_run(scripts, tmp_path)
    code, last = run.call([sys.executable, "-c", parent], 1.0, quiet=True)
    assert (code, last) == (None, "begun")
    run.call([sys.executable, "-c", "import time; time.sleep(4)"], 10)
    assert not alive.exists()


def test_results_are_written_after_each_section_and_a_failure_stays(
    scripts: Any, tmp_path: Path
) -> None:
    run = a_run(scripts, tmp_path)
    ran = {"gemm/a": {"status": "failed", "detail": {"tests": 3}}}
    timed = {
        "gemm/a": {"status": "measured", "detail": {"ratio": 0.9}},
        "copy": {"status": "measured", "detail": {}},
    }
    run.add("kernel tests", {"status": "failed", "reason": "", "rows": [], "functions": ran})
    path = tmp_path / "nvidia-h200-kernels.json"
    assert json.loads(path.read_text())["functions"]["gemm/a"]["status"] == "failed"
    run.add("cutlass", {"status": "done", "reason": "", "rows": [], "functions": timed})
    results = json.loads(path.read_text())
    assert results["functions"] == {
        "gemm/a": {"status": "failed", "detail": {"tests": 3, "ratio": 0.9}},
        "copy": {"status": "measured", "detail": {}},
    }
    assert (results["device"], len(results["sections"])) == ("NVIDIA H200", 2)
    again = a_run(scripts, tmp_path, only=["pairs"])
    again.add("pairs", {"status": "done", "reason": "", "rows": []})
    assert list(json.loads(path.read_text())["sections"]) == ["kernel tests", "cutlass", "pairs"]
    anew = a_run(scripts, tmp_path)
    anew.add("pairs", {"status": "done", "reason": "", "rows": []})
    assert list(json.loads(path.read_text())["sections"]) == ["pairs"]


def test_what_failed_once_in_a_section_stays_failed(scripts: Any, tmp_path: Path) -> None:
    report = scripts("gpu_section_report").Report(tmp_path / "section.json", {})
    report.measured("op/swiglu", share_at_64_rows=0.5)
    report.failed("op/swiglu", RuntimeError("out of memory"))
    report.measured("op/swiglu", share_at_128_rows=0.6)
    detail = {"share_at_64_rows": 0.5, "error": "out of memory", "share_at_128_rows": 0.6}
    assert report.data["functions"] == {"op/swiglu": {"status": "failed", "detail": detail}}


def test_an_operation_in_plain_torch_has_neither_failed_nor_been_measured(
    scripts: Any, tmp_path: Path
) -> None:
    report = scripts("gpu_section_report").Report(tmp_path / "section.json", {})
    plain, own = (argparse.Namespace(operations=set_) for set_ in (REFERENCE, CUDA))
    for bench in (plain, own):
        report.failed_operation(bench, "swiglu", RuntimeError())
        report.measured_operation(bench, "sample", share=0.5)
        assert set(report.data["functions"]) == (set() if bench is plain else FAILED_AND_MEASURED)
    assert report.data["functions"]["op/swiglu"]["detail"] == {"error": "RuntimeError"}


@pytest.mark.parametrize(("error", "expected"), [
    (RuntimeError(), "RuntimeError"),
    (RuntimeError("\nof the device"), "RuntimeError"),
    (RuntimeError("out of memory\nof the device"), "out of memory"),
    (RuntimeError("x" * 500), "x" * 300),
])  # fmt: skip
def test_an_error_is_told_in_a_line(scripts: Any, error: Exception, expected: str) -> None:
    assert scripts("gpu_bench").first_line(error) == expected


def test_an_operation_that_fails_without_a_word_does_not_end_its_section(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = scripts("gpu_section_operations")

    def fail() -> None:
        raise RuntimeError

    case = scripts("gpu_operation_cases").OperationCase(make=fail, work=None, nbytes=1)
    monkeypatch.setattr(section, "operation_cases", lambda bench, count: {"swiglu": case})
    sizes = argparse.Namespace(few_rows=(1, 4), many_rows=16)
    bench = argparse.Namespace(operations=REFERENCE, sizes=sizes, copies=lambda nbytes: 2)
    report = scripts("gpu_section_report").Report(tmp_path / "section.json", {})
    section.operations(bench, report)
    assert [row["failed"] for row in report.data["rows"]] == ["RuntimeError"] * 2
    assert report.data["functions"] == {}


def test_the_library_that_stands_in_has_the_arguments_of_the_real_one(scripts: Any) -> None:
    stand_in = scripts("gpu_bench").TorchLibrary
    for name, function in inspect.getmembers(stand_in, inspect.isfunction):
        mine, real = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (function, getattr(CudaLibrary, name))
        )
        assert mine == real, name


def test_the_outcomes_of_tests_are_read_by_function(scripts: Any, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('function', 'op/good')\n"
        "def test_bad(record_property):\n"
        "    record_property('function', 'op/bad')\n"
        "    raise RuntimeError('no')\n"
        "def test_away(): pytest.skip('not here')\n"
        "@pytest.mark.parametrize('w', ['nccl-2'])\n"
        "def test_sum(w): pass\n",
        encoding="utf-8",
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    found = {
        name: (function, outcome)
        for name, function, outcome, _ in scripts("gpu_check")._outcomes(junit)
    }
    assert found == {
        "test_it::test_good": ("op/good", "passed"),
        "test_it::test_bad": ("op/bad", "failed"),
        "test_it::test_away": ("", "skipped"),
        "test_it::test_sum[nccl-2]": ("collectives/nccl", "passed"),
    }


def test_the_bar_of_a_product_is_the_best_rate_of_cublas_over_all(scripts: Any) -> None:
    def row(product: str, tile: str, rate: float, cublas: float) -> dict[str, Any]:
        rates = {"flops_per_second": rate, "cublas_flops_per_second": cublas}
        return {
            "product": product,
            "rows": 2048,
            "tile": tile,
            "cublas_ratio": rate / cublas,
            **rates,
        }

    rows = [row("o", "a", 300.0, 400.0), row("o", "b", 450.0, 400.0), row("qkv", "a", 490.0, 500.0)]
    others = [
        {"product": "o", "tile": "c", "failed": "CUDA error"},
        {"kernel": "copy", "seconds": 1},
    ]
    results = {"sections": {"cutlass": {"rows": [*others, *rows]}}}
    assert [
        (bar["what"], bar["value"], bar["bar"]) for bar in scripts("gpu_report").bars(results)
    ] == [
        ("o, 2048 rows, b, of cuBLAS's best rate", 0.9, 0.9),
        ("qkv, 2048 rows, a, of cuBLAS's best rate", 0.98, 0.9),
    ]


@pytest.mark.parametrize("capturable", [True, False])
def test_a_device_is_timed_by_replaying_a_graph_where_calls_can_be_captured(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    import torch

    done: list[str] = []
    now = [0.0]

    class Stream:
        def wait_stream(self, other: object) -> None: ...

        def synchronize(self) -> None: ...

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    class Graph:
        def replay(self) -> None:
            done.append("replay")
            now[0] += 6.0

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream) -> Iterator[None]:
        yield
        if not capturable:
            raise RuntimeError("operation not permitted when stream is capturing")

    def call() -> None:
        done.append("call")
        now[0] += 5.0

    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: Stream(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    bench = object.__new__(scripts("gpu_bench").Bench)
    bench.device = torch.device("cuda")
    bench._deadline = float("inf")
    measured = bench.seconds([call, call, call], repeats=4)
    assert measured == ((2.0, "graph") if capturable else (5.0, "eager"))
    assert done.count("replay") == (5 if capturable else 0)
    assert bench.seconds([call], graph=False) == (5.0, "eager")


@pytest.mark.parametrize(("said", "code", "expected"), [
    ("built", 0, {"status": "done", "reason": "it was built already"}),
    ("missing: no nvcc on the PATH", 0, {"status": "skipped", "reason": "no nvcc on the PATH"}),
    ("ImportError: no", 1, {"status": "skipped", "reason": "ImportError: no"}),
    ("to build", 0, {"status": "done", "reason": ""}),
])  # fmt: skip
def test_the_library_is_built_where_it_is_wanted_and_can_be(
    scripts: Any, tmp_path: Path, said: str, code: int, expected: dict[str, str]
) -> None:
    run = a_run(scripts, tmp_path)
    run.rehearse = False
    commands = []

    def call(command: list[str], limit: float, *, quiet: bool = False) -> tuple[int, str]:
        commands.append(command[1:])
        return (code, said) if command[1] == "-c" else (0, "")

    run.call = call
    assert scripts("gpu_check").build(run, 100.0) == expected
    assert (["-m", "nf_kernels.cuda.build"] in commands) == (said == "to build")

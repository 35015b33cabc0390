"""`nanoflow timeline`: numbers, a picture, and a trace that Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nf_kernels import native_status

DEMO_MODEL = str(Path(__file__).resolve().parents[3] / "models" / "nanoflow-demo")
OPTIONS = ["--load-format", "dummy", "--kv-cache-tokens", "16384", "--device", "cpu"]
Nanoflow = Callable[..., Any]
needs_lanes = pytest.mark.skipif(
    not native_status().available, reason="lanes need the native kernels"
)


def events_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


@needs_lanes
def test_a_trace_in_which_lanes_overlap(nanoflow: Nanoflow, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    arguments = ["timeline", DEMO_MODEL, *OPTIONS, "--overlap", "nanoflow", "-o", str(output)]
    result = nanoflow(*arguments, "--iterations", "6", "--prefill", "64", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["load"] == {"decodes": 32, "context": 256, "prefill": 64}
    assert (report["plan"], report["reason"]) == ("nanoflow", "planned")
    assert report["nothing_overlapped"] is None
    assert report["peaks"].pop("sent_per_second") == 0  # one rank
    assert set(report["peaks"]) == {"flops_per_second", "bytes_per_second"}
    assert min(report["peaks"].values()) > 0
    sequential, plan = report["plans"]
    assert (sequential["plan"], sequential["gain"], sequential["overlaps"]) == ("sequential", 1, 0)
    assert plan["overlaps"] > 0
    assert set(plan["idle_ms"]) == {"device", "compute", "memory"}
    assert plan["gain_quartiles"][0] <= plan["gain"] <= plan["gain_quartiles"][1]
    assert plan["network_share"] is None
    assert len(plan["iterations"]) == 6
    for iteration in plan["iterations"]:
        assert iteration["gain"] > 0
        used = iteration["flops_per_second"] / report["peaks"]["flops_per_second"]
        assert iteration["compute"] == pytest.approx(used)
        assert iteration["memory"] > 0
    trace = json.loads(output.read_text())
    events = events_of(trace)
    assert {event["args"]["iteration"] for event in events} == set(range(12))
    names = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert {names[event["tid"]] for event in events} == {
        *("lane device", "lane compute", "lane memory")
    }
    assert any(
        one["tid"] < other["tid"]
        and one["args"]["iteration"] == other["args"]["iteration"]
        and one["ts"] < other["ts"] + other["dur"]
        and other["ts"] < one["ts"] + one["dur"]
        for one in events
        for other in events
    )


@needs_lanes
def test_a_table_and_a_picture_for_people(nanoflow: Nanoflow, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    arguments = ["timeline", DEMO_MODEL, *OPTIONS, "--overlap", "co-resident", "-o", str(output)]
    result = nanoflow(*arguments, "--iterations", "4", "--prefill", "0")
    assert result.returncode == 0, result.stderr
    assert "32 decodes at 256 tokens; 4 iterations each" in result.stdout
    lines = result.stdout.splitlines()
    (header,) = (line for line in lines if line.startswith("plan "))
    for column in ("wall ms", "gain", "quartiles", "concurrency", "compute", "memory", "idle ms"):
        assert column in header
    assert any(line.startswith("co-resident  ") and ", second " in line for line in lines)
    assert "TFLOP/s and " in result.stdout
    assert any(line.startswith("  first  |") for line in lines)
    assert str(output) in lines[-1]


def test_the_reason_where_nothing_overlapped(nanoflow: Nanoflow, tmp_path: Path) -> None:
    arguments = ["timeline", DEMO_MODEL, *OPTIONS, "-o", str(tmp_path / "trace.json")]
    arguments += ["--plan-dir", str(tmp_path), "--iterations", "1", "--prefill", "0"]
    result = nanoflow(*arguments)
    assert result.returncode == 0, result.stderr
    assert "Nothing overlapped: no plans were measured for this model on this device" in (
        result.stdout
    )
    result = nanoflow(*arguments, "--overlap", "nanoflow", "--decodes", "1", "--json")
    report = json.loads(result.stdout)
    assert report["nothing_overlapped"] == "cut by its plan, the batch is in one piece"
    assert [plan["plan"] for plan in report["plans"]] == ["sequential"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlap", "nanoflo"], "overlap is 'nanoflo', which is no file; expected one of auto"),
        (["--overlap", "two-batch"], "set --tensor-parallel-size to 2"),
        (["--decodes", "300"], "load 300x256+128 has 301 requests"),
        (["--decodes", "0", "--prefill", "0"], "expected at least one decode"),
        (["--context", "1024"], "has 1025 tokens of a request, and the engine takes at most 1024"),
        (["--decodes", "100"], "has 1708 pages of KV, and the engine takes at most 1024; raise "),
        (["--output", "no/such/folder/x.json"], "whose folder does not exist"),
        (["--output", "/"], "which is a folder"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    nanoflow: Nanoflow, only_error_line: Callable[..., str], arguments: list[str], message: str
) -> None:
    result = nanoflow("timeline", DEMO_MODEL, *OPTIONS, *arguments)
    assert message in only_error_line(result)

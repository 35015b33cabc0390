"""`nanoflow plan show` and `nanoflow plan measure`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nf_runtime.pipeline.policy import OVERLAP_WORDS

DEMO_MODEL = str(Path(__file__).resolve().parents[3] / "models" / "nanoflow-demo")
OPTIONS = ["--load-format", "dummy", "--kv-cache-tokens", "16384", "--device", "cpu"]
Nanoflow = Callable[..., Any]
OnlyErrorLine = Callable[..., str]


def test_a_template_is_shown_with_its_lanes_and_their_order(nanoflow: Nanoflow) -> None:
    result = nanoflow("plan", "show", "nanoflow", "--model", DEMO_MODEL)
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "plan nanoflow"
    assert "nano-batches 0: 50% of all tokens, 1: 50% of all tokens" in lines
    assert "lanes compute 60%, memory 40%; exclusive" in lines
    place = lines.index("lane memory, for every layer:")
    assert lines[place + 1] == "decode_attention:0, decode_attention:1"
    assert "output_proj:1 (of the layer before)" in " ".join(lines)


def test_a_template_for_several_ranks_has_a_lane_for_collectives(nanoflow: Nanoflow) -> None:
    result = nanoflow(
        *("plan", "show", "two-batch", "--model", DEMO_MODEL, "--tensor-parallel-size", "2")
    )
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    place = lines.index("lane network, for every layer:")
    assert lines[place + 1].startswith(
        "output_all_reduce:0, output_all_reduce:1, down_all_reduce:0"
    )


def test_a_plan_can_be_changed_and_shown_again(nanoflow: Nanoflow, tmp_path: Path) -> None:
    as_json = nanoflow("plan", "show", "co-resident", "--model", DEMO_MODEL, "--json").stdout
    plan = json.loads(as_json)
    plan["name"] = "mine"
    plan["nano_batches"][0]["share"] = 0.25
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(plan))
    result = nanoflow("plan", "show", str(path), "--model", DEMO_MODEL)
    assert "0: 33% of all tokens, 1: 67% of all tokens" in result.stdout
    answer = nanoflow(
        *("timeline", DEMO_MODEL, *OPTIONS, "--overlap", str(path), "--iterations", "1", "--json"),
        *("--prefill", "0", "-o", str(tmp_path / "trace.json")),
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["plan"] == "mine"


def test_an_illegal_plan_is_refused_with_the_compilers_sentence(
    nanoflow: Nanoflow, only_error_line: OnlyErrorLine, tmp_path: Path
) -> None:
    plan = json.loads(
        nanoflow("plan", "show", "sequential", "--model", DEMO_MODEL, "--json").stdout
    )
    plan["operations"].reverse()
    path = tmp_path / "backwards.json"
    path.write_text(json.dumps(plan))
    result = nanoflow("plan", "show", str(path), "--model", DEMO_MODEL)
    assert "change the order of operations" in only_error_line(result)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "'nothing' is no file; expected one of sequential, nanoflow,"),
        ("two-batch", "one rank has none"),
        (str(Path(DEMO_MODEL) / "config.json"), "is no plan"),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(
    nanoflow: Nanoflow, only_error_line: OnlyErrorLine, source: str, message: str
) -> None:
    assert message in only_error_line(nanoflow("plan", "show", source, "--model", DEMO_MODEL))


def test_measured_plans_are_found_by_auto(nanoflow: Nanoflow, tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    result = nanoflow(
        *("plan", "measure", DEMO_MODEL, *OPTIONS, "--plan-dir", str(plans)),
        *("--rounds", "4", "--loads", "1x16,16x64,8x64+8,+32"),
    )
    assert result.returncode == 0, result.stderr
    assert "two-batch is left out: plan 'two-batch' overlaps collectives" in result.stdout
    lines = result.stdout.splitlines()
    assert any(line.startswith("1x16 ") and "no plan cuts it in two" in line for line in lines)
    assert any(line.startswith("8x64+8 ") and " to " in line for line in lines)
    (path,) = plans.glob("*.json")
    assert f"Plan set: {path} (`--overlap auto --plan-dir {plans}` finds it)" in result.stdout
    made = json.loads(path.read_text())
    assert (made["dtype"], made["tensor_parallel_size"]) == ("bfloat16", 1)
    assert made["peaks"]["flops_per_second"] > 0
    assert [bucket["tokens"] for bucket in made["buckets"]] == [[32, 32], [16, 16], [1, 4], [5, 16]]
    for bucket in made["buckets"]:
        assert (bucket["plan"] == "sequential") == (bucket["gain"] is None)
    answer = nanoflow(
        *("timeline", DEMO_MODEL, *OPTIONS, "--plan-dir", str(plans), "--decodes", "1"),
        *("--prefill", "0", "--iterations", "1", "--json", "-o", str(tmp_path / "trace.json")),
    )
    assert json.loads(answer.stdout)["reason"] == "planned"
    shown = nanoflow("plan", "show", str(path), "--model", DEMO_MODEL)
    assert "1 to 4 tokens, 75% to 100% of them decodes: sequential" in shown.stdout
    again = nanoflow(
        *("plan", "measure", DEMO_MODEL, *OPTIONS, "--plan-dir", str(plans)),
        *("--rounds", "4", "--loads", "16x64"),
    )
    assert again.returncode == 0, again.stderr
    assert f"Plan set: {path}.partial (`--overlap {path}.partial` takes it)" in again.stdout
    assert f"{path} knows more and stays as it is; remove it first" in again.stdout
    assert json.loads(path.read_text()) == made
    assert len(json.loads(Path(f"{path}.partial").read_text())["buckets"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loads", "many"], "load is 'many'; expected DECODESxCONTEXT"),
        (
            ["--loads", "8x16,300x1"],
            "load 300x1 has 300 requests, and the engine takes at most 256",
        ),
        (["-o", "no/such/folder/plans.json"], "whose folder does not exist"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    nanoflow: Nanoflow, only_error_line: OnlyErrorLine, arguments: list[str], message: str
) -> None:
    result = nanoflow("plan", "measure", DEMO_MODEL, *OPTIONS, *arguments)
    assert message in only_error_line(result)


@pytest.mark.parametrize("tokens_before", [None, 16, 17])
def test_what_was_measured_before_ctrl_c_is_saved(
    tokens_before: int | None, tmp_path: Path
) -> None:
    """In the place of what there is, unless that knows more."""
    output = saved = tmp_path / "plans.json"
    kept = "."
    if tokens_before is not None:
        plan = {"name": "mine", "nano_batches": [{}], "operations": []}
        bucket = {"tokens": [16, tokens_before], "plan": "mine"}
        output.write_text(json.dumps({"plans": [plan], "buckets": [bucket]}))
    if tokens_before == 17:
        saved = tmp_path / "plans.json.partial"
        kept = f"; {output} knows more and stays as it is."
    before = output.read_bytes() if output.exists() else b""
    loads = ",".join(["16x16"] + [f"16x{context}" for context in range(17, 200)])
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "nf_server.cli", "plan", "measure", DEMO_MODEL, *OPTIONS),
            *("--loads", loads, "--rounds", "10", "-o", str(output)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("two-batch is left out"):
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"Interrupted: what was measured by then is in {saved}{kept}" in text
    assert (output.read_bytes() == before) == (saved != output)
    made = json.loads(saved.read_text())
    assert [bucket["tokens"] for bucket in made["buckets"]] == [[16, 16]]


def test_help_names_every_word_of_overlap(nanoflow: Nanoflow) -> None:
    text = "".join(nanoflow("serve", "--help").stdout.split())
    for word in OVERLAP_WORDS:
        assert word in text

"""`nanoflow replay` repeats what a server decided, also one that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from nf_server.cli import app

Start = Callable[..., Any]
OPTIONS = ["--kv-cache-tokens", "512", "--max-model-len", "256", "--max-num-batched-tokens", "64"]


def nanoflow(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def load(server: Any) -> None:
    """Requests at once, of three tenants, one of which hangs up."""

    def ask(number: int) -> None:
        body = {
            "prompt": f"# {number}\ndef f_{number % 3}(x):",
            "max_tokens": 40,
            "n": 1 + number % 2,
        }
        headers = {"authorization": f"Bearer secret-key-{number % 3}"}
        url = f"{server.url}/v1/completions"
        if number == 5:
            with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers) as stream:
                next(stream.iter_lines())
            return
        assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == 200

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(12)))


def log_in(directory: Path) -> str:
    (path,) = directory.iterdir()
    return str(path)


def test_a_server_is_repeated(start_live: Start, tmp_path: Path) -> None:
    server = start_live(
        *OPTIONS, "--admission", "greedy", "--replay-log-dir", str(tmp_path / "log")
    )
    # A chunk that the altered log below has no room for, however the others come together.
    body = {"prompt": "x = 1\n" * 20, "max_tokens": 1}
    usage = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["usage"]
    assert usage["prompt_tokens"] > 24
    load(server)
    iterations = server.metric("nanoflow_iterations_total")
    preemptions = server.metric("nanoflow_preemptions_total")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    log = log_in(tmp_path / "log")
    assert b"secret-key" not in Path(log).read_bytes()

    command = [sys.executable, "-m", "nf_server.cli", "replay", log, "--show", ":2"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines[:3]] == [0, 1, 2]
    assert "running " in lines[0]
    assert lines[-1] == "the same decisions, to the end of the log: the engine was shut down"

    result = nanoflow("replay", log, "--json", "--show", "3:5")
    *shown, whole = [json.loads(line) for line in result.stdout.splitlines()]
    assert [values["iteration"] for values in shown] == [3, 4, 5]
    assert whole["iterations"] == iterations + 1  # and the warm-up
    assert whole["preemptions"] == preemptions
    assert whole["divergence"] is None
    assert whole["header"]["config"]["admission"] == "greedy"

    other = tmp_path / "other.replay"
    data = Path(log).read_bytes()
    other.write_bytes(
        data.replace(b'"max_num_batched_tokens": 64', b'"max_num_batched_tokens": 24')
    )
    result = nanoflow("replay", str(other))
    assert result.exit_code == 3
    assert "DIVERGED after " in result.stdout
    assert "in the log" in result.stdout


def test_a_server_that_was_killed_is_repeated(start_live: Start, tmp_path: Path) -> None:
    server = start_live(*OPTIONS, "--replay-log-dir", str(tmp_path / "log"))
    load(server)
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.process.wait(20)
    result = nanoflow("replay", log_in(tmp_path / "log"))
    assert result.exit_code == 0, result.stderr
    assert "the process was killed, or the engine still runs" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.replay"], "missing.replay cannot be read: No such file or directory"),
        ([__file__], "is no replay log; expected a file of --replay-log-dir"),
        ([__file__, "--show", "5"], "--show is '5'; expected FIRST:LAST"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    result = nanoflow("replay", *arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "nanoflow: error:" in line]
    assert message in line

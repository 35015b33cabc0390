"""A server that overlaps: the line at the start, and metrics that move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from nf_kernels import native_status

PLANNED = 'nanoflow_overlap_steps_total{mode="nanoflow",reason="planned"}'
ONE = 'nanoflow_overlap_steps_total{mode="sequential",reason="one_nano_batch"}'
REFERENCE = 'nanoflow_overlap_steps_total{mode="sequential",reason="reference"}'
GAIN = 'nanoflow_overlap_gain_ratio{mode="nanoflow"}'
PROMPT = "def fibonacci(n):"


def ask(server: Any, n: int) -> list[str]:
    body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "n": n, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def value(server: Any, name: str) -> float:
    """Of a metric; 0 before it has one."""
    return server.metric(name) if name in httpx.get(f"{server.url}/metrics").text else 0


@pytest.mark.skipif(not native_status().available, reason="needs the native kernels")
def test_steps_and_gain_appear_and_move(start_live: Callable[..., Any]) -> None:
    server = start_live("--overlap", "nanoflow", "--timeline-every", "1", "--dtype", "float32")
    assert "\n  Overlap: nanoflow\n" in server.banner
    (alone,) = ask(server, 1)
    planned, one, reference = (value(server, name) for name in (PLANNED, ONE, REFERENCE))
    assert one >= 10  # a decode alone is one nano-batch
    assert set(ask(server, 4)) == {alone}  # and plans change no token
    assert value(server, PLANNED) > planned
    assert value(server, REFERENCE) > reference
    assert value(server, GAIN) > 0
    assert ask(server, 1) == [alone]
    assert value(server, ONE) > one


def test_auto_finds_what_was_measured(
    start_live: Callable[..., Any], tmp_path: Path, measured_plans: Callable[[Path], None]
) -> None:
    measured_plans(tmp_path / "plans")
    server = start_live("--plan-dir", str(tmp_path / "plans"), "--no-native-programs")
    said = "Overlap: auto, of 2 kinds of batches nanoflow for 1; else sequential\n"
    assert said in server.banner
    ask(server, 4)
    assert value(server, PLANNED) > 0

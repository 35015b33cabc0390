"""The README's examples run, one after another, and find what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.M)
    namespace: dict[str, Any] = {}
    outputs = []
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
        outputs.append(capsys.readouterr().out)
    first, host, _, engine, generate = outputs
    assert "second: 32 tokens found" in first
    assert "third: 40 tokens need no computing" in host
    assert engine.splitlines() == [
        "first: 0 of 60 tokens found {}",
        "second: 48 of 110 tokens found {'device': 48}",
        "first: 69 of 70 tokens found {'device': 48, 'host': 21}",
        "again: 48 of 60 tokens found {'disk': 48}",
    ]
    assert generate.splitlines() == [
        "0 tokens were found {}",
        "96 tokens were found {'disk': 96}",
    ]

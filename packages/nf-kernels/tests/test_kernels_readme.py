"""The table of the README is the operations that there are."""

from __future__ import annotations

import re
from pathlib import Path

from nf_kernels.cost import CATEGORIES
from nf_kernels.ops import cpu

README = Path(__file__).parents[1] / "README.md"


def test_the_table_lists_every_operation_and_which_are_native():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \| (\w+) \|$", README.read_text("utf-8"), re.M)
    assert {name: category for name, category, _ in rows} == dict(CATEGORIES)
    assert {name for name, _, where in rows if where == "native"} == set(cpu.OPERATIONS)
    assert {where for *_, where in rows} == {"native", "torch"}

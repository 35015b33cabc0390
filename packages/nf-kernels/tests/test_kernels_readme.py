"""The table of the README is the operations that there are."""

from __future__ import annotations

import re
from pathlib import Path

from nf_kernels.cost import CATEGORIES
from nf_kernels.ops import OPERATION_NAMES

README = Path(__file__).parents[1] / "README.md"


def test_the_table_lists_every_operation_and_what_it_saturates():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", README.read_text("utf-8"), re.M)
    assert dict(rows) == {name: CATEGORIES[name] for name in OPERATION_NAMES}

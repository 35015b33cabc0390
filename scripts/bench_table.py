"""Make a Markdown table of a benchmark run: ``python scripts/bench_table.py RUN.json > RUN.md``.

RUN.json is what ``make bench`` writes. Times are the median of the rounds; the last column is what
a benchmark says of itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def table(run: dict[str, Any]) -> str:
    """Render a run as Markdown: the machine, then a row per benchmark."""
    machine = run["machine_info"]
    cpu = machine["cpu"]
    lines = [
        f"{cpu['brand_raw']}, {cpu['count']} cores, {machine['system']}, "
        f"Python {machine['python_version']}; {run['datetime'][:16].replace('T', ' ')}",
        "",
        "| benchmark | median | rounds | what it says |",
        "| --- | ---: | ---: | --- |",
    ]
    for benchmark in run["benchmarks"]:
        stats = benchmark["stats"]
        says = "; ".join(f"{name}: {value}" for name, value in benchmark["extra_info"].items())
        median = f"{stats['median'] * 1e3:,.1f} ms"
        lines.append(f"| {benchmark['name']} | {median} | {stats['rounds']} | {says} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make a Markdown table of a benchmark run.")
    parser.add_argument("run", type=Path, help="JSON written by pytest --benchmark-json")
    print(table(json.loads(parser.parse_args(arguments).run.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run one section of `make gpu-check` and write what it measures, point by point, to a file.

`python scripts/gpu_sections.py SECTION --out FILE --limit SECONDS [--roofs FILE] [--rehearse]`. A
section has a process of its own: a crash, or a compiler that does not end, takes nothing along.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_bench import Bench, Missing, OutOfTime, first_line
from gpu_section_attention import attention
from gpu_section_lanes import curves, pairs
from gpu_section_operations import operations
from gpu_section_pipeline import pipeline
from gpu_section_products import cutlass, products
from gpu_section_report import Report
from gpu_section_roofs import roofs

SECTIONS: dict[str, Callable[[Bench, Report], None]] = {
    "roofs": roofs,
    "attention": attention,
    "products": products,
    "cutlass": cutlass,
    "curves": curves,
    "pairs": pairs,
    "operations": operations,
    "pipeline": pipeline,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--roofs", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="  %(message)s")
    known = json.loads(options.roofs.read_text(encoding="utf-8")) if options.roofs else {}
    report = Report(options.out, known)
    try:
        bench = Bench(rehearse=options.rehearse, limit_s=options.limit)
        with torch.inference_mode():
            SECTIONS[options.section](bench, report)
        report.data["status"] = "done"
    except Missing as missing:
        report.data |= {"status": "skipped", "reason": str(missing)}
    except OutOfTime:
        report.data |= {"status": "cut", "reason": f"its {options.limit:.0f} s were up"}
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first_line(error)}"
        report.data |= {"status": "failed", "reason": reason}
    report.save()
    return 0 if report.data["status"] != "failed" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

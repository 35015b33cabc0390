"""The results of `make gpu-check` as JSON, as Markdown, and as a picture of the share curves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DECODE_BAR = 0.80  # of the copy's bandwidth
CUTLASS_BAR = 0.90  # of cuBLAS's best rate over a layer's products

_TITLES = {
    "build": "Building the CUDA library",
    "kernel tests": "Tests of nf-kernels",
    "other tests": "Tests of the other packages",
    "roofs": "Roofs",
    "attention": "Attention",
    "products": "Products of the operation set",
    "cutlass": "The CUDA library",
    "curves": "Share curves: one lane",
    "pairs": "Share curves: two lanes beside each other",
    "operations": "Operations",
    "pipeline": "Plans of the pipeline, Llama 3 8B, dummy weights",
}


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, and what came out."""
    found = []
    for row in _rows(results, "attention"):
        if "copy_share" in row:
            what = f"decode attention, {row['requests']} requests of {row['tokens']} tokens"
            what += f" by {row['set']}"
            found.append(
                {
                    "what": f"{what}, of the copy's bandwidth",
                    "value": row["copy_share"],
                    "bar": DECODE_BAR,
                }
            )
    timed = [row for row in _rows(results, "cutlass") if "cublas_ratio" in row]
    best_cublas = max((row["cublas_flops_per_second"] for row in timed), default=0.0)
    for product in dict.fromkeys(row["product"] for row in timed):
        row = max(
            (r for r in timed if r["product"] == product), key=lambda r: r["flops_per_second"]
        )
        found.append(
            {
                "what": f"{product}, {row['rows']} rows, {row['tile']}, of cuBLAS's best rate",
                "value": row["flops_per_second"] / best_cublas,
                "bar": CUTLASS_BAR,
            }
        )
    return found


def _rows(results: dict[str, Any], section: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = results["sections"].get(section, {}).get("rows", [])
    return rows


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if not isinstance(value, float):
        return str(value).replace("|", "/").replace("\n", " ")
    if name == "seconds":
        return f"{value * 1e6:,.1f} µs"
    if name.endswith("flops_per_second"):
        return f"{value * 1e-12:,.1f} TFLOP/s"
    if name.endswith("bytes_per_second"):
        return f"{value * 1e-9:,.0f} GB/s"
    return f"{value:.3f}"


def _tables(rows: list[dict[str, Any]]) -> Iterable[str]:
    """A table for each run of rows that have the same columns."""
    for names, group in itertools.groupby(rows, lambda row: [n for n in row if n != "unit"]):
        yield "| " + " | ".join(name.replace("_", " ") for name in names) + " |"
        yield "|" + " --- |" * len(names)
        for row in group:
            cells = [_cell(row["unit"] if name == "rate" else name, row[name]) for name in names]
            yield "| " + " | ".join(cells) + " |"
        yield ""


def markdown(results: dict[str, Any], picture: str | None) -> str:
    """The document."""
    lines = [
        f"# Kernels on {results['device']}, {results['date']}",
        "",
        f"torch {results['torch']}, CUDA {results['cuda']}. Written by `make gpu-check`; the same "
        "numbers, unrounded, are in the JSON file beside it.",
        "",
    ]
    if results["rehearsal"]:
        lines += [
            "A rehearsal: nothing here was measured on a device, and no number means anything.",
            "",
        ]
    if found := bars(results):
        lines += ["## Bars", "", "| what | result | bar | |", "| --- | --- | --- | --- |"]
        for entry in found:
            met = "met" if entry["value"] >= entry["bar"] else "missed"
            lines.append(f"| {entry['what']} | {entry['value']:.3f} | {entry['bar']:.2f} | {met} |")
        lines.append("")
    if picture:
        lines += [f"![Share curves]({picture})", ""]
    for name, section in results["sections"].items():
        lines += [f"## {_TITLES[name]}", ""]
        said = section["status"] + (f": {section['reason']}" if section.get("reason") else "")
        taken = f" ({section['seconds']:.0f} s)" if section.get("seconds") else ""
        lines += [f"{said}{taken}", ""]
        if section.get("rows"):
            lines += _tables(section["rows"])
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw the share curves; False where there are none, or nothing to draw with."""
    rows = [row for row in _rows(results, "curves") if "rate" in row]
    if not rows:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for mechanism, work in dict.fromkeys((row["mechanism"], row["work"]) for row in rows):
        points = [row for row in rows if (row["mechanism"], row["work"]) == (mechanism, work)]
        highest = max(point["rate"] for point in points)
        axes.plot(
            [point["units"] for point in points],
            [point["rate"] / highest for point in points],
            marker=".",
            label=f"{work}, {mechanism}",
        )
    axes.set_xlabel("units of the lane")
    axes.set_ylabel("part of the best rate")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True


def write(results: dict[str, Any], stem: Path) -> None:
    """Write the files of a run, as far as it has come."""
    results["bars"] = bars(results)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    picture = stem.with_suffix(".svg")
    drawn = draw(results, picture)
    text = markdown(results, picture.name if drawn else None)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")

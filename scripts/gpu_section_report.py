"""What a section of `make gpu-check` has found so far, on disk."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from gpu_bench import Bench

from nf_kernels import cost
from nf_kernels.ops import REFERENCE


class Report:
    """What a section has found so far, on disk."""

    def __init__(self, path: Path, roofs: dict[str, float]) -> None:
        self._path = path
        self._started = time.monotonic()
        self.roofs = roofs
        self.data: dict[str, Any] = {
            "status": "running",
            "reason": "",
            "seconds": 0.0,
            "rows": [],
            "functions": {},
        }

    def row(self, **values: Any) -> None:
        """Add a line to the section's table."""
        self.data["rows"].append(values)
        self.save()
        print("  " + ", ".join(f"{k} {_shown(v)}" for k, v in values.items()), flush=True)

    def measured(self, function: str, **detail: Any) -> None:
        """Say that a function of the project was run and timed."""
        entry = self.data["functions"].setdefault(function, {"status": "measured", "detail": {}})
        entry["detail"].update(detail)

    def measured_operation(self, bench: Bench, name: str, **detail: Any) -> None:
        """The same of an operation, if it was that of the device and not plain torch."""
        if bench.operations is not REFERENCE:
            self.measured(f"op/{name}", **detail)

    def failed(self, function: str, error: Exception) -> None:
        """Say that a function of the project failed, which it stays, whatever else is measured."""
        entry = self.data["functions"].setdefault(function, {"detail": {}})
        entry["status"] = "failed"
        entry["detail"]["error"] = str(error)[:500] or type(error).__name__

    def failed_operation(self, bench: Bench, name: str, error: Exception) -> None:
        """The same of an operation, if it was that of the device and not plain torch."""
        if bench.operations is not REFERENCE:
            self.failed(f"op/{name}", error)

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self._started, 1)
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.data), encoding="utf-8")
        os.replace(unfinished, self._path)

    def bound(self, work: cost.Cost) -> float:
        """Seconds that the roofs allow."""
        return cost.peak_time(
            work,
            flops_per_second=self.roofs["flops_per_second"],
            bytes_per_second=self.roofs["bytes_per_second"],
        )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Run the tests that need a CUDA device, with this Python, straight from the sources.

Nothing needs to be installed but torch, pytest and what the tests import:
``python3 scripts/gpu_check.py [pytest arguments]``. Without a CUDA device it says so and fails,
because nothing was checked.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    missing = [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu-check: {sys.executable} has no {' and no '.join(missing)}; nothing was checked")
        return 1
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA device; nothing was checked")
        return 1
    print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    sources = [str(path) for path in sorted(ROOT.glob("*/*/src"))]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*sources, *([inherited] if inherited else [])])
    return subprocess.call(
        [sys.executable, "-m", "pytest", "-m", "gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

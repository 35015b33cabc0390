"""For all tests: Ctrl+C works, processes start fast, and what needs a CUDA device is skipped where
there is none.
"""

from __future__ import annotations

import os
import signal
import sys

import pytest


def pytest_configure() -> None:
    # Where bytecode is not kept, as is usual in containers, each process that a test starts
    # compiles torch and all else that it imports: seconds, more than a hundred times.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # A shell starts what it puts into the background with Ctrl+C ignored, and so would every
    # process that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        reason = f"needs a CUDA device; torch {torch.__version__} sees none"
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))

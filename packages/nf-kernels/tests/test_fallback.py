"""Without the extension everything runs in plain torch, and one line says so."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from nf_kernels import native_status, ops

# Makes an import fail as it does where the module is not installed, or with another error.
HIDE = """
    import sys

    class Hide:
        def __init__(self, name, error):
            self.name, self.error = name, error

        def find_spec(self, name, path=None, target=None):
            if name == self.name:
                raise self.error

    def hide(name, error=ModuleNotFoundError):
        sys.meta_path.insert(0, Hide(name, error))
"""

# First without asking for native kernels, then twice with, as several parts of a program do.
LOAD = """
    from nf_kernels import native_status, ops

    assert ops.load("cpu", native=False) is ops.REFERENCE
    print("asked", file=sys.stderr)
    assert ops.load("cpu") is ops.REFERENCE
    assert ops.load("cpu") is ops.REFERENCE
    status = native_status()
    assert status == native_status()
    assert not status.available
    assert not status.isa
    print(status.reason)
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "NANOFLOW_NATIVE_KERNELS"}
    code = textwrap.dedent(HIDE) + textwrap.dedent(script)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize(("script", "environment", "reason"), [
    (
        "hide('nf_kernels._cpu')",
        {},
        "nf-kernels was installed without a C++ compiler or Python's headers; "
        "install them and reinstall nf-kernels for speed",
    ),
    (
        "hide('nf_kernels._cpu', ImportError('undefined symbol: here'))",
        {},
        "the extension does not load: undefined symbol: here",
    ),
    ("", {"NANOFLOW_NATIVE_KERNELS": "0"}, "switched off by NANOFLOW_NATIVE_KERNELS=0"),
], ids=["not installed", "does not load", "switched off"])  # fmt: skip
def test_plain_torch_takes_over_and_says_why_once(script, environment, reason):
    result = run(script + textwrap.dedent(LOAD), **environment)
    assert result.stdout == reason + "\n"
    assert result.stderr == f"asked\nCPU kernels run in plain torch: {reason}.\n"


def test_the_package_and_its_costs_import_without_torch():
    result = run("""
        hide("torch")
        import nf_kernels, nf_kernels.cost

        assert nf_kernels.cost.CATEGORIES["linear"] is nf_kernels.cost.Category.COMPUTE
    """)
    assert result.stderr == ""


def test_native_status_names_the_instruction_set(native):
    status = native_status()
    assert status.available
    assert not status.reason
    assert status.isa in {"amx", "avx512_bf16", "avx512", "avx2", "generic"}
    assert not {name for name in native if native[name] is ops.REFERENCE[name]}

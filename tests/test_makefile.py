"""The Makefile and its scripts: help, the folder of wheels, clear lines for what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def outer_environment() -> dict[str, str]:
    """The environment without what `make test` itself adds for the makes below it."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    return {k: v for k, v in os.environ.items() if k not in inherited}


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = outer_environment()
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_lists_the_targets() -> None:
    result = make("help")
    assert result.returncode == 0
    listed = set(re.findall(r"^  make ([a-z-]+) ", result.stdout, flags=re.MULTILINE))
    expected = {"serve", "test", "setup", "lint", "bench", "bench-check", "test-long", "gpu-check"}
    expected |= {"lock", "lock-check", "clean", "help", "asan", "cuda-build", "gpu-status"}
    assert expected <= listed


def test_serve_passes_model_host_and_port_through() -> None:
    result = make("-n", "serve", "MODEL=some/model", "HOST=0.0.0.0", "PORT=9000")
    assert "nanoflow serve 'some/model' --host '0.0.0.0' --port '9000'" in result.stdout


def test_serve_defaults_to_the_demo_model_on_this_machine_alone() -> None:
    result = make("-n", "serve")
    assert "nanoflow serve 'models/nanoflow-demo' --host '127.0.0.1' --port '8000'" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "-m nf_kernels.cuda.build"),
        (["TILES=a b"], "-m nf_kernels.cuda.build --tiles a b"),
        (["TILES=a", "ARGS=--jobs 1"], "-m nf_kernels.cuda.build --tiles a --jobs 1"),
    ],
)
def test_cuda_build_passes_tiles_through(arguments: list[str], expected: str) -> None:
    last = make("-n", "cuda-build", *arguments).stdout.splitlines()[-1]
    assert last.strip().endswith(expected)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PIP_FIND_LINKS": "/a/wheels /b"}, "/a/wheels,/b"),
        ({"PIP_FIND_LINKS": "/a/wheels", "UV_FIND_LINKS": "/mine"}, "/mine"),
    ],
)
def test_uv_looks_where_pip_is_told_to_find_wheels(
    environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    probe = tmp_path / "probe.mk"
    probe.write_text(f'include {ROOT}/Makefile\nprobe:\n\t@echo "$$UV_FIND_LINKS"\n', "utf-8")
    env = {k: v for k, v in outer_environment().items() if not k.endswith("FIND_LINKS")}
    result = subprocess.run(
        ["make", "-f", str(probe), "probe"],
        cwd=ROOT,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.strip() == expected


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Path:
    """A copy of what setup reads first, without .venv."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    return tmp_path


def test_an_old_python_is_one_clear_line(bare_checkout: Path) -> None:
    old = bare_checkout / "python3.9"
    old.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18 && exit\nexit 1\n', "utf-8"
    )
    old.chmod(0o755)
    result = subprocess.run(
        [bare_checkout / "scripts/setup.sh"],
        env={**os.environ, "PYTHON": str(old), "TORCH": "torch"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "needs Python 3.11 or newer" in line
    assert "Python 3.9.18" in line
    assert not (bare_checkout / ".venv").exists()


def test_no_python_at_all_is_one_clear_line(bare_checkout: Path) -> None:
    tools = bare_checkout / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "grep", "head"):
        (tools / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        ["bash", bare_checkout / "scripts/setup.sh"],
        env={"PATH": str(tools), "TORCH": "torch"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    (line,) = (result.stdout + result.stderr).splitlines()
    assert "python3 here is not installed" in line


def test_gpu_check_says_so_where_there_is_no_gpu() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    result = make("gpu-check")
    assert result.returncode != 0
    assert "sees no CUDA device; nothing was checked" in result.stdout

"""What compiles the CUDA library: nvcc, and the headers of CUTLASS."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HEADERS_REQUIREMENT = "nvidia-cutlass==4.2.*"
_HEADERS_VERSION = (4, 2)
_ARCHITECTURE = "sm_90"  # nvcc lists no sm_90a, but every one that knows this knows that


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler and headers that fit.

    Attributes:
        nvcc: The compiler.
        nvcc_version: All that it says of itself.
        headers: Folder with `cutlass/` and `cute/`.
        headers_version: Such as `4.2.0`.
    """

    nvcc: Path
    nvcc_version: str
    headers: Path
    headers_version: str

    @property
    def nvcc_release(self) -> str:
        """Such as `13.0.88`; empty if the compiler does not say."""
        found = re.search(r"\bV(\d+(?:\.\d+)+)", self.nvcc_version)
        return found[1] if found else ""


def find_toolchain() -> Toolchain:
    """The toolchain of this machine.

    Raises:
        RuntimeError: Something is missing or does not fit; says what to install.
    """
    nvcc = _find_nvcc()
    headers = _find_headers()
    return Toolchain(nvcc, _check_nvcc(nvcc), headers, _check_headers(headers))


def _find_nvcc() -> Path:
    named = os.environ.get("CUDACXX")
    if named:
        found = shutil.which(named)
        if found is None:
            raise RuntimeError(
                f"CUDACXX is {named!r}, which cannot be run; name an nvcc, or unset it"
            )
        return Path(found)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in homes] + ["/usr/local/cuda/bin"]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        raise RuntimeError(
            "no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda; install the CUDA toolkit "
            "(13.0 is tested), or name its nvcc in CUDACXX"
        )
    return Path(found)


def _check_nvcc(nvcc: Path) -> str:
    """The version of a compiler that knows the architecture."""
    architectures, version = (
        subprocess.run([nvcc, option], capture_output=True, text=True, check=False).stdout
        for option in ("--list-gpu-code", "--version")
    )
    if _ARCHITECTURE not in architectures.split():
        raise RuntimeError(
            f"{nvcc} does not compile for {_ARCHITECTURE}; install CUDA toolkit 12.0 or newer "
            f"(13.0 is tested)"
        )
    return version.strip()


def _find_headers() -> Path:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            f"the headers of CUTLASS are missing; pip install --no-deps '{HEADERS_REQUIREMENT}'"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "source" / "include"


def _check_headers(headers: Path) -> str:
    """The version of headers that the kernels are written for."""
    try:
        text = (headers / "cutlass" / "version.h").read_text(encoding="utf-8")
    except OSError:
        text = ""
    numbers = re.findall(r"^#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", text, re.MULTILINE)
    if tuple(map(int, numbers[:2])) != _HEADERS_VERSION:
        have = f"CUTLASS {'.'.join(numbers)}" if numbers else "no CUTLASS"
        raise RuntimeError(f"{headers} holds {have}; pip install --no-deps '{HEADERS_REQUIREMENT}'")
    return ".".join(numbers)

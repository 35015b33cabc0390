"""Run the tests of the native CPU extension under AddressSanitizer and UBSan: ``make asan``.

``python scripts/asan.py [pytest arguments]`` builds the extension, instrumented, into build/asan,
proves with an access out of bounds on each instruction set that it is watched, and runs its tests.
Python and torch are not instrumented; what the extension does to their memory is seen, because
they allocate through the sanitizer. Not seen: what AMX loads and stores (assembly), and masked
vector accesses.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "packages" / "nf-kernels"
BUILD = ROOT / "build" / "asan"
TESTS = [*sorted(PACKAGE.glob("tests/test_native_*.py")), PACKAGE / "tests" / "test_lanes.py"]

# Python runs this at its start: the instrumented extension takes the place of the installed one.
SITE = """
import importlib.util
import sys


class Instrumented:
    def find_spec(self, name, path=None, target=None):
        if name == "nf_kernels._cpu":
            return importlib.util.spec_from_file_location(name, {extension!r})
        return None


sys.meta_path.insert(0, Instrumented())
"""

# Two rows are written where there is room for one.
CONTROL = """
import sys

import numpy

from nf_kernels.native import native_module

module = native_module()
module.use_isa(sys.argv[1])
gate_up = numpy.ones((2, 128), numpy.float32)
out = numpy.empty((1, 64), numpy.float32)
module.swiglu(0, gate_up.ctypes.data, out.ctypes.data, 2, 64, 128, 64)
"""

ISAS = "from nf_kernels.native import native_module; print(*native_module().usable_isas())"


def find(program: str) -> str:
    """A program beside this Python, or on the PATH."""
    found = shutil.which(program, path=Path(sys.executable).parent) or shutil.which(program)
    if found is None:
        raise RuntimeError(f"no {program} beside {sys.executable} nor on the PATH")
    return found


def sanitizer_libraries() -> str:
    """What Python must load first: the sanitizer, and the library whose exceptions it watches."""
    compiler = find("g++")
    paths = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    missing = [path for path in paths if not os.path.isabs(path)]
    if missing:
        raise RuntimeError(f"{compiler} has no {missing[0]}; install GCC's sanitizer libraries")
    return " ".join(paths)


def build() -> Path:
    """The extension, instrumented."""
    directory = subprocess.check_output(
        [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
    ).strip()
    cmake = find("cmake")
    settings = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_CXX_COMPILER": find("g++"),
        "NF_SANITIZE": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": directory,
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run([cmake, "-S", PACKAGE, "-B", BUILD, "--log-level=WARNING", *options], check=True)
    subprocess.run([cmake, "--build", BUILD, "--target", "_cpu"], check=True)
    (extension,) = BUILD.glob("_cpu.*.so")
    return extension


def environment(extension: Path) -> dict[str, str]:
    """Of a Python whose nf_kernels has the instrumented extension."""
    site = BUILD / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(extension=str(extension)), encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH")
    path = [str(site), str(PACKAGE / "src"), *([inherited] if inherited else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "LD_PRELOAD": sanitizer_libraries(),
        # Python and torch keep memory until the process ends, which is no leak of the extension.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Small objects of Python's own allocator lie side by side, with nothing watched between.
        "PYTHONMALLOC": "malloc",
    }


def check_that_it_is_watched(env: dict[str, str]) -> None:
    """Fail unless an access out of bounds is reported on every instruction set."""
    isas = subprocess.check_output([sys.executable, "-c", ISAS], env=env, text=True).split()
    for isa in isas:
        result = subprocess.run(
            [sys.executable, "-c", CONTROL, isa], env=env, capture_output=True, text=True
        )
        if result.returncode == 0 or "heap-buffer-overflow" not in result.stderr:
            raise RuntimeError(
                f"a write out of bounds by {isa} went unreported (exit status "
                f"{result.returncode}): {result.stderr.strip()[-500:]}"
            )
    print(f"asan: a write out of bounds is reported on {', '.join(isas)}", flush=True)


def main(arguments: list[str]) -> int:
    try:
        env = environment(build())
        check_that_it_is_watched(env)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"asan: {error}", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "pytest", "--timeout=1800", *map(str, TESTS), *arguments]
    return subprocess.call(command, cwd=ROOT, env=env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

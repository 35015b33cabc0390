"""Run the tests of the native extensions under AddressSanitizer and UBSan: ``make asan``.

``python scripts/asan.py [pytest arguments]`` builds those of nf-kernels and nf-kvcache,
instrumented, into build/asan, proves with an access out of bounds on each instruction set that the
kernels are watched, and runs their tests. Python and torch are not instrumented; what an extension
does to their memory is seen, because they allocate through the sanitizer. Not seen: what AMX loads
and stores (assembly), masked vector accesses, and what the kernel does by order of io_uring.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "packages" / "nf-kernels"
KVCACHE = ROOT / "packages" / "nf-kvcache"
BUILD = ROOT / "build" / "asan"
TESTS = [
    *sorted(KERNELS.glob("tests/test_native_*.py")),
    KERNELS / "tests" / "test_lanes.py",
    *sorted(KERNELS.glob("tests/test_program*.py")),
    KVCACHE / "tests" / "test_prefix_index.py",
    KVCACHE / "tests" / "test_kv_cache_machine.py",
    KVCACHE / "tests" / "test_disk_block_io.py",
]

# Python runs this at its start: instrumented extensions take the place of the installed ones.
SITE = """
import importlib.util
import sys

EXTENSIONS = {extensions!r}


class Instrumented:
    def find_spec(self, name, path=None, target=None):
        if name in EXTENSIONS:
            return importlib.util.spec_from_file_location(name, EXTENSIONS[name])
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


def build() -> dict[str, str]:
    """The extensions, instrumented: files by the names of their modules."""
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
    extensions: dict[str, str] = {}
    for package, targets in ((KERNELS, ["--target", "_cpu"]), (KVCACHE, [])):
        folder = BUILD / package.name
        configure = [cmake, "-S", package, "-B", folder, "--log-level=WARNING", *options]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", folder, *targets], check=True)
        module = package.name.replace("-", "_")
        for file in folder.glob("_*.so"):
            extensions[f"{module}.{file.name.partition('.')[0]}"] = str(file)
    print(f"asan: instrumented {', '.join(sorted(extensions))}", flush=True)
    return extensions


def environment(extensions: dict[str, str]) -> dict[str, str]:
    """Of a Python whose packages have the instrumented extensions."""
    site = BUILD / "site"
    site.mkdir(exist_ok=True)
    text = SITE.format(extensions=extensions)
    (site / "sitecustomize.py").write_text(text, encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH")
    sources = [str(package / "src") for package in (KERNELS, KVCACHE)]
    path = [str(site), *sources, *([inherited] if inherited else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "LD_PRELOAD": sanitizer_libraries(),
        # Python and torch keep memory until the process ends, which is no leak of the extensions.
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

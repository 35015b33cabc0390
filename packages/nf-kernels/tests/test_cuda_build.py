"""The build of the CUDA library: what it compiles, what it leaves, what it says when it cannot.

A script stands in for nvcc: it writes down what it was called with and makes empty files.
`test_cuda_library.py` compiles with the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nf_kernels.cuda import build as build_module
from nf_kernels.cuda import place, sources, toolchain
from nf_kernels.cuda.build import build, main
from nf_kernels.cuda.tiles import all_tiles

NVCC = """#!/bin/sh
case "$1" in
    --list-gpu-code) echo "$ARCHITECTURES"; exit ;;
    --version) echo "release, V$VERSION.88"; exit ;;
esac
echo "$@" >> "$CALLS"
for last; do :; done
case "$last" in
    *"${BROKEN:-nothing}"*) echo "x.cuh(7): error: no such thing"; exit 2 ;;
esac
echo object > "$last"
"""

TILES = all_tiles()[:2]
KERNELS = [sources.kernel_name(tile, dtype) for tile in TILES for dtype in sources.DTYPES]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with an nvcc and headers that fit."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    headers = tmp_path / "cutlass_library"
    write_version(headers, 4, 2, 0)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("ARCHITECTURES", "sm_80\nsm_90")
    monkeypatch.setenv("VERSION", "13.0")
    monkeypatch.setenv("BROKEN", "")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_version(package, major, minor, patch):
    folder = package / "source" / "include" / "cutlass"
    folder.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    numbers = zip(("MAJOR", "MINOR", "PATCH"), (major, minor, patch), strict=True)
    lines = [f"#define CUTLASS_{name} {number} \n" for name, number in numbers]
    (folder / "version.h").write_text("".join(lines))


def run(machine, **options):
    """Build two tiles; gives what was compiled, and the lines of progress."""
    calls = machine / "calls"
    calls.write_text("")
    lines: list[str] = []
    build(
        [*TILES, TILES[0]],
        library=machine / "out" / "libnf_cuda.so",
        objects=machine / "objects",
        jobs=2,
        report=lines.append,
        **options,
    )
    compiled = [call.split("/")[-1] for call in calls.read_text().splitlines() if " -c " in call]
    return sorted(name.removesuffix(".o") for name in compiled), lines


def test_all_is_compiled_once_and_linked(machine):
    compiled, lines = run(machine)
    assert compiled == sorted([*KERNELS, "tiles", "nf_cuda"])
    assert (machine / "out" / "libnf_cuda.so").is_file()
    assert [line.split("]")[0] for line in lines[:-1]] == [f"[{i}/6" for i in range(1, 7)]
    assert lines[-1] == f"wrote {machine / 'out' / 'libnf_cuda.so'}"
    last = (machine / "calls").read_text().splitlines()[-1]
    assert "-cudart=static" in last
    assert last.count(".o ") == 6

    record = json.loads((machine / "objects" / build_module.RECORD).read_text())
    assert record["kernels"] == [*KERNELS, "copy"]
    assert record["fingerprint"] == sources.fingerprint()
    assert (record["nvcc"], record["cutlass"]) == ("13.0.88", "4.2.0")

    compiled, lines = run(machine)
    assert compiled == []
    assert lines[0] == "6 of 6 files are up to date"


@pytest.mark.parametrize("missing", ["o", "key"])
def test_what_is_gone_is_compiled_again(machine, missing):
    run(machine)
    (machine / "objects" / f"{KERNELS[1]}.{missing}").unlink()
    assert run(machine)[0] == [KERNELS[1]]


def test_a_change_compiles_what_it_is_in(machine, monkeypatch):
    run(machine)
    copy = machine / "csrc"
    shutil.copytree(sources.folder(), copy)
    monkeypatch.setattr(sources, "folder", lambda: copy)
    assert run(machine)[0] == []
    with (copy / "nf_cuda.cu").open("a") as file:
        file.write("// changed\n")
    assert run(machine)[0] == ["nf_cuda", "tiles"]  # the fingerprint is in the table
    with (copy / "gemm_kernel.cuh").open("a") as file:
        file.write("// changed\n")
    assert len(run(machine)[0]) == 6
    monkeypatch.setenv("VERSION", "13.1")
    assert len(run(machine)[0]) == 6
    write_version(machine / "cutlass_library", 4, 2, 1)
    assert len(run(machine)[0]) == 6


def test_one_dtype_can_be_built_alone_and_twice_is_once(machine):
    compiled, _ = run(machine, dtypes=["float16", "float16"])
    assert compiled == sorted([*KERNELS[1::2], "tiles", "nf_cuda"])


def test_a_file_that_does_not_compile_is_named_and_tried_again(machine, monkeypatch):
    run(machine)
    before = (machine / "out" / "libnf_cuda.so").stat().st_mtime_ns
    (machine / "objects" / f"{KERNELS[0]}.o").unlink()
    monkeypatch.setenv("BROKEN", KERNELS[0])
    with pytest.raises(RuntimeError) as failure:
        run(machine)
    log = machine / "objects" / f"{KERNELS[0]}.log"
    assert str(failure.value) == (
        f"{KERNELS[0]} does not compile: x.cuh(7): error: no such thing; all of it is in {log}"
    )
    assert "no such thing" in log.read_text()
    assert (machine / "out" / "libnf_cuda.so").stat().st_mtime_ns == before
    monkeypatch.setenv("BROKEN", "")
    assert run(machine)[0] == [KERNELS[0]]


def test_a_failed_link_leaves_the_old_library(machine, monkeypatch):
    run(machine)
    monkeypatch.setenv("BROKEN", "libnf_cuda.so")
    with pytest.raises(RuntimeError, match="link does not compile"):
        run(machine)
    assert [path.name for path in (machine / "out").iterdir()] == ["libnf_cuda.so"]


@pytest.mark.parametrize(("tiles", "dtypes", "message"), [
    ([], ["float16"], "tiles is empty; expected one tile or more"),
    (TILES, [], r"dtypes is \[\]; expected some of \['bfloat16', 'float16'\]"),
    (TILES, ["float64"], r"dtypes is \['float64'\]; expected some of"),
])  # fmt: skip
def test_nothing_or_something_unknown_is_refused(tiles, dtypes, message):
    with pytest.raises(ValueError, match=message):
        build(tiles, dtypes=dtypes)


def test_no_nvcc_is_one_line(machine, monkeypatch):
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None)
    with pytest.raises(RuntimeError, match=r"no nvcc on the PATH.*install the CUDA toolkit"):
        toolchain.find_toolchain()


def test_an_nvcc_for_older_devices_alone_is_one_line(machine, monkeypatch):
    monkeypatch.setenv("ARCHITECTURES", "sm_80 sm_86")
    with pytest.raises(RuntimeError, match=r"nvcc does not compile for sm_90; install CUDA"):
        toolchain.find_toolchain()


def test_headers_of_another_version_are_one_line(machine):
    write_version(machine / "cutlass_library", 3, 9, 2)
    with pytest.raises(RuntimeError, match=r"holds CUTLASS 3\.9\.2; pip install .*4\.2\.\*"):
        toolchain.find_toolchain()
    shutil.rmtree(machine / "cutlass_library" / "source")
    with pytest.raises(RuntimeError, match=r"holds no CUTLASS; pip install"):
        toolchain.find_toolchain()


def test_no_headers_are_one_line(machine, monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"the headers of CUTLASS are missing; pip install"):
        toolchain.find_toolchain()


def test_the_command_fails_in_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "nf_kernels.cuda.build"],
        env={**os.environ, "CUDACXX": "no-such-nvcc"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        "cuda-build: CUDACXX is 'no-such-nvcc', which cannot be run; name an nvcc, or unset it\n"
    )


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tiles", "9x9"], "tile is '9x9'; expected one of 16x64x128_1x1_pingpong, "),
    (["--dtypes", "int8"], "dtypes is ['int8']; expected some of"),
    (["--jobs", "0"], "--jobs is 0; expected 1 or more"),
])  # fmt: skip
def test_wrong_arguments_fail_in_one_line(machine, capsys, arguments, message):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_memory_and_cores_limit_the_jobs(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    for gigabytes, jobs in ((200, 16), (30, 8), (3, 1), (0, 1)):
        monkeypatch.setattr(build_module, "_free_memory", lambda free=gigabytes: free * 2**30)
        assert build_module._default_jobs() == jobs


def test_free_memory_is_that_of_the_system_or_less():
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < build_module._free_memory() <= total


def test_what_cannot_be_kept_beside_the_package_goes_into_the_cache(machine, monkeypatch):
    beside, cached = place.libraries()
    assert beside.parent == Path(place.__file__).parent
    assert cached == machine / "cache/nanoflow/cuda" / sources.fingerprint() / "libnf_cuda.so"
    for writable, expected in ((True, beside), (False, cached)):
        monkeypatch.setattr(place.os, "access", lambda path, mode, answer=writable: answer)
        assert place.library_to_build() == expected


def test_an_installed_package_finds_its_sources_and_builds_in_the_cache(machine):
    package = machine / "site" / "nf_kernels"
    original = Path(sources.__file__).parents[1]
    shutil.copytree(original, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(sources.folder(), package / "cuda" / "csrc")
    code = (
        "from nf_kernels.cuda import place, sources\n"
        "print(sources.folder(), place.object_folder(), sources.fingerprint(), sep='\\n')"
    )
    # -S: without what is installed for this Python.
    said = subprocess.check_output(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": str(machine / "site")},
        text=True,
        cwd=machine,
    ).splitlines()
    assert said == [
        str(package / "cuda" / "csrc"),
        str(machine / "cache/nanoflow/cuda/objects"),
        sources.fingerprint(),
    ]

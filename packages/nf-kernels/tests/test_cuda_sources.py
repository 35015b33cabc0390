"""What the CUDA library is compiled from agrees with the table, the header and ctypes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest

from nf_kernels.cuda import abi, sources
from nf_kernels.cuda.tiles import SCHEDULES, all_tiles

HEADER = (sources.folder() / "nf_cuda.h").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", sources.DTYPES)
@pytest.mark.parametrize("tile", all_tiles(), ids=str)
def test_a_kernel_is_its_row_of_the_table(tile, dtype):
    source = sources.kernel_source(tile, dtype)
    (arguments,) = re.findall(r"= Gemm<(.*)>::kKernel;", source)
    element, *sizes, schedule, swapped = arguments.split(", ")
    assert element == {"bfloat16": "cutlass::bfloat16_t", "float16": "cutlass::half_t"}[dtype]
    assert list(map(int, sizes)) == [tile.rows, tile.columns, tile.depth, *tile.cluster]
    assert schedule.removeprefix("Schedule::k").lower() == tile.schedule.replace("_", "")
    assert swapped == ("true" if tile.swapped else "false")
    assert source.count(sources.kernel_name(tile, dtype)) == 2


def test_the_schedules_of_the_table_are_those_of_the_kernels():
    kernels = (sources.folder() / "gemm_kernel.cuh").read_text(encoding="utf-8")
    (body,) = re.findall(r"enum class Schedule \{(.*?)\};", kernels, re.DOTALL)
    names = re.findall(r"^  k(\w+),", body, re.MULTILINE)
    assert [name.lower() for name in names] == [name.replace("_", "") for name in SCHEDULES]


def test_the_library_lists_what_was_asked_for():
    tiles = all_tiles()[1:3]
    source = sources.table_source(tiles, ["float16"])
    rows = re.findall(r'\{"(\w+)", \{(\w+), &(\w+)\}\}', source)
    assert rows == [(t.name, "nullptr", sources.kernel_name(t, "float16")) for t in tiles]
    assert "kNumGemmTiles = 2;" in source
    assert f'kFingerprint[] = "{sources.fingerprint()}"' in source


@pytest.mark.parametrize("name", [*sources.HEADERS, "nf_cuda.cu", sources.EXPORTS])
def test_a_change_of_any_source_changes_the_fingerprint(name, tmp_path, monkeypatch):
    before = sources.fingerprint()
    copy = tmp_path / "csrc"
    shutil.copytree(sources.folder(), copy)
    monkeypatch.setattr(sources, "folder", lambda: copy)
    assert sources.fingerprint() == before
    with (copy / name).open("a", encoding="utf-8") as file:
        file.write("\n")
    assert sources.fingerprint() != before


def test_every_function_of_the_header_is_bound_with_as_many_arguments():
    declared = re.findall(r"^NF_CUDA_API [^(]*?(\w+)\(([^)]*)\);", HEADER, re.MULTILINE)
    counts = {
        name: 0 if arguments == "void" else arguments.count(",") + 1 for name, arguments in declared
    }
    assert counts == {name: len(arguments) for name, (_, arguments) in abi.FUNCTIONS.items()}


def test_dtypes_are_numbered_as_in_the_header():
    numbers = {name: int(n) for name, n in re.findall(r"NF_CUDA_(\w*FLOAT16) = (\d)", HEADER)}
    assert [name.upper() for name in sources.DTYPES] == sorted(numbers, key=numbers.__getitem__)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_header_is_c_and_its_struct_lies_as_ctypes_has_it(tmp_path):
    fields = [name for name, _ in abi.GemmProblem._fields_]
    prints = "".join(
        f'printf("%zu ", offsetof(struct nf_cuda_gemm_problem, {name}));' for name in fields
    )
    (tmp_path / "probe.c").write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        '#include "nf_cuda.h"\n'
        f"int main(void) {{ {prints} "
        'printf("%zu %d", sizeof(struct nf_cuda_gemm_problem), NF_CUDA_WRONG_DEVICE); return 0; }\n'
    )
    command = ["cc", "-std=c99", "-Wall", "-Werror", f"-I{sources.folder()}", "probe.c"]
    subprocess.run([*command, "-o", "probe"], cwd=tmp_path, check=True)
    said = subprocess.check_output([tmp_path / "probe"], text=True).split()
    *offsets, size, wrong_device = map(int, said)
    assert offsets == [getattr(abi.GemmProblem, name).offset for name in fields]
    assert (size, wrong_device) == (ctypes.sizeof(abi.GemmProblem), abi.WRONG_DEVICE)

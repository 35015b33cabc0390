"""The CUDA library without a device: one tile is compiled, loaded and asked, none launched."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import torch

from nf_kernels.cuda import abi, library, place, sources
from nf_kernels.cuda.build import build
from nf_kernels.cuda.library import CudaLibrary
from nf_kernels.cuda.tiles import all_tiles, find_tile
from nf_kernels.cuda.toolchain import find_toolchain

ONE = find_tile("16x128x128_1x1_stream_k", all_tiles())
STATUSES = range(0, -12, -1)


def why_nothing_compiles() -> str:
    try:
        find_toolchain()
    except RuntimeError as error:
        return str(error)
    return ""


needs_toolchain = pytest.mark.skipif(
    bool(why_nothing_compiles()), reason=f"nothing compiles: {why_nothing_compiles()}"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> CudaLibrary:
    """A library of one kernel, compiled now."""
    folder = tmp_path_factory.mktemp("cuda")
    path = build([ONE], dtypes=["bfloat16"], library=folder / place.FILE_NAME, objects=folder)
    return CudaLibrary(path)


@pytest.fixture(scope="module")
def all_built(tmp_path_factory) -> CudaLibrary:
    """A library of all kernels; compiled ones are kept, as by `make cuda-build`."""
    folder = tmp_path_factory.mktemp("cuda")
    return CudaLibrary(build(all_tiles(), library=folder / place.FILE_NAME))


def problem(**changed):
    fields = {
        "x": 1 << 20,
        "weight": 1 << 21,
        "out": 1 << 22,
        "m": 5,
        "n": 256,
        "k": 512,
        "x_stride": 512,
        "weight_stride": 512,
        "out_stride": 256,
        "dtype": 0,
        "sm_count": 132,
    }
    return abi.GemmProblem(**(fields | changed))


def check(built, tile=0, **changed):
    return built._functions.nf_cuda_gemm_check(tile, ctypes.byref(problem(**changed)))


@needs_toolchain
def test_one_tile_compiles_loads_and_says_what_it_is(built):
    assert built.tiles == (ONE,)
    assert built._functions.nf_cuda_fingerprint().decode() == sources.fingerprint()
    assert built._functions.nf_cuda_gemm_tile_name(1) is None
    assert built._functions.nf_cuda_gemm_tile_name(-1) is None


@needs_toolchain
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_header_s_functions_are_exported_and_nothing_else(built):
    said = subprocess.check_output(["nm", "-D", "--defined-only", built.path], text=True)
    assert {line.split()[-1] for line in said.splitlines()} == set(abi.FUNCTIONS)


@needs_toolchain
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_needs_no_cuda_runtime_and_no_torch(built):
    said = subprocess.check_output(["readelf", "-d", built.path], text=True)
    needed = [line.split("[")[1] for line in said.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [name for name in needed if "cuda" in name or "torch" in name]


@needs_toolchain
def test_every_status_has_a_message_of_its_own(built):
    messages = [built._message(status) for status in STATUSES]
    assert len(set(messages)) == len(STATUSES)
    assert "unknown status" not in messages
    assert built._message(STATUSES.stop) == "unknown status"
    assert built._message(2) == "out of memory"  # cudaErrorMemoryAllocation


@needs_toolchain
@pytest.mark.parametrize(("changed", "message"), [
    ({}, "done"),
    ({"m": 0, "x": None, "out": None}, "done"),
    ({"residual": 1 << 22, "residual_stride": 256}, "done"),
    ({"bias": 1 << 23, "x_stride": 520}, "done"),
    ({"tile": 1}, "no such tile"),
    ({"tile": -1}, "no such tile"),
    ({"dtype": 2}, "neither bfloat16 nor float16"),
    ({"dtype": 1}, "without this tile for this dtype"),
    ({"m": -1}, "size is out of range"),
    ({"m": 1 << 31}, "size is out of range"),
    ({"k": 0, "x_stride": 0}, "size is out of range"),
    ({"n": 252, "out_stride": 256}, "no multiple of 8"),
    ({"k": 508}, "no multiple of 8"),
    ({"x_stride": 504}, "a stride is less than the row"),
    ({"weight_stride": 516}, "no multiple of 8"),
    ({"out_stride": 248}, "a stride is less than the row"),
    ({"residual": 1 << 23, "residual_stride": 0}, "a stride is less than the row"),
    ({"residual": 1 << 22, "residual_stride": 264}, "out is residual with another stride"),
    ({"sm_count": 0}, "sm_count is less"),
    ({"x": None}, "address is null"),
    ({"weight": None}, "address is null"),
    ({"out": None}, "address is null"),
    ({"x": (1 << 20) + 8}, "no multiple of 16 bytes"),
    ({"bias": 2}, "no multiple of 16 bytes"),
    ({"residual": 2, "residual_stride": 256}, "no multiple of 16 bytes"),
])  # fmt: skip
def test_a_problem_is_checked_before_anything_else(built, changed, message):
    assert message in built._message(check(built, **changed))


@needs_toolchain
def test_null_pointers_to_answers_are_refused(built):
    for function in ("nf_cuda_gemm_workspace_bytes", "nf_cuda_gemm_blocks"):
        call = getattr(built._functions, function)
        assert "address is null" in built._message(call(0, ctypes.byref(problem()), None))
        assert "address is null" in built._message(call(0, None, None))


@needs_toolchain
def test_a_workspace_is_needed_where_tiles_are_cut(built):
    # 2 tiles for 132 SMs: each is cut along its 32 steps.
    cut = built.workspace_bytes(m=5, n=256, k=4096, tile=ONE, sm_count=132)
    assert cut >= 2 * 16 * 128 * 4
    assert built.workspace_bytes(m=5, n=256, k=4096, tile=ONE, sm_count=2) == 0
    assert built.workspace_bytes(m=0, n=256, k=4096, tile=ONE, sm_count=132) == 0
    small = ctypes.create_string_buffer(64)
    arguments = (0, ctypes.byref(problem(k=4096, x_stride=4096, weight_stride=4096)))
    for workspace, size in ((None, cut), (small, cut - 1)):
        status = built._functions.nf_cuda_gemm(*arguments, workspace, size, None)
        assert "workspace is smaller" in built._message(status)


@needs_toolchain
def test_no_more_blocks_than_sms_and_none_for_nothing(built):
    for sm_count in (1, 7, 64, 132):
        blocks = built.blocks(m=64, n=4096, k=4096, tile=ONE, sm_count=sm_count)
        assert blocks == sm_count
    assert built.blocks(m=64, n=0, k=4096, tile=ONE, sm_count=8) == 0


@needs_toolchain
def test_takes_says_which_problems_a_tile_computes(built):
    shape = {"m": 3, "n": 64, "k": 64, "sm_count": 8}
    assert built.takes(ONE, **shape)
    assert built.takes(ONE.name, **shape)
    for changed in ({"k": 63}, {"n": 63}, {"sm_count": 0}, {"m": -1}, {"dtype": torch.float16}):
        assert not built.takes(ONE, **(shape | changed)), changed
    with pytest.raises(ValueError, match=r"dtype is torch\.float32; expected torch\.bfloat16"):
        built.takes(ONE, **shape, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"tile is '1x1'; expected one of 16x128x128_1x1_stream_k"):
        built.takes("1x1", **shape)


@needs_toolchain
def test_what_cannot_be_computed_has_no_workspace_size(built):
    with pytest.raises(ValueError, match=r"does not take m=3, n=63, k=64 in torch\.bfloat16 on 8 "):
        built.workspace_bytes(m=3, n=63, k=64, tile=ONE, sm_count=8)
    assert built.best_tile(3, 64, 64, 8) == ONE


@needs_toolchain
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_driver_a_launch_fails_with_a_reason(built):
    needed = built.workspace_bytes(m=5, n=256, k=512, tile=ONE, sm_count=132)
    workspace = ctypes.create_string_buffer(needed + 16)
    address = -(-ctypes.addressof(workspace) // 16) * 16
    status = built._functions.nf_cuda_gemm(0, ctypes.byref(problem()), address, needed, None)
    assert status > 0
    assert "driver" in built._message(status)
    assert "driver" in built._message(built._functions.nf_cuda_copy(1 << 20, 1 << 21, 64, 8, None))


@needs_toolchain
@pytest.mark.parametrize(("arguments", "message"), [
    ((1 << 20, 1 << 21, -1, 8), "size is out of range"),
    ((1 << 20, 1 << 21, 64, 0), "sm_count is less"),
    ((None, 1 << 21, 64, 8), "address is null"),
    ((1 << 20, None, 64, 8), "address is null"),
    (((1 << 20) + 4, 1 << 21, 64, 8), "no multiple of 16 bytes"),
    ((1 << 20, (1 << 21) + 4, 64, 8), "no multiple of 16 bytes"),
    ((None, None, 0, 8), "done"),
])  # fmt: skip
def test_a_copy_is_checked_before_anything_else(built, arguments, message):
    assert message in built._message(built._functions.nf_cuda_copy(*arguments, None))


def operands(**changed):
    half = {"dtype": torch.bfloat16}
    tensors = {
        "x": torch.zeros(4, 64, **half),
        "weight": torch.zeros(32, 64, **half),
        "out": torch.zeros(4, 32, **half),
        "bias": torch.zeros(32, **half),
        "residual": torch.zeros(4, 32, **half),
    }
    return tensors | changed


HALF = torch.zeros(4, 128, dtype=torch.bfloat16)


@needs_toolchain
@pytest.mark.parametrize(("changed", "message"), [
    ({"x": torch.zeros(4, 64)}, r"x is torch\.float32; expected torch\.bfloat16 or torch\.float16"),
    ({"x": HALF[0, :64]}, r"x is torch\.bfloat16 \[64\]; expected torch\.bfloat16 \[any, any\]"),
    ({"weight": HALF}, r"weight is torch\.bfloat16 \[4, 128\]; expected .* \[any, 64\]"),
    ({"weight": HALF[:, :64].half()}, r"weight is torch\.float16 .*; expected torch\.bfloat16"),
    ({"out": HALF[:, :40]}, r"out is torch\.bfloat16 \[4, 40\]; expected .* \[4, 32\]"),
    ({"residual": HALF[:3, :32]}, r"residual is .* \[3, 32\]; expected .* \[4, 32\]"),
    ({"bias": HALF[0, :31]}, r"bias is .* \[31\]; expected contiguous .* \[32\]"),
    ({"bias": HALF[0, :64:2]}, r"bias is .* \[32\]; expected contiguous"),
    ({"bias": HALF[0, :32].half()}, r"bias is torch\.float16 .*; expected contiguous .*bfloat16"),
    ({"x": HALF[:, :62]}, r"x has rows of 62; expected a multiple of 8"),
    ({"x": HALF[:, :0]}, r"x has rows of 0; expected at least 8"),
    ({"x": HALF[:, ::2]}, r"x has stride 2 in its last dimension; expected 1"),
    ({"x": torch.zeros(4 * 68, dtype=torch.bfloat16).as_strided((4, 64), (68, 1))},
     r"x has rows 68 elements apart; expected a multiple of 8 and at least 64"),
    ({"x": HALF[:1, :64].expand(4, 64)}, r"x has rows 0 elements apart"),
    ({"x": HALF[:, 4:68]}, r"x begins 8 bytes after a multiple of 16"),
    ({}, r"x is on cpu; expected all of x, weight, out, residual, bias on one CUDA device"),
])  # fmt: skip
def test_gemm_refuses_wrong_tensors_by_name(built, changed, message):
    with pytest.raises(ValueError, match=message):
        built.gemm(**operands(**changed))


@needs_toolchain
def test_out_may_be_the_residual_but_not_a_part_of_it(built):
    wide = torch.zeros(8, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="residual has rows 64 elements apart, out 32"):
        built.gemm(**operands(out=wide[:4], residual=wide[::2]))


@needs_toolchain
@pytest.mark.parametrize(("src", "dst", "message"), [
    (HALF, HALF[:3], r"dst is torch\.bfloat16 \[3, 128\]; expected torch\.bfloat16 \[4, 128\]"),
    (HALF, HALF.half(), r"dst is torch\.float16"),
    (HALF[:, :64], HALF[:, 64:], r"src is not contiguous"),
    (HALF[:3], HALF[1:], r"src and dst share memory"),
    (HALF.view(-1)[4:12], HALF.view(-1)[64:72], r"src begins 8 bytes after"),
    (HALF[0], HALF[1], r"src is on cpu; expected all of src, dst on one CUDA device"),
])  # fmt: skip
def test_copy_refuses_wrong_tensors_by_name(built, src, dst, message):
    with pytest.raises(ValueError, match=message):
        built.copy(src, dst)


@pytest.fixture
def empty_place(tmp_path, monkeypatch):
    """No library anywhere; gives where the first one is looked for."""
    candidates = [tmp_path / "beside" / place.FILE_NAME, tmp_path / "cached" / place.FILE_NAME]
    for path in candidates:
        path.parent.mkdir()
    monkeypatch.setattr(place, "libraries", lambda: candidates)
    library._load.cache_clear()
    yield candidates
    library._load.cache_clear()


def test_without_a_library_the_status_says_how_to_build_one(empty_place):
    assert library.load() is None
    status = library.status()
    assert not status.available
    assert status.path is None
    assert status.tiles == ()
    assert status.reason == (
        "the CUDA library is not built; run python -m nf_kernels.cuda.build (needs nvcc)"
    )


def test_without_sources_the_status_says_so(monkeypatch):
    def gone():
        raise RuntimeError("the sources of the CUDA library are gone")

    monkeypatch.setattr(sources, "folder", gone)
    library._load.cache_clear()
    try:
        assert library.status().reason == "the sources of the CUDA library are gone"
    finally:
        library._load.cache_clear()


def test_what_is_no_library_does_not_load(empty_place):
    empty_place[0].write_text("no library")
    assert library.load() is None
    assert "the CUDA library does not load" in library.status().reason


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_of_other_sources_is_not_used(empty_place, tmp_path):
    functions = "".join(f"long {name}(void) {{ return 0; }}\n" for name in list(abi.FUNCTIONS)[1:])
    fingerprint = 'const char* nf_cuda_fingerprint(void) { return "another"; }\n'
    for text in (fingerprint, fingerprint + functions):  # an older one lacks functions, too
        (tmp_path / "other.c").write_text(text)
        command = ["cc", "-shared", "-fPIC", "other.c", "-o", empty_place[1]]
        subprocess.run(command, cwd=tmp_path, check=True)
        library._load.cache_clear()
        assert library.load() is None
        assert library.status().reason == (
            f"{empty_place[1]} was built from other sources; run python -m nf_kernels.cuda.build"
        )


@needs_toolchain
def test_the_first_library_of_these_sources_is_used(built, empty_place):
    empty_place[0].write_text("no library")
    shutil.copy(built.path, empty_place[1])
    found = library.load()
    assert found is not None
    assert found is library.load()
    assert library.status() == library.CudaStatus(True, "", empty_place[1], (ONE.name,))


@needs_toolchain
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_all_tiles_compile_and_keep_within_their_sms(all_built):
    assert all_built.tiles == all_tiles()
    shapes = [(m, n, 4096) for m in (1, 16, 100, 2048) for n in (64, 4096, 28672)]
    for tile in all_built.tiles:
        for dtype in (torch.bfloat16, torch.float16):
            for m, n, k in shapes:
                for sm_count in (tile.cluster_size, 8, 9, 17, 64, 131, 132):
                    shape = {"m": m, "n": n, "k": k, "sm_count": sm_count, "dtype": dtype}
                    assert all_built.takes(tile, **shape)
                    blocks = all_built.blocks(tile=tile, **shape)
                    tiles = -(-m // tile.rows) * -(-n // tile.columns)
                    most = sm_count // tile.cluster_size * tile.cluster_size
                    assert min(most, tiles) <= blocks <= most, (tile.name, shape)
                    assert blocks % tile.cluster_size == 0
                    needed = all_built.workspace_bytes(tile=tile, **shape)
                    assert needed == 0 or tile.schedule == "stream_k"
        assert not all_built.takes(tile, m=8, n=64, k=64, sm_count=tile.cluster_size - 1)

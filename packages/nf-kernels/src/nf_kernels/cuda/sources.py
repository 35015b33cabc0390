"""What the CUDA library is made of: C++ files, and those generated from the table of tiles."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from nf_kernels.cuda.tiles import Tile, all_tiles

DTYPES = {"bfloat16": "cutlass::bfloat16_t", "float16": "cutlass::half_t"}
"""dtypes of a product, in the order of `enum nf_cuda_dtype`, and their types in C++."""

HEADERS = ("nf_cuda.h", "gemm.h", "gemm_kernel.cuh")
"""What every translation unit includes."""

EXPORTS = "nf_cuda.map"
"""Names the symbols that the linker keeps visible."""

_SCHEDULES = {"pingpong": "kPingpong", "cooperative": "kCooperative", "stream_k": "kStreamK"}


def folder() -> Path:
    """Where the C++ files are: beside this module where it is installed, or in its checkout.

    Raises:
        RuntimeError: They are in neither.
    """
    here = Path(__file__).resolve().parent
    installed = here / "csrc"
    checkout = here.parents[2] / "csrc" / "cuda"
    for place in (installed, checkout):
        if (place / HEADERS[0]).is_file():
            return place
    raise RuntimeError(
        f"the sources of the CUDA library are neither in {installed} nor in {checkout}; "
        f"reinstall nf-kernels"
    )


def kernel_name(tile: Tile, dtype: str) -> str:
    """Of the kernel of a tile for a dtype, in C++ and in the names of its files."""
    return f"gemm_{tile.name}_{dtype}"


def kernel_source(tile: Tile, dtype: str) -> str:
    """The translation unit of one kernel."""
    along_rows, along_columns = tile.cluster
    sizes = (tile.rows, tile.columns, tile.depth, along_rows, along_columns)
    arguments = ", ".join(
        (
            DTYPES[dtype],
            *map(str, sizes),
            f"Schedule::{_SCHEDULES[tile.schedule]}",
            str(tile.swapped).lower(),
        )
    )
    name = kernel_name(tile, dtype)
    return (
        '#include "gemm_kernel.cuh"\n\n'
        "namespace nf_cuda {\n"
        f"extern const GemmKernel {name};\n"
        f"const GemmKernel {name} = Gemm<{arguments}>::kKernel;\n"
        "}  // namespace nf_cuda\n"
    )


def table_source(tiles: Iterable[Tile], dtypes: Iterable[str]) -> str:
    """The translation unit that lists the kernels which there are, and says what they are made of.

    Args:
        tiles: Those that the library has.
        dtypes: Those that each of them is compiled for.
    """
    tiles, built = list(tiles), set(dtypes)
    declarations, rows = [], []
    for tile in tiles:
        kernels = []
        for dtype in DTYPES:
            if dtype in built:
                declarations.append(f"extern const GemmKernel {kernel_name(tile, dtype)};")
                kernels.append(f"&{kernel_name(tile, dtype)}")
            else:
                kernels.append("nullptr")
        rows.append(f'    {{"{tile.name}", {{{", ".join(kernels)}}}}},')
    return "\n".join(
        [
            '#include "gemm.h"',
            "",
            "namespace nf_cuda {",
            *declarations,
            "const GemmTile kGemmTiles[] = {",
            *rows,
            "};",
            f"const int kNumGemmTiles = {len(tiles)};",
            f'const char kFingerprint[] = "{fingerprint()}";',
            "}  // namespace nf_cuda",
            "",
        ]
    )


def fingerprint() -> str:
    """A digest of all sources, of every tile, whichever of them are built.

    Raises:
        RuntimeError: As `folder`.
    """
    digest = hashlib.sha256()
    place = folder()
    for name in (*HEADERS, "nf_cuda.cu", EXPORTS):
        digest.update((place / name).read_bytes())
    for tile in all_tiles():
        for dtype in DTYPES:
            digest.update(kernel_source(tile, dtype).encode())
    return digest.hexdigest()[:16]

"""nf_cuda.h in ctypes."""

import ctypes
from pathlib import Path

OK = 0
WRONG_DEVICE = -8


class GemmProblem(ctypes.Structure):
    """`struct nf_cuda_gemm_problem`."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("weight_stride", ctypes.c_int64),
        ("residual_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("sm_count", ctypes.c_int32),
    )


_PROBLEM = ctypes.POINTER(GemmProblem)
_INT64 = ctypes.POINTER(ctypes.c_int64)

FUNCTIONS = {
    "nf_cuda_fingerprint": (ctypes.c_char_p, []),
    "nf_cuda_message": (ctypes.c_char_p, [ctypes.c_int]),
    "nf_cuda_gemm_tiles": (ctypes.c_int, []),
    "nf_cuda_gemm_tile_name": (ctypes.c_char_p, [ctypes.c_int]),
    "nf_cuda_gemm_check": (ctypes.c_int, [ctypes.c_int, _PROBLEM]),
    "nf_cuda_gemm_workspace_bytes": (ctypes.c_int, [ctypes.c_int, _PROBLEM, _INT64]),
    "nf_cuda_gemm_blocks": (ctypes.c_int, [ctypes.c_int, _PROBLEM, _INT64]),
    "nf_cuda_gemm": (
        ctypes.c_int,
        [ctypes.c_int, _PROBLEM, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    ),
    "nf_cuda_copy": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p],
    ),
}
"""Result and arguments of every function."""


def bind(path: Path) -> ctypes.CDLL:
    """Load a library whose functions know their types.

    Raises:
        OSError: It cannot be loaded.
        AttributeError: It lacks a function.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library

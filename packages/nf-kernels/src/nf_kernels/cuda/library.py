"""The CUDA library, loaded: matrix products and copies on as many SMs as they are told.

Compiled, not yet run on a device. It runs on devices of compute capability 9.0 (H100, H200); on
others its functions raise RuntimeError, and torch's products take their place.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nf_kernels.cuda import abi, place, sources
from nf_kernels.cuda import tiles as tile_table
from nf_kernels.cuda.operands import (
    DTYPES,
    VECTOR_BYTES,
    check_addresses,
    check_devices,
    check_rows,
    check_sm_count,
    check_workspace,
    describe,
    device_sms,
    stride,
)
from nf_kernels.cuda.tiles import Tile


@dataclass(frozen=True, slots=True)
class CudaStatus:
    """Whether the CUDA library can be used.

    Attributes:
        available: It is built, from these sources, and loads.
        reason: Why it is not available; empty when it is.
        path: The file; None when it is not available.
        tiles: Names of the tiles that it has.
    """

    available: bool
    reason: str
    path: Path | None
    tiles: tuple[str, ...]


class CudaLibrary:
    """Functions of the library on torch's tensors.

    They queue work on the current stream of the tensors' device and return at once.

    Attributes:
        path: The file.
        tiles: The tiles that it has, in the order of the table.
    """

    def __init__(self, path: Path) -> None:
        """Load a library.

        Raises:
            RuntimeError: It does not load, or was built from other sources.
        """
        try:
            self._functions = abi.bind(path)
        except OSError as error:
            raise RuntimeError(f"the CUDA library does not load: {error}") from error
        except AttributeError as error:
            raise RuntimeError(_built_from_other_sources(path)) from error
        if self._functions.nf_cuda_fingerprint() != sources.fingerprint().encode():
            raise RuntimeError(_built_from_other_sources(path))
        self.path = path
        names = [
            self._functions.nf_cuda_gemm_tile_name(number).decode()
            for number in range(self._functions.nf_cuda_gemm_tiles())
        ]
        self._numbers = {name: number for number, name in enumerate(names)}
        self.tiles = tuple(tile for tile in tile_table.all_tiles() if tile.name in self._numbers)
        # A model asks for the same few products over and over.
        self._best_tile = functools.lru_cache(4096)(
            functools.partial(tile_table.best_tile, self.tiles)
        )

    def best_tile(self, m: int, n: int, k: int, sm_count: int = 0) -> Tile:
        """The tile that `nf_kernels.cuda.tiles.best_tile` chooses among those of the library.

        Args:
            m: Rows of x.
            n: Rows of weight.
            k: Columns of both.
            sm_count: SMs for it; 0: all of the current device.

        Raises:
            ValueError: A size is less than 1, or no tile runs on so few SMs.
        """
        sms = sm_count or device_sms(torch.device("cuda", torch.cuda.current_device()))
        return self._best_tile(m=m, n=n, k=k, sm_count=sms)

    def takes(
        self,
        tile: Tile | str,
        *,
        m: int,
        n: int,
        k: int,
        sm_count: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> bool:
        """Whether a tile takes a product of contiguous x [m, k] and weight [n, k].

        It does where n and k are multiples of 8, the dtype is one that it was built for, and
        `sm_count` is at least the tile's cluster.

        Raises:
            ValueError: There is no such tile, or the dtype is neither bfloat16 nor float16.
        """
        problem = _contiguous_problem(m, n, k, sm_count, dtype)
        # What is checked of an address is that it is there, and its alignment.
        problem.x = problem.weight = problem.out = VECTOR_BYTES
        status = self._functions.nf_cuda_gemm_check(self._number(tile), ctypes.byref(problem))
        return bool(status == abi.OK)

    def workspace_bytes(
        self,
        *,
        m: int,
        n: int,
        k: int,
        tile: Tile | str | None = None,
        sm_count: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> int:
        """Bytes of workspace that `gemm` needs for x [m, k] and weight [n, k]; may be 0.

        Args:
            m: Rows of x.
            n: Rows of weight.
            k: Columns of both.
            tile: As that of `gemm`.
            sm_count: As that of `gemm`; 0: all SMs of the current device.
            dtype: Of the tensors.

        Raises:
            ValueError: The tile does not take such a product.
        """
        return self._ask("nf_cuda_gemm_workspace_bytes", m, n, k, tile, sm_count, dtype)

    def blocks(
        self,
        *,
        m: int,
        n: int,
        k: int,
        tile: Tile | str | None = None,
        sm_count: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> int:
        """SMs that `gemm` really occupies: whole clusters of `sm_count`, or fewer for few tiles.

        Arguments and errors are those of `workspace_bytes`.
        """
        return self._ask("nf_cuda_gemm_blocks", m, n, k, tile, sm_count, dtype)

    def _ask(
        self,
        function: str,
        m: int,
        n: int,
        k: int,
        tile: Tile | str | None,
        sm_count: int,
        dtype: torch.dtype,
    ) -> int:
        """What a function that writes a number says of a product."""
        if not m or not n:
            return 0
        sms = sm_count or device_sms(torch.device("cuda", torch.cuda.current_device()))
        problem = _contiguous_problem(m, n, k, sms, dtype)
        chosen = self.best_tile(m, n, k, sms) if tile is None else tile
        number, answer = self._number(chosen), ctypes.c_int64()
        call = getattr(self._functions, function)
        status = call(number, ctypes.byref(problem), ctypes.byref(answer))
        if status != abi.OK:
            raise ValueError(
                f"tile {chosen} does not take m={m}, n={n}, k={k} in {dtype} on {sms} SMs: "
                f"{self._message(status)}"
            )
        return answer.value

    def gemm(
        self,
        *,
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        tile: Tile | str | None = None,
        sm_count: int = 0,
        workspace: Tensor | None = None,
    ) -> None:
        """Write x · weightᵀ + bias + residual to out, added up in float32 and rounded once.

        Rows may be views of wider tensors: they are contiguous, start at multiples of 16 bytes, and
        N and K are multiples of 8.

        Args:
            x: [M, K], bfloat16 or float16, as all others but the workspace.
            weight: [N, K].
            out: [M, N]; may be the residual, and shares no memory with anything else.
            bias: [N], or None.
            residual: [M, N], or None.
            tile: One of `tiles` or its name; None: `best_tile`.
            sm_count: The most SMs that the kernel occupies; 0: all of the device.
            workspace: uint8, `workspace_bytes` or more; None where that is 0. It must not be in use
                by anything else until the product is done.

        Raises:
            ValueError: An argument is not as above.
            RuntimeError: The device is of another compute capability, or CUDA fails.
        """
        m, k = check_rows("x", x, x.dtype, None, None)
        n, _ = check_rows("weight", weight, x.dtype, None, k)
        check_rows("out", out, x.dtype, m, n)
        operands = {"x": x, "weight": weight, "out": out}
        if residual is not None:
            check_rows("residual", residual, x.dtype, m, n)
            operands["residual"] = residual
            if residual.data_ptr() == out.data_ptr() and stride(residual) != stride(out):
                raise ValueError(
                    f"residual has rows {stride(residual)} elements apart, out {stride(out)}, "
                    f"and both begin at one address; expected one tensor or two apart"
                )
        if bias is not None:
            if bias.dtype != x.dtype or bias.shape != (n,) or not bias.is_contiguous():
                raise ValueError(
                    f"bias is {describe(bias)}; expected contiguous {x.dtype} [{n}], "
                    f"one for each row of weight"
                )
            operands["bias"] = bias
        check_addresses(operands)
        check_devices(operands)
        sms = check_sm_count(sm_count, x.device)
        if not m or not n:
            return
        chosen = self.best_tile(m, n, k, sms) if tile is None else tile
        needed = self.workspace_bytes(m=m, n=n, k=k, tile=chosen, sm_count=sms, dtype=x.dtype)
        if needed:
            check_workspace(workspace, needed, x.device)
        problem = abi.GemmProblem(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            residual=None if residual is None else residual.data_ptr(),
            out=out.data_ptr(),
            m=m,
            n=n,
            k=k,
            x_stride=stride(x),
            weight_stride=stride(weight),
            residual_stride=0 if residual is None else stride(residual),
            out_stride=stride(out),
            dtype=DTYPES[x.dtype],
            sm_count=sms,
        )
        with torch.cuda.device(x.device):
            status = self._functions.nf_cuda_gemm(
                self._number(chosen),
                ctypes.byref(problem),
                None if workspace is None else workspace.data_ptr(),
                0 if workspace is None else workspace.numel(),
                torch.cuda.current_stream(x.device).cuda_stream,
            )
        self._raise_for(status, f"gemm in tile {chosen}", x.device)

    def copy(self, src: Tensor, dst: Tensor, sm_count: int = 0) -> None:
        """Copy a tensor to another of its device, occupying `sm_count` SMs.

        Args:
            src: Contiguous, of any dtype, beginning at a multiple of 16 bytes.
            dst: As src, of its shape and dtype, elsewhere in memory.
            sm_count: SMs that the copy occupies, each alone; 0: all of the device.

        Raises:
            ValueError: An argument is not as above.
            RuntimeError: The device is of another compute capability, or CUDA fails.
        """
        if dst.dtype != src.dtype or dst.shape != src.shape:
            raise ValueError(
                f"dst is {describe(dst)}; expected {src.dtype} {list(src.shape)}, as src is"
            )
        operands = {"src": src, "dst": dst}
        for name, tensor in operands.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous; pass a contiguous tensor")
        size = src.numel() * src.element_size()
        if size and abs(src.data_ptr() - dst.data_ptr()) < size:
            raise ValueError("src and dst share memory; expected two ranges apart")
        check_addresses(operands)
        check_devices(operands)
        sms = check_sm_count(sm_count, src.device)
        with torch.cuda.device(src.device):
            stream = torch.cuda.current_stream(src.device).cuda_stream
            status = self._functions.nf_cuda_copy(dst.data_ptr(), src.data_ptr(), size, sms, stream)
        self._raise_for(status, "copy", src.device)

    def _number(self, tile: Tile | str) -> int:
        """The library's number of a tile."""
        number = self._numbers.get(str(tile))
        if number is None:
            tile_table.find_tile(str(tile), self.tiles)
            raise ValueError(f"tile is {str(tile)!r}, which {self.path} does not have")
        return number

    def _message(self, status: int) -> str:
        message: bytes = self._functions.nf_cuda_message(status)
        return message.decode()

    def _raise_for(self, status: int, what: str, device: torch.device) -> None:
        if status == abi.OK:
            return
        advice = ""
        if status == abi.WRONG_DEVICE:
            name = torch.cuda.get_device_name(device)
            advice = f" ({device} is {name}); multiply with torch there"
        raise RuntimeError(f"{what}: {self._message(status)}{advice}")


def _contiguous_problem(
    m: int, n: int, k: int, sm_count: int, dtype: torch.dtype
) -> abi.GemmProblem:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; expected torch.bfloat16 or torch.float16")
    return abi.GemmProblem(
        m=m,
        n=n,
        k=k,
        x_stride=k,
        weight_stride=k,
        out_stride=n,
        dtype=DTYPES[dtype],
        sm_count=sm_count,
    )


def _built_from_other_sources(path: Path) -> str:
    return f"{path} was built from other sources; run python -m nf_kernels.cuda.build"


@functools.cache
def _load() -> tuple[CudaLibrary | None, str]:
    try:
        candidates = place.libraries()
        found = [path for path in candidates if path.is_file()]
    except RuntimeError as error:
        return None, str(error)
    reason = "the CUDA library is not built; run python -m nf_kernels.cuda.build (needs nvcc)"
    for path in found:
        try:
            return CudaLibrary(path), ""
        except RuntimeError as error:
            reason = str(error)
    return None, reason


def load() -> CudaLibrary | None:
    """The library, or None where there is none that can be used; `status` tells why."""
    return _load()[0]


def status() -> CudaStatus:
    """Tell whether the library can be used, and what it has."""
    library, reason = _load()
    if library is None:
        return CudaStatus(available=False, reason=reason, path=None, tiles=())
    names = tuple(tile.name for tile in library.tiles)
    return CudaStatus(available=True, reason="", path=library.path, tiles=names)

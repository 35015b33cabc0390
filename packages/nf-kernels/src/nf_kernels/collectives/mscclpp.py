"""Collectives of MSCCL++, between CUDA devices of one host that reach each other's memory.

Written against the Python API of MSCCL++ 0.10.0. It has never been executed with MSCCL++, which
needs two GPUs; tests call it with a stand-in.

MSCCL++ is not on the package index. To build it, with the CUDA toolkit, CMake 3.25 and the headers
of libnuma and libibverbs at hand:

    git clone --branch v0.10.0 https://github.com/microsoft/mscclpp.git
    pip install "./mscclpp[cuda12]"
"""

from __future__ import annotations

import functools
import importlib
import socket
from typing import Any

import torch
from torch import Tensor

from nf_kernels.collectives.rendezvous import Rendezvous
from nf_kernels.collectives.torch_distributed import TorchCommunicator

_SCRATCH_BYTES = 1 << 27
_WORD_BYTES = 16  # what its kernels read and write at a time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)


class MscclppCommunicator(TorchCommunicator):
    """MSCCL++ for all_reduce and all_gather, NCCL for what MSCCL++ has no algorithm for.

    The algorithms are those that go through a buffer which MSCCL++ knows, 128 MiB for each rank,
    so that any tensor of the caller will do. NCCL takes over, on all ranks alike,

    - reduce_scatter and barrier,
    - int64,
    - an all_reduce of more than 128 MiB, or not of a multiple of 16 * world_size bytes,
    - an all_gather of a multiple of 16 bytes on no rank.

    A tensor that MSCCL++ sends begins at a multiple of 16 bytes; else it is a `ValueError`.

    MSCCL++ does not notice a dead peer: its kernel waits on the device for ever, and this process
    has to be ended from outside.

    Args:
        rendezvous: The ranks, all on one host.
        device: CUDA device that no other rank uses and that reaches the devices of all others.

    Raises:
        CommunicatorError: The ranks cannot connect.
    """

    def __init__(self, rendezvous: Rendezvous, *, device: torch.device) -> None:
        super().__init__(rendezvous, device=device)
        library, _ = _load()
        try:
            with torch.cuda.device(device):
                self._connect(library, rendezvous)
        except RuntimeError as error:
            self._fail("connect", error)

    def _connect(self, library: Any, rendezvous: Rendezvous) -> None:
        own = f"127.0.0.1:{_free_port()}"
        place = rendezvous.exchange("mscclpp", own)[0]
        self._members = library.CommGroup(
            interfaceIpPortTrio=place, rank=self.rank, size=self.world_size
        )
        self._scratch = library.RawGpuBuffer(_SCRATCH_BYTES)
        algorithms = library.ext.AlgorithmCollectionBuilder().build_default_algorithms(
            scratch_buffer=self._scratch.data(),
            scratch_buffer_size=self._scratch.bytes(),
            rank=self.rank,
        )
        by_name = {algorithm.name: algorithm for algorithm in algorithms}
        self._all_reduce_algorithm = by_name["default_allreduce_rsag"]
        self._all_gather_algorithm = by_name["default_allgather_fullmesh"]
        self._sum = library.ReduceOp.SUM
        self._none = library.ReduceOp.NOP
        self._dtypes = {
            dtype: library.utils.torch_dtype_to_mscclpp_dtype(dtype) for dtype in _DTYPES
        }

    def _all_reduce(self, x: Tensor) -> None:
        # With another number of words, the algorithm writes behind the last element.
        whole_words = x.nbytes % (_WORD_BYTES * self.world_size) == 0
        if x.dtype in self._dtypes and whole_words and x.nbytes <= _SCRATCH_BYTES:
            _check_aligned("x", x)
            self._execute("all_reduce", self._all_reduce_algorithm, x, x, self._sum)
        else:
            super()._all_reduce(x)

    def _all_gather(self, x: Tensor, out: Tensor) -> None:
        # The algorithm leaves out what is not a whole word.
        if x.dtype in self._dtypes and x.nbytes % _WORD_BYTES == 0:
            _check_aligned("x", x)
            _check_aligned("out", out)
            self._execute("all_gather", self._all_gather_algorithm, x, out, self._none)
        else:
            super()._all_gather(x, out)

    def _execute(self, operation: str, algorithm: Any, x: Tensor, out: Tensor, op: Any) -> None:
        try:
            with torch.cuda.device(self.device):
                result = algorithm.execute(
                    comm=self._members.communicator,
                    input_buffer=x.data_ptr(),
                    output_buffer=out.data_ptr(),
                    input_size=x.nbytes,
                    output_size=out.nbytes,
                    dtype=self._dtypes[x.dtype],
                    op=op,
                    stream=torch.cuda.current_stream().cuda_stream,
                )
            if result != 0:
                raise RuntimeError(f"MSCCL++ gives {result}")
        except RuntimeError as error:
            self._fail(operation, error)

    def _close(self, *, failed: bool) -> None:
        if not failed:
            torch.cuda.synchronize(self.device)  # kernels still use the buffer
        self._all_reduce_algorithm = self._all_gather_algorithm = None
        self._scratch = self._members = None
        super()._close(failed=failed)


def why_not() -> str:
    """Why MSCCL++ cannot be imported here, and what to do; empty where it can."""
    _, error = _load()
    if not error:
        return ""
    return (
        f"Python's module mscclpp cannot be imported ({error}); "
        f"nf_kernels.collectives.mscclpp tells how to build it"
    )


@functools.cache
def _load() -> tuple[Any, str]:
    try:
        library = importlib.import_module("mscclpp")
        importlib.import_module("mscclpp.ext")
        importlib.import_module("mscclpp.utils")
    except ImportError as error:
        return None, str(error)
    return library, ""


def _check_aligned(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % _WORD_BYTES:
        raise ValueError(
            f"{name} begins at an address that is {tensor.data_ptr() % _WORD_BYTES} bytes after a "
            f"multiple of {_WORD_BYTES}; expected a multiple: "
            f"let each row take a multiple of {_WORD_BYTES} bytes"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

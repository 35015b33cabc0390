"""Collectives of torch.distributed: gloo on a CPU, NCCL on CUDA devices."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from nf_kernels.collectives.communicator import Communicator
from nf_kernels.collectives.rendezvous import Rendezvous

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own variable


class TorchCommunicator(Communicator):
    """A process group of its own; torch's default group is neither used nor needed.

    On a CPU (gloo), an operation that a peer cannot complete, because it died or stayed away for
    the time-out of the rendezvous, raises `CommunicatorError` on all other ranks. Gloo has no
    reduce-scatter of its own: torch all-reduces a copy of `x`, which allocates it and sends twice
    what is needed.

    On CUDA devices (NCCL), a dead peer is noticed by torch's watchdog thread, which logs the
    operation and ends this process after the time-out (TORCH_NCCL_ASYNC_ERROR_HANDLING of torch).
    This path has not been executed on a GPU yet.

    Args:
        rendezvous: The ranks.
        device: Where the tensors lie: the CPU, or a CUDA device that no other rank uses.

    Raises:
        ValueError: torch was built without the library.
        CommunicatorError: The ranks cannot connect.
    """

    def __init__(self, rendezvous: Rendezvous, *, device: torch.device) -> None:
        super().__init__(rank=rendezvous.rank, world_size=rendezvous.world_size, device=device)
        # Kept, because the other ranks may still need the keys that rank 0 serves.
        self._rendezvous: Rendezvous | None = rendezvous
        # Made once, so that an operation makes nothing of its own. Without asyncOp, NCCL works on
        # the current stream instead of one that it keeps for itself.
        self._reduce_options = c10d.AllreduceOptions()
        self._gather_options = c10d.AllgatherOptions()  # type: ignore[attr-defined]
        self._scatter_options = c10d.ReduceScatterOptions()
        self._barrier_options = c10d.BarrierOptions()
        self._reduce_options.asyncOp = False
        self._gather_options.asyncOp = False
        self._scatter_options.asyncOp = False
        self._barrier_options.asyncOp = False
        self._barrier_options.device = device
        self._group: Any = None  # torch's annotations lack the operations of a group
        try:
            self._group = _gloo(rendezvous) if device.type == "cpu" else _nccl(rendezvous, device)
        except RuntimeError as error:
            self._fail("connect", error)

    def _all_reduce(self, x: Tensor) -> None:
        self._complete("all_reduce", lambda: self._group.allreduce([x], self._reduce_options))

    def _all_gather(self, x: Tensor, out: Tensor) -> None:
        self._complete(
            "all_gather", lambda: self._group._allgather_base(out, x, self._gather_options)
        )

    def _reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        self._complete(
            "reduce_scatter",
            lambda: self._group._reduce_scatter_base(out, x, self._scatter_options),
        )

    def _barrier(self) -> None:
        self._complete("barrier", lambda: self._group.barrier(self._barrier_options))

    def _complete(self, operation: str, start: Callable[[], Any]) -> None:
        work = None
        try:
            # In this mode, tensors that were made in it may be written too.
            with torch.inference_mode():
                work = start()
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            work = None  # which, seen from the traceback, would hold the connections open
            self._fail(operation, error)

    def _close(self, *, failed: bool) -> None:
        if self._group is not None and self.device.type == "cuda":
            if failed:
                self._group.abort()
            else:
                self._group.shutdown()
        self._group = None
        self._rendezvous = None


def _gloo(rendezvous: Rendezvous) -> Any:
    if not c10d.is_gloo_available():
        raise ValueError("device is cpu, but this torch has no gloo; install one that has")
    group: Any = c10d.ProcessGroupGloo
    members = (rendezvous.store, rendezvous.rank, rendezvous.world_size)
    if rendezvous.host is None or _GLOO_INTERFACE in os.environ:
        return group(*members, rendezvous.timeout)
    # By itself, gloo listens where this machine's name points, which other machines may not reach.
    options = group._Options()
    options._timeout = rendezvous.timeout
    options._devices = [group.create_device(hostname=_own_address(rendezvous.host))]
    return group(*members, options)


def _own_address(host: str) -> str:
    """The address of this machine on its way to the host."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # looks up the route; a datagram socket sends nothing here
        return str(probe.getsockname()[0])


def _nccl(rendezvous: Rendezvous, device: torch.device) -> Any:
    if not c10d.is_nccl_available():
        raise ValueError(f"device is {device}, but this torch has no NCCL; install one that has")
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = rendezvous.timeout
    return c10d.ProcessGroupNCCL(rendezvous.store, rendezvous.rank, rendezvous.world_size, options)

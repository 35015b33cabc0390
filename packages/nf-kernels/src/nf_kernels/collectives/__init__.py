"""Collective operations between ranks: all-reduce, all-gather, reduce-scatter.

`connect` joins the ranks of a group and gives each of them a `Communicator`.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from nf_kernels.collectives.communicator import (
    Communicator,
    CommunicatorError,
    SingleCommunicator,
)

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from nf_kernels.collectives.rendezvous import Rendezvous

__all__ = ["BACKENDS", "Communicator", "CommunicatorError", "SingleCommunicator", "connect"]

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "mscclpp")
"""What `connect` can use: the best that works, torch.distributed (gloo, NCCL), or MSCCL++."""


def connect(
    *,
    device: torch.device | str,
    rank: int,
    world_size: int,
    address: str | Store | None = None,
    name: str = "main",
    backend: str = "auto",
    timeout: float = 300.0,
) -> Communicator:
    """Join a group of ranks; returns when all of them are connected.

    Args:
        device: Where the tensors lie: the CPU, or a CUDA device that no other rank uses.
        rank: Number of this rank, from 0 to world_size - 1.
        world_size: Number of ranks. With 1, nothing is sent and `address` is not needed.
        address: `host:port` of rank 0, which listens there and nowhere else; all ranks must reach
            it. What listens asks nobody for a password, so let it be a private network. Or a store
            of torch that all ranks share.
        name: Tells apart the communicators that live at one address; the same on all ranks. An
            address is free again when all ranks have closed all communicators that live there.
        backend: One of `BACKENDS`, the same on all ranks. `auto` is gloo on a CPU. On CUDA devices
            it is MSCCL++ where all ranks can import it, are on one host and reach each other's
            memory, else NCCL.
        timeout: Seconds to wait for other ranks, here and, where the library allows, in an
            operation.

    Raises:
        ValueError: An argument is not as described, or `backend` does not work there.
        CommunicatorError: A rank is missing after `timeout`, or the ranks cannot connect.
    """
    where = _check(device, rank, world_size, backend, timeout)
    if world_size == 1:
        _log.info("One rank on %s: collectives send nothing.", where)
        return SingleCommunicator(device=where)
    if address is None:
        raise ValueError(
            f"address is None; expected 'host:port' of rank 0 or a store of torch, "
            f"by which {world_size} ranks find each other"
        )
    # Late: a torch that was built without distributed is enough for one rank.
    from nf_kernels.collectives.rendezvous import Rendezvous

    rendezvous = Rendezvous(address, rank=rank, world_size=world_size, name=name, timeout=timeout)
    communicator = _build(rendezvous, where, backend)
    communicator.barrier()
    return communicator


def _build(rendezvous: Rendezvous, device: torch.device, backend: str) -> Communicator:
    from nf_kernels.collectives import mscclpp, peer_access
    from nf_kernels.collectives.torch_distributed import TorchCommunicator

    if device.type == "cpu":
        _report(rendezvous, device, "gloo")
        return TorchCommunicator(rendezvous, device=device)
    access = peer_access.find_peer_access(rendezvous, device)
    if backend == "torch":
        obstacle = "not asked for"
    elif not rendezvous.agree("mscclpp importable", not mscclpp.why_not()):
        obstacle = mscclpp.why_not() or "another rank cannot import mscclpp"
    elif not access.one_host:
        obstacle = "the ranks are on several hosts"
    elif not access.direct:
        obstacle = "the devices have no access to each other's memory"
    else:
        _report(rendezvous, device, "MSCCL++")
        return mscclpp.MscclppCommunicator(rendezvous, device=device)
    if backend == "mscclpp":
        raise ValueError(f"backend is 'mscclpp', but {obstacle}; use 'torch' or 'auto'")
    if not access.direct:
        peer_access.use_host_memory(rendezvous.rank)
    _report(rendezvous, device, f"NCCL (MSCCL++: {obstacle})")
    return TorchCommunicator(rendezvous, device=device)


def _report(rendezvous: Rendezvous, device: torch.device, library: str) -> None:
    _log.info(
        "Rank %d of %d on %s: collectives by %s.",
        rendezvous.rank,
        rendezvous.world_size,
        device,
        library,
    )


def _check(
    device: torch.device | str, rank: int, world_size: int, backend: str, timeout: float
) -> torch.device:
    """Check the arguments of `connect`; the device, with an index where there are several."""
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; expected at least 1 rank")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; expected 0 to {world_size - 1}, world_size - 1")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout is {timeout}; expected a positive, finite number of seconds")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {where}; expected the CPU or a CUDA device")
    if where.type == "cpu":
        if backend == "mscclpp":
            raise ValueError(
                "backend is 'mscclpp' and device is cpu; MSCCL++ connects CUDA devices only: "
                "use 'torch' or 'auto'"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (where.index or 0) >= count:
        raise ValueError(
            f"device is {where}, and torch sees {count} CUDA devices here; "
            f"expected one of them, or 'cpu'"
        )
    return where if where.index is not None else torch.device("cuda", torch.cuda.current_device())

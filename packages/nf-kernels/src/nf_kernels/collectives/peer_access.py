"""Whether the CUDA devices of the ranks reach each other's memory."""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
from dataclasses import dataclass

import torch

from nf_kernels.collectives.rendezvous import Rendezvous

_log = logging.getLogger(__name__)

NCCL_VARIABLE = "NCCL_P2P_DISABLE"
"""NCCL's own environment variable; 1 makes it copy through host memory."""


@dataclass(frozen=True, slots=True)
class PeerAccess:
    """How the devices of all ranks reach each other; the same on every rank.

    Attributes:
        one_host: All ranks run on one host.
        direct: No two devices of a host are known to lack peer access. A device that another
            process hides from this one (CUDA_VISIBLE_DEVICES) is not known.
    """

    one_host: bool
    direct: bool


def find_peer_access(rendezvous: Rendezvous, device: torch.device) -> PeerAccess:
    """Find out with the other ranks; every rank must call.

    Args:
        rendezvous: The ranks.
        device: CUDA device of this rank, with its index.
    """
    visible = [
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    ]
    here = socket.gethostname()
    answers = rendezvous.exchange("device", json.dumps([here, visible[device.index]]))
    ranks = [json.loads(answer) for answer in answers]
    peers = {uuid for host, uuid in ranks if host == here}
    direct = all(
        torch.cuda.can_device_access_peer(device.index, index)
        for index, uuid in enumerate(visible)
        if index != device.index and uuid in peers
    )
    return PeerAccess(
        one_host=all(host == here for host, _ in ranks),
        # NCCL picks a transport at both ends of a connection, so that all ranks have to agree.
        direct=rendezvous.agree("direct", direct),
    )


def use_host_memory(rank: int) -> None:
    """Let NCCL copy through host memory, in groups that this process makes from here on.

    A process that has used NCCL before keeps what it read then. Rank 0 warns, once.
    """
    os.environ.setdefault(NCCL_VARIABLE, "1")
    if rank == 0:
        _warn_once()


@functools.cache
def _warn_once() -> None:
    _log.warning(
        "Devices of one host have no access to each other's memory: NCCL copies through host "
        "memory (%s=1).",
        NCCL_VARIABLE,
    )

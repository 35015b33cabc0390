"""Memory near the device that reads it."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NODES = Path("/sys/devices/system/node")
_PCI_DEVICES = Path("/sys/bus/pci/devices")

# include/uapi/linux/mempolicy.h, and the numbers of the system call `mbind`.
_MPOL_PREFERRED = 1
_MBIND = {"x86_64": 237, "aarch64": 235}


def num_nodes(nodes: Path = _NODES) -> int:
    """NUMA nodes of this machine; 1 where the kernel does not say."""
    return max(1, sum(1 for path in nodes.glob("node[0-9]*")))


def node_of_pci_device(address: str, devices: Path = _PCI_DEVICES) -> int | None:
    """NUMA node that a PCI device hangs on; None where the kernel does not know.

    Args:
        address: such as `0000:65:00.0`.
        devices: the kernel's list of them.
    """
    path = devices / address.lower() / "numa_node"
    node = int(path.read_text()) if path.exists() else -1
    return node if node >= 0 else None


def place_near(storage: Tensor, device: torch.device) -> str:
    """Have the pages of `storage`, which nobody has touched yet, allocated near `device`.

    Args:
        storage: contiguous host memory that begins at a page of the system.
        device: who reads and writes it.

    Returns:
        What became of it, as a clause for a log line.
    """
    if device.type != "cuda":
        return f"not bound to a NUMA node: the device is the CPU ({num_nodes()} node(s))"
    properties: Any = torch.cuda.get_device_properties(device)
    address = (
        f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:"
        f"{properties.pci_device_id:02x}.0"
    )
    node = node_of_pci_device(address)
    if node is None:
        return f"not bound to a NUMA node: the system does not know that of {device}"
    error = bind(storage, node)
    return f"bound to NUMA node {node} of {device}" if error is None else f"not bound: {error}"


def bind(storage: Tensor, node: int) -> str | None:
    """Prefer NUMA node `node` for the pages of `storage`.

    Returns:
        None, or why it was not possible.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"the system call is not known on {platform.machine()}"
    mask = (ctypes.c_ulong * 16)()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask[node // bits] = 1 << (node % bits)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(storage.data_ptr()),
        ctypes.c_ulong(storage.numel() * storage.element_size()),
        ctypes.c_int(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(len(mask) * bits),
        ctypes.c_uint(0),
    )
    return f"the system refused it (errno {ctypes.get_errno()})" if failed else None

"""Choosing the device and the dtype, and how much memory a device has."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from nf_kernels.native import num_threads
from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import ModelConfig

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")

# oneDNN compiles a kernel for every number of rows it meets. It keeps 1024, up to 1 MB each,
# and torch, calling it, keeps as many again.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_CACHED_KERNELS = 128


def pick_device(name: str, rank: int = 0, num_ranks: int = 1) -> torch.device:
    """The device by its name; `auto` is a GPU where torch finds one, else the CPU.

    Also bounds the memory that the CPU's matrix library takes for compiled kernels.

    Args:
        name: As in a config.
        rank: Whose device; with several ranks, each has the GPU of its number.
        num_ranks: How many there are.

    Raises:
        ModelLoadError: It is a GPU, and torch finds none, or too few for all ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError(
            f"device is {name!r}, but torch {torch.__version__} finds no GPU; use device cpu, or "
            f"install a build of torch for CUDA"
        )
    for variable in _KERNEL_CACHES:  # read when the first kernel runs; what the user has set stays
        os.environ.setdefault(variable, str(_CACHED_KERNELS))
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ModelLoadError(
            f"device is {name!r}, but there are {torch.cuda.device_count()} GPUs, counted from 0"
        )
    if device.type == "cuda" and num_ranks > 1:
        count = torch.cuda.device_count()
        if num_ranks > count:
            raise ModelLoadError(
                f"tensor_parallel_size is {num_ranks}, but there are {count} GPUs; set it to "
                f"{count} or less, or device to cpu"
            )
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def pick_dtype(name: str, model: ModelConfig) -> torch.dtype:
    """The dtype by its name; `auto` is the checkpoint's.

    Raises:
        ModelLoadError: The checkpoint's dtype is none that a model can run in.
    """
    chosen = model.dtype if name == "auto" else name
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if chosen not in dtypes:
        raise ModelLoadError(
            f"the checkpoint's dtype is {chosen!r}; choose one of {', '.join(dtypes)} with dtype"
        )
    return dtypes[chosen]


def name_device(device: torch.device) -> str:
    """What a device is, so that what was measured on it is found again on another one like it."""
    if device.type == "cuda":
        name: str = torch.cuda.get_device_name(device)
        return name
    brand = platform.machine()
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                brand = value.strip()
                break
    return f"{brand}, {num_threads()} threads"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device, in bytes.

    Attributes:
        name: Of the device, such as `cuda:0`.
        kind: `cpu` or `cuda`.
        total_bytes: All of it that this process may use.
        free_bytes: What of it can be had now.
    """

    name: str
    kind: str
    total_bytes: int
    free_bytes: int


def measure_memory(device: torch.device) -> DeviceMemory:
    """How much memory a device has, and how much of it is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(str(device), "cuda", total, free)
    total, free = _machine_memory(_MEMINFO)
    limit, left = _container_memory(_CGROUP)  # a container may be allowed less than there is
    if limit is not None and left is not None:
        total, free = min(total, limit), min(free, left)
    return DeviceMemory("cpu", "cpu", total, free)


def _machine_memory(meminfo: Path) -> tuple[int, int]:
    """Memory of the machine, and what programs can have of it without swapping."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return total, min(total, int(value.split()[0]) << 10)
    return total, total  # a system that does not say


def _container_memory(cgroup: Path) -> tuple[int | None, int | None]:
    """What a container may use, and what is left of that; None where nothing is limited."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if not limit.isdecimal():
            return None, None
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(
            line.split() for line in (cgroup / "memory.stat").read_text().splitlines()
        )
    except OSError:
        return None, None
    # Cached files count as used, and make room when memory is asked for.
    used -= int(statistics.get("inactive_file", 0))
    return int(limit), max(0, int(limit) - used)

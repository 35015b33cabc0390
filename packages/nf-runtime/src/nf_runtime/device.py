"""Choosing the device, the dtype, and the memory for the KV cache."""

import os
from pathlib import Path

import torch

from nf_runtime.errors import ModelLoadError
from nf_runtime.model_config import ModelConfig

# Shares of memory that the KV cache takes when nobody says how much. On a CPU other programs need
# theirs, and the operating system takes no memory back from a full pool.
_CPU_SHARE = 0.1
_CUDA_SHARE = 0.85
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

# oneDNN compiles a kernel for every number of rows it meets. It keeps 1024, up to 1 MB each,
# and torch, calling it, keeps as many again.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_CACHED_KERNELS = 128


def pick_device(name: str) -> torch.device:
    """The device by its name; `auto` is a GPU where torch finds one, else the CPU.

    Also bounds the memory that the CPU's matrix library takes for compiled kernels.

    Raises:
        ModelLoadError: It is a GPU, and torch finds none.
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


def kv_cache_bytes(device: torch.device) -> int:
    """Bytes that the KV cache may take on a device by default."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A container may be allowed less than the machine has.
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()).isdecimal():
        memory = min(memory, int(limit))
    return int(memory * _CPU_SHARE)

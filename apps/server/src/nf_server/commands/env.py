"""`nanoflow env`: what to paste into a bug report."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = (
    *("nanoflow-server", "nf-runtime", "nf-scheduler", "nf-kvcache", "nf-kernels"),
    *("torch", "numpy", "transformers", "tokenizers", "safetensors"),
    *("fastapi", "uvicorn", "uvloop", "httptools", "pydantic"),
)

# The instruction sets that CPU kernels and torch choose between.
CPU_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


def run(as_json: bool) -> None:
    """Print the report, as aligned text or as one JSON object."""
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for section, content in report.items():
        print(section)
        items = content.items() if isinstance(content, dict) else [("", content)]
        for name, value in items:
            print(f"  {name:<16} {_text(value)}")


def collect() -> dict[str, Any]:
    """Versions, machine, devices and compiled extensions; never raises for a missing part."""
    return {
        "system": {
            "os": platform.platform(),
            "python": platform.python_version(),
            "executable": sys.executable,
        },
        "packages": {name: _version(name) for name in DISTRIBUTIONS},
        "cpu": {
            "model": _cpu_model(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "cores_usable": _usable_cores(),
            "memory_gib": _memory_gib(),
            "flags": [flag for flag in CPU_FLAGS if flag in _cpu_flags()],
        },
        "torch": _torch(),
        "extensions": _extensions(),
        "environment": _environment(),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(str(item) for item in value) or "-"
    return "-" if value is None else str(value)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _cpu_model() -> str | None:
    return _cpuinfo("model name") or platform.processor() or None


def _cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return round(total / 2**30, 1)


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation is what the report is for
        return {"error": f"{type(error).__name__}: {error}"}
    devices: dict[str, Any] = {"cpu": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            devices[f"cuda:{index}"] = (
                f"{device.name}, {device.total_memory / 2**30:.1f} GiB, "
                f"capability {device.major}.{device.minor}"
            )
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def _extensions() -> dict[str, Any]:
    try:
        from nf_kernels import native_status
    except Exception as error:  # as above
        return {"nf_kernels": {"available": False, "reason": f"{type(error).__name__}: {error}"}}
    return {"nf_kernels": asdict(native_status())}


def _environment() -> dict[str, str]:
    prefixes = ("NANOFLOW_", "NF_", "OMP_", "MKL_", "TORCH_", "CUDA_VISIBLE_DEVICES")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}

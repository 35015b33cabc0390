"""The compiled extension, or why there is none."""

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType

_log = logging.getLogger(__name__)

DISABLE_VARIABLE = "NANOFLOW_NATIVE_KERNELS"


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Whether the native CPU kernels can be used.

    Attributes:
        available: The extension is installed and loads.
        reason: Why it is not available; empty when it is.
        isa: Instruction set chosen at run time: `avx512_bf16`, `avx512`, `avx2` or `generic`; empty
            without it.
    """

    available: bool
    reason: str
    isa: str


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(DISABLE_VARIABLE) == "0":
        return None, f"switched off by {DISABLE_VARIABLE}=0"
    try:
        module = importlib.import_module("nf_kernels._cpu")
    except ModuleNotFoundError:
        return None, (
            "nf-kernels was installed without a C++ compiler or Python's headers; "
            "install them and reinstall nf-kernels for speed"
        )
    except ImportError as error:
        return None, f"the extension does not load: {error}"
    module.set_num_threads(_default_threads())
    return module, ""


def _default_threads() -> int:
    """What OMP_NUM_THREADS says, as for torch; else one per core that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """Threads that the native kernels run on outside of lanes; 1 without the extension."""
    module = native_module()
    return 1 if module is None else int(module.num_threads())


def set_num_threads(count: int) -> None:
    """Let the native kernels run on this many threads outside of lanes.

    Raises:
        ValueError: It is less than 1.
    """
    module = native_module()
    if module is not None:
        module.set_num_threads(count)


def native_module() -> ModuleType | None:
    """The extension module, or None; the first call without one logs why, once."""
    module, reason = _load()
    if module is None:
        _warn_once(reason)
    return module


@functools.cache
def _warn_once(reason: str) -> None:
    _log.warning("CPU kernels run in plain torch: %s.", reason)


def native_status() -> NativeStatus:
    """Tell whether the native CPU kernels are usable, and with which instruction set."""
    module, reason = _load()
    if module is None:
        return NativeStatus(available=False, reason=reason, isa="")
    return NativeStatus(available=True, reason="", isa=str(module.isa()))

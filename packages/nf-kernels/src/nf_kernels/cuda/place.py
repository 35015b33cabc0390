"""Where the CUDA library is kept."""

import os
from pathlib import Path

from nf_kernels.cuda import sources

FILE_NAME = "libnf_cuda.so"
_BESIDE = Path(__file__).resolve().parent


def cache_folder() -> Path:
    """Of this user, for libraries and objects that cannot be kept beside the package."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanoflow" / "cuda"


def libraries() -> list[Path]:
    """Where a library of these sources is looked for, in this order.

    Raises:
        RuntimeError: There are no sources.
    """
    return [_BESIDE / FILE_NAME, cache_folder() / sources.fingerprint() / FILE_NAME]


def library_to_build() -> Path:
    """Where a new library goes: beside this module, or where that is not writable into the cache.

    Raises:
        RuntimeError: There are no sources.
    """
    beside, cached = libraries()
    return beside if os.access(_BESIDE, os.W_OK) else cached


def object_folder() -> Path:
    """Where compiled kernels are kept: in the build folder of a checkout, else in the cache.

    Raises:
        RuntimeError: There are no sources.
    """
    place = sources.folder()
    if place.is_relative_to(_BESIDE):
        return cache_folder() / "objects"
    return place.parents[1] / "build" / "cuda"

"""Where the keys and values of an LLM live: pages on the device, shared by prefix.

`KVCache` hands out pages by the sequence, finds prefixes that are already computed, and holds the
tensors that attention kernels read. It runs no model and schedules nothing.

What needs torch is loaded when it is first used: `nf_kvcache.index`, `nf_kvcache.tier` and what
reads a cache on disk import without it.
"""

import importlib
from typing import TYPE_CHECKING

from nf_kvcache.errors import OutOfPages
from nf_kvcache.stats import KVCacheStats

if TYPE_CHECKING:
    from nf_kvcache.kv_cache import KVCache
    from nf_kvcache.layout import KVLayout
    from nf_kvcache.offload import IterationOffload
    from nf_kvcache.prefix_match import PrefixMatch

__version__ = "0.1.0"

_LATE = {
    "IterationOffload": "nf_kvcache.offload",
    "KVCache": "nf_kvcache.kv_cache",
    "KVLayout": "nf_kvcache.layout",
    "PrefixMatch": "nf_kvcache.prefix_match",
}

__all__ = [
    "IterationOffload",
    "KVCache",
    "KVCacheStats",
    "KVLayout",
    "OutOfPages",
    "PrefixMatch",
    "__version__",
]


def __getattr__(name: str) -> object:
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)

"""Where the keys and values of an LLM live: pages on the device, shared by prefix.

`KVCache` hands out pages by the sequence, finds prefixes that are already computed, and holds the
tensors that attention kernels read. It runs no model and schedules nothing.
"""

from nf_kvcache.errors import OutOfPages
from nf_kvcache.kv_cache import KVCache
from nf_kvcache.layout import KVLayout
from nf_kvcache.prefix_match import PrefixMatch
from nf_kvcache.stats import KVCacheStats

__version__ = "0.1.0"

__all__ = ["KVCache", "KVCacheStats", "KVLayout", "OutOfPages", "PrefixMatch", "__version__"]

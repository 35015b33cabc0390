"""The disk tier: pages of KV in files, bounded, verified, and warm after a restart.

Needs no torch. `DiskTier` belongs to one engine process; `DiskReader` reads what it keeps, from
any other. docs/kv-disk-format.md specifies the files.
"""

from nf_kvcache.disk.block_io import BlockIO, BlockRequest, ThreadIO, UringIO, default_block_io
from nf_kvcache.disk.buffers import aligned_buffers
from nf_kvcache.disk.disk_read import DiskRead
from nf_kvcache.disk.errors import CacheInUse, NotACache, PageGone
from nf_kvcache.disk.page_book import DiskEvents
from nf_kvcache.disk.reader import CachedPage, DiskReader
from nf_kvcache.disk.restore import StoredPage
from nf_kvcache.disk.stats import DiskStats
from nf_kvcache.disk.tier import DiskTier

__all__ = [
    "BlockIO",
    "BlockRequest",
    "CacheInUse",
    "CachedPage",
    "DiskEvents",
    "DiskRead",
    "DiskReader",
    "DiskStats",
    "DiskTier",
    "NotACache",
    "PageGone",
    "StoredPage",
    "ThreadIO",
    "UringIO",
    "aligned_buffers",
    "default_block_io",
]

"""What opening a cache on disk can fail with."""


class CacheInUse(RuntimeError):
    """Another process, or another tier of this one, holds the same directory."""


class NotACache(ValueError):
    """The directory holds no cache that this version can read."""


class PageGone(LookupError):
    """The page was evicted, is damaged, or its file is missing. Compute it again."""

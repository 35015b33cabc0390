"""Plain `generate` of Hugging Face transformers with prefixes from earlier calls and processes."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "nf_kvcache.integrations.transformers needs transformers: "
        "pip install 'nf-kvcache[transformers]'."
    ) from error

from nf_kvcache.integrations.transformers.prefix_cache import PrefixCache
from nf_kvcache.integrations.transformers.prefix_store import PrefixStore

__all__ = ["PrefixCache", "PrefixStore"]

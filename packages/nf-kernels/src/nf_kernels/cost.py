"""What an operation asks of a device. Imports without torch."""

from enum import StrEnum


class Category(StrEnum):
    """The resource an operation saturates when it runs alone."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


CATEGORIES: dict[str, Category] = {
    "embedding": Category.MEMORY,
    "rms_norm": Category.MEMORY,
    "linear": Category.COMPUTE,
    "rope_append": Category.MEMORY,
    "prefill_attention": Category.COMPUTE,
    "decode_attention": Category.MEMORY,
    "swiglu": Category.MEMORY,
    "moe_route": Category.MEMORY,
    "moe_experts": Category.COMPUTE,
    "gather_rows": Category.MEMORY,
    "sample": Category.MEMORY,
}
"""Category of every operation in `nf_kernels.ops`, by its name."""

"""Every operation, native on a CPU.

Arguments are those of `nf_kernels.ops.reference`. Shapes and dtypes are checked here, before the
extension is given an address; float32, bfloat16 and float16 are supported.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nf_kernels.lanes.cpu import current_lane
from nf_kernels.ops.cpu.arguments import in_plain_torch
from nf_kernels.ops.cpu.attention import (
    decode_attention,
    merge_attention,
    prefill_attention,
    rope_append,
)
from nf_kernels.ops.cpu.experts import moe_experts, moe_experts_scratch_bytes, moe_route
from nf_kernels.ops.cpu.products import linear
from nf_kernels.ops.cpu.row_operations import embedding, gather_rows, rms_norm, swiglu
from nf_kernels.ops.cpu.sampling import (
    feed_sampled,
    keep_sampled,
    sample,
    sample_scratch_bytes,
)
from nf_kernels.ops.kept_by_lane import kept_by_lane

__all__ = ["OPERATIONS", "in_plain_torch", "moe_experts_scratch_bytes", "sample_scratch_bytes"]

OPERATIONS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        operation.__name__: kept_by_lane(operation, current_lane)
        for operation in (
            embedding,
            gather_rows,
            rms_norm,
            linear,
            rope_append,
            prefill_attention,
            decode_attention,
            merge_attention,
            swiglu,
            moe_route,
            moe_experts,
            sample,
            feed_sampled,
            keep_sampled,
        )
    }
)

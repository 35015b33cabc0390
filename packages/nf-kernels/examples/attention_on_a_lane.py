"""Another engine's step: paged attention on one half of the CPU, a projection on the other."""

import torch

from nf_kernels import lanes, ops

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
kernels = ops.load("cpu")
left, right = lanes.partition("cpu", [1, 1])

cache = {
    name: torch.randn(512, KV_HEADS, PAGE, HEAD_DIM).bfloat16() for name in ("k_cache", "v_cache")
}
pages = {
    "page_table": torch.randperm(512, dtype=torch.int32).view(8, 64),  # 8 requests
    "seq_lens": torch.full((8,), 1000, dtype=torch.int32),
}
q, attended = (torch.randn(8, HEADS * HEAD_DIM).bfloat16() for _ in range(2))
weight = kernels.pack(torch.randn(4096, 4096).bfloat16())
x, projected = torch.randn(64, 4096).bfloat16(), torch.empty(64, 4096).bfloat16()

begin = left.record()
with left:
    kernels["decode_attention"](q=q, out=attended, scale=HEAD_DIM**-0.5, window=0, **pages, **cache)
with right:
    kernels["linear"](x=x, weight=weight, out=projected)
ends = left.record(), right.record()
for name, end in zip(("attention", "projection"), ends, strict=True):
    end.wait()
    print(f"{name} done after {end.seconds_since(begin) * 1e3:.2f} ms")

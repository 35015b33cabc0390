"""A Triton kernel whose blocks write down which SM they run on."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def probe(sms, spun, SPIN: tl.constexpr):
    """Write the hardware number of the SM, and keep it busy for SPIN steps, which are written."""
    block = tl.program_id(0)
    value = block
    for _ in range(SPIN):
        value = (value * 1664525 + 1013904223) & 0x7FFFFFFF
    tl.store(sms + block, cuda.smid())
    tl.store(spun + block, value)

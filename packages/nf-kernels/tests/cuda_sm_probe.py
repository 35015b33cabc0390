"""A Triton kernel whose blocks write down which SM they run on."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def probe(out, SPIN: tl.constexpr):
    """Write the hardware number of the SM, after keeping it busy for SPIN steps."""
    block = tl.program_id(0)
    spun = block
    for _ in range(SPIN):
        spun = (spun * 1664525 + 1013904223) & 0x7FFFFFFF
    tl.store(out + block, tl.where(spun >= 0, cuda.smid(), -1))

"""Every operation on a CUDA device: FlashInfer, cuBLAS through torch, and our CUTLASS kernels.

Not yet run on a device; docs/gpu-status.md says what is. Arguments are those of
`nf_kernels.ops.reference`. Dtypes, shapes and layouts are checked before anything is launched;
lengths, and page tables that the host has, when attention is planned (`attention_plans`). Other
indices are on the device, where looking at them would hold up the host or, by an assertion on the
device, end the process: the caller answers for them. Plain torch makes a wrong one an error of the
device; elsewhere it reads other memory (expert ids, positions, pages) or writes it (slots), and
nothing tells.

What computes an operation follows from its shape and dtype alone, so that views of the same rows
are computed the same. Rows that do not begin at a multiple of 16 bytes are copied to such first.

| operation | computed by | where | elsewhere |
| --- | --- | --- | --- |
| `rms_norm` | FlashInfer | 16 bits, rows of a multiple of 8 | plain torch |
| `swiglu` | FlashInfer | 16 bits, F a multiple of 8 | plain torch |
| `rope_append` | FlashInfer | 16 bits, head_dim 64, 128, 256, 512; see below | plain torch |
| `prefill_attention` | FlashInfer | 16 bits, head_dim 64, 128 or 256 | plain torch |
| `decode_attention` | FlashInfer | 16 bits, head_dim 64, 128 or 256 | plain torch |
| `linear` | cuBLAS | always | |
| `linear` on a capped lane | CUTLASS | 16 bits, `out` too; K, N multiples of 8; built | cuBLAS |
| `moe_experts` | torch, grouped product | bfloat16, D and F multiples of 8 | plain torch |
| the others | plain torch | always | |

FlashInfer's append wants the KV heads of a token in one block: head_dim / 8 threads, and from 256
on 32, for each head, at most 1024 together.

FlashInfer also has what these do, differently: its `merge_state` takes logarithms to base 2, gives
NaN where neither state has keys, and has no `out=`; its samplers draw their own random numbers,
while `sample` inverts the distribution at a number it is given, on which seeds rest.

*Batch invariance.* What computes each row, or element, on its own with a fixed order is invariant.
Not so: products, since cuBLAS chooses a kernel by the number of rows; attention, since FlashInfer
cuts long requests by how full the batch leaves the device. (A fixed piece makes its decode
invariant; in prefill the height of its tiles, and with it the order of its sums, follows from the
mean number of queries.) Nor `sample`: the order of torch's running sums follows from the number of
rows.
"""

from nf_kernels.ops.cuda.operations import INVARIANT, CudaOperations
from nf_kernels.ops.cuda.support import (
    flashinfer,
    missing,
    takes_attention,
    takes_grouped,
    takes_rope,
    takes_rows,
)

__all__ = [
    "INVARIANT",
    "CudaOperations",
    "flashinfer",
    "missing",
    "takes_attention",
    "takes_grouped",
    "takes_rope",
    "takes_rows",
]

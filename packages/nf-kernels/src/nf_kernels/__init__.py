"""Operations of a transformer layer for CPU and GPU, behind one interface.

`nf_kernels.ops.load(device)` gives the fastest implementation of every operation that works on this
machine; `nf_kernels.ops.reference` is the same set in plain torch, the oracle of the others.
"""

from nf_kernels.native import NativeStatus, native_status, num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = ["NativeStatus", "__version__", "native_status", "num_threads", "set_num_threads"]

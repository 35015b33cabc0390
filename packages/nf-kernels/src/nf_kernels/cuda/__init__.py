"""The CUDA library: matrix products and a copy that occupy as many SMs as they are told to.

`python -m nf_kernels.cuda.build` compiles it, `nf_kernels.cuda.library` loads and calls it.
Importing this package needs neither torch nor CUDA.
"""

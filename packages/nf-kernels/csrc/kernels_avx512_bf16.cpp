#if defined(NF_X86)
#define NF_ISA avx512_bf16
#include "kernels_impl.h"
#endif

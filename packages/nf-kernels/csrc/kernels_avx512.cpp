#if defined(NF_X86)
#define NF_ISA avx512
#include "kernels_impl.h"
#endif

#if defined(NF_X86)
#define NF_ISA avx2
#include "kernels_impl.h"
#endif

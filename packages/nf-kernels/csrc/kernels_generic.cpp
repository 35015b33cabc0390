#define NF_ISA generic
#include "kernels_impl.h"

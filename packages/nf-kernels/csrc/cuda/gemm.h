// The matrix products of the library: one GemmKernel per tile and dtype, each made by a translation unit of its own
// (gemm_kernel.cuh says how), and a table of them that nf_kernels.cuda.build generates from tiles.toml.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "nf_cuda.h"

namespace nf_cuda {

// Functions of one tile for one dtype. Sizes, strides and addresses have been checked against nf_cuda.h.
struct GemmKernel {
  int cluster_size;  // SMs that run a group of tiles together
  bool (*takes)(const nf_cuda_gemm_problem& problem);
  int64_t (*workspace_bytes)(const nf_cuda_gemm_problem& problem);
  int64_t (*blocks)(const nf_cuda_gemm_problem& problem);
  int (*run)(const nf_cuda_gemm_problem& problem, void* workspace, cudaStream_t stream);
};

struct GemmTile {
  const char* name;
  const GemmKernel* kernels[2];  // by nf_cuda_dtype; null where it was not built
};

extern const GemmTile kGemmTiles[];
extern const int kNumGemmTiles;
extern const char kFingerprint[];

}  // namespace nf_cuda

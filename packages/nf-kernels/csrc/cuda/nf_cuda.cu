// The functions of nf_cuda.h, and the copy.
#include "nf_cuda.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "gemm.h"

namespace nf_cuda {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 30;  // the kernels count in int, and round up to whole tiles
constexpr int64_t kVectorElements = 8;
constexpr uintptr_t kVectorBytes = 16;

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0; }

bool is_stride(int64_t stride, int64_t width) { return stride >= width && stride % kVectorElements == 0; }

const GemmTile* find_tile(int tile) { return tile >= 0 && tile < kNumGemmTiles ? &kGemmTiles[tile] : nullptr; }

// The kernel of a tile for a problem, or in `status` why it does not take it. Addresses are not looked at.
const GemmKernel* find_kernel(int tile, const nf_cuda_gemm_problem* problem, int* status) {
  const auto refuse = [status](int reason) {
    *status = reason;
    return nullptr;
  };
  const GemmTile* found = find_tile(tile);
  if (!found) return refuse(NF_CUDA_UNKNOWN_TILE);
  if (!problem) return refuse(NF_CUDA_NULL_ADDRESS);
  const nf_cuda_gemm_problem& p = *problem;
  if (p.dtype != NF_CUDA_BFLOAT16 && p.dtype != NF_CUDA_FLOAT16) return refuse(NF_CUDA_UNKNOWN_DTYPE);
  if (p.m < 0 || p.n < 0 || p.k < 1 || p.m > kMaxSize || p.n > kMaxSize || p.k > kMaxSize ||
      p.n % kVectorElements != 0 || p.k % kVectorElements != 0) {
    return refuse(NF_CUDA_BAD_SIZE);
  }
  if (!is_stride(p.x_stride, p.k) || !is_stride(p.weight_stride, p.k) || !is_stride(p.out_stride, p.n) ||
      (p.residual && !is_stride(p.residual_stride, p.n)) ||
      (p.residual == p.out && p.residual && p.residual_stride != p.out_stride)) {
    return refuse(NF_CUDA_BAD_STRIDE);
  }
  const GemmKernel* kernel = found->kernels[p.dtype];
  if (!kernel) return refuse(NF_CUDA_NOT_BUILT);
  if (p.sm_count < kernel->cluster_size) return refuse(NF_CUDA_TOO_FEW_SMS);
  *status = NF_CUDA_OK;
  return kernel;
}

bool is_empty(const nf_cuda_gemm_problem& p) { return p.m == 0 || p.n == 0; }

int check_addresses(const GemmKernel& kernel, const nf_cuda_gemm_problem& p) {
  if (is_empty(p)) return NF_CUDA_OK;
  if (!p.x || !p.weight || !p.out) return NF_CUDA_NULL_ADDRESS;
  for (const void* address : {p.x, p.weight, p.bias, p.residual, static_cast<const void*>(p.out)}) {
    if (!is_aligned(address)) return NF_CUDA_MISALIGNED;
  }
  return kernel.takes(p) ? NF_CUDA_OK : NF_CUDA_BAD_SIZE;
}

// Whether the current device can run the kernels.
int check_device() {
  // An error of an earlier launch would otherwise be taken for one of this.
  if (const cudaError_t earlier = cudaPeekAtLastError(); earlier != cudaSuccess) return earlier;
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  return major == 9 && minor == 0 ? NF_CUDA_OK : NF_CUDA_WRONG_DEVICE;
}

constexpr int kCopyThreads = 1024;
constexpr int kCopyVectors = 4;  // loads in flight of a thread: 64 KiB of an SM
// More than half of an SM's, so that no SM runs two blocks of the copy, nor one beside a matrix product.
constexpr int kCopySharedBytes = 120 * 1024;

__global__ void __launch_bounds__(kCopyThreads, 1)
    copy_kernel(uint4* __restrict__ dst, const uint4* __restrict__ src, int64_t vectors, int tail_bytes) {
  constexpr int64_t kChunk = kCopyThreads * kCopyVectors;
  for (int64_t first = blockIdx.x * kChunk; first < vectors; first += gridDim.x * kChunk) {
    const int64_t mine = first + threadIdx.x;
    uint4 values[kCopyVectors];
    if (first + kChunk <= vectors) {
#pragma unroll
      for (int i = 0; i < kCopyVectors; ++i) values[i] = __ldcs(src + mine + i * kCopyThreads);
#pragma unroll
      for (int i = 0; i < kCopyVectors; ++i) __stcs(dst + mine + i * kCopyThreads, values[i]);
    } else {
      for (int64_t i = mine; i < vectors; i += kCopyThreads) __stcs(dst + i, __ldcs(src + i));
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < tail_bytes) {
    reinterpret_cast<char*>(dst + vectors)[threadIdx.x] = reinterpret_cast<const char*>(src + vectors)[threadIdx.x];
  }
}

const char* own_message(int status) {
  switch (status) {
    case NF_CUDA_OK: return "done";
    case NF_CUDA_UNKNOWN_TILE: return "the library has no such tile";
    case NF_CUDA_UNKNOWN_DTYPE: return "the dtype is neither bfloat16 nor float16";
    case NF_CUDA_BAD_SIZE: return "a size is out of range, or n or k is no multiple of 8";
    case NF_CUDA_BAD_STRIDE:
      return "a stride is less than the row or no multiple of 8, or out is residual with another stride";
    case NF_CUDA_MISALIGNED: return "an address is no multiple of 16 bytes";
    case NF_CUDA_TOO_FEW_SMS: return "sm_count is less than the tile's cluster has";
    case NF_CUDA_SMALL_WORKSPACE: return "the workspace is smaller than nf_cuda_gemm_workspace_bytes says";
    case NF_CUDA_WRONG_DEVICE: return "the device is not of compute capability 9.0";
    case NF_CUDA_NULL_ADDRESS: return "an address is null that may not be";
    case NF_CUDA_NOT_LAUNCHED: return "the kernel could not be launched";
    case NF_CUDA_NOT_BUILT: return "the library was built without this tile for this dtype";
    default: return "unknown status";
  }
}

}  // namespace
}  // namespace nf_cuda

using namespace nf_cuda;

extern "C" {

const char* nf_cuda_fingerprint(void) { return kFingerprint; }

const char* nf_cuda_message(int status) {
  return status > 0 ? cudaGetErrorString(static_cast<cudaError_t>(status)) : own_message(status);
}

int nf_cuda_gemm_tiles(void) { return kNumGemmTiles; }

const char* nf_cuda_gemm_tile_name(int tile) {
  const GemmTile* found = find_tile(tile);
  return found ? found->name : nullptr;
}

int nf_cuda_gemm_check(int tile, const nf_cuda_gemm_problem* problem) {
  int status;
  const GemmKernel* kernel = find_kernel(tile, problem, &status);
  return kernel ? check_addresses(*kernel, *problem) : status;
}

int nf_cuda_gemm_workspace_bytes(int tile, const nf_cuda_gemm_problem* problem, int64_t* bytes) {
  int status;
  const GemmKernel* kernel = find_kernel(tile, problem, &status);
  if (kernel && !bytes) return NF_CUDA_NULL_ADDRESS;
  if (kernel) *bytes = is_empty(*problem) ? 0 : kernel->workspace_bytes(*problem);
  return status;
}

int nf_cuda_gemm_blocks(int tile, const nf_cuda_gemm_problem* problem, int64_t* blocks) {
  int status;
  const GemmKernel* kernel = find_kernel(tile, problem, &status);
  if (kernel && !blocks) return NF_CUDA_NULL_ADDRESS;
  if (kernel) *blocks = is_empty(*problem) ? 0 : kernel->blocks(*problem);
  return status;
}

int nf_cuda_gemm(int tile, const nf_cuda_gemm_problem* problem, void* workspace, int64_t workspace_bytes,
                 void* stream) {
  int status;
  const GemmKernel* kernel = find_kernel(tile, problem, &status);
  if (!kernel) return status;
  const nf_cuda_gemm_problem& p = *problem;
  status = check_addresses(*kernel, p);
  if (status != NF_CUDA_OK || is_empty(p)) return status;
  if (const int64_t needed = kernel->workspace_bytes(p); needed > 0) {
    if (!workspace || workspace_bytes < needed) return NF_CUDA_SMALL_WORKSPACE;
    if (!is_aligned(workspace)) return NF_CUDA_MISALIGNED;
  }
  status = check_device();
  return status == NF_CUDA_OK ? kernel->run(p, workspace, static_cast<cudaStream_t>(stream)) : status;
}

int nf_cuda_copy(void* dst, const void* src, int64_t bytes, int32_t sm_count, void* stream) {
  if (bytes < 0) return NF_CUDA_BAD_SIZE;
  if (sm_count < 1) return NF_CUDA_TOO_FEW_SMS;
  if (bytes == 0) return NF_CUDA_OK;
  if (!dst || !src) return NF_CUDA_NULL_ADDRESS;
  if (!is_aligned(dst) || !is_aligned(src)) return NF_CUDA_MISALIGNED;
  if (const int status = check_device(); status != NF_CUDA_OK) return status;
  const cudaError_t error =
      cudaFuncSetAttribute(copy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kCopySharedBytes);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return error;
  }
  const int64_t vectors = bytes / static_cast<int64_t>(kVectorBytes);
  copy_kernel<<<sm_count, kCopyThreads, kCopySharedBytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<uint4*>(dst), static_cast<const uint4*>(src), vectors,
      static_cast<int>(bytes % static_cast<int64_t>(kVectorBytes)));
  return cudaGetLastError();
}

}  // extern "C"

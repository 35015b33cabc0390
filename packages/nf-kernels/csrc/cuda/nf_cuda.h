/* The CUDA library of nf-kernels: a plain C interface, so that one build serves every Python and every torch.
 *
 * Functions return a status: 0 (NF_CUDA_OK), one of enum nf_cuda_status, or a cudaError_t, which is positive;
 * nf_cuda_message says in words what it means. Work is queued on the caller's stream, of the device that is current
 * to the calling thread; nothing here allocates device memory or waits for the device. Functions may be called from
 * several threads. Only nf_cuda_gemm and nf_cuda_copy need a device, one of compute capability 9.0.
 */
#ifndef NF_CUDA_H
#define NF_CUDA_H

#include <stdint.h>

#if defined(_WIN32)
#define NF_CUDA_API __declspec(dllexport)
#else
#define NF_CUDA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum nf_cuda_status {
  NF_CUDA_OK = 0,
  NF_CUDA_UNKNOWN_TILE = -1,
  NF_CUDA_UNKNOWN_DTYPE = -2,
  NF_CUDA_BAD_SIZE = -3,
  NF_CUDA_BAD_STRIDE = -4,
  NF_CUDA_MISALIGNED = -5,
  NF_CUDA_TOO_FEW_SMS = -6,
  NF_CUDA_SMALL_WORKSPACE = -7,
  NF_CUDA_WRONG_DEVICE = -8,
  NF_CUDA_NULL_ADDRESS = -9,
  NF_CUDA_NOT_LAUNCHED = -10,
  NF_CUDA_NOT_BUILT = -11
};

enum nf_cuda_dtype { NF_CUDA_BFLOAT16 = 0, NF_CUDA_FLOAT16 = 1 };

/* out [m, n] = x [m, k] · weight [n, k]ᵀ + bias [n] + residual [m, n], added up in float32 and rounded once.
 *
 * All are of one dtype and row-major; a stride is the number of elements from one row to the next. Addresses are
 * multiples of 16 bytes; n, k and the strides are multiples of 8. bias and residual may be null; out may be residual,
 * with its stride.
 */
struct nf_cuda_gemm_problem {
  const void* x;
  const void* weight;
  const void* bias;
  const void* residual;
  void* out;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t x_stride;
  int64_t weight_stride;
  int64_t residual_stride;
  int64_t out_stride;
  int32_t dtype;    /* enum nf_cuda_dtype */
  int32_t sm_count; /* the most SMs that the kernel occupies; no fewer than the tile's cluster has */
};

/* What the library was built from: the text that nf_kernels.cuda.sources.fingerprint() gives for the same sources. */
NF_CUDA_API const char* nf_cuda_fingerprint(void);

/* A sentence for a status. */
NF_CUDA_API const char* nf_cuda_message(int status);

/* Tiles are numbered from 0; which ones there are was chosen when the library was built. */
NF_CUDA_API int nf_cuda_gemm_tiles(void);

/* The name of a tile as in tiles.toml, or null. */
NF_CUDA_API const char* nf_cuda_gemm_tile_name(int tile);

/* NF_CUDA_OK if the tile takes the problem. An empty out (m or n of 0) is taken. */
NF_CUDA_API int nf_cuda_gemm_check(int tile, const struct nf_cuda_gemm_problem* problem);

/* The bytes of workspace that nf_cuda_gemm needs; may be 0. Addresses are not looked at. */
NF_CUDA_API int nf_cuda_gemm_workspace_bytes(int tile, const struct nf_cuda_gemm_problem* problem, int64_t* bytes);

/* The thread blocks that nf_cuda_gemm launches, one per SM: sm_count in whole clusters, or fewer if there are fewer
 * tiles. Addresses are not looked at. */
NF_CUDA_API int nf_cuda_gemm_blocks(int tile, const struct nf_cuda_gemm_problem* problem, int64_t* blocks);

/* Queues the product. workspace, a multiple of 16 bytes, belongs to the kernel until it has run. */
NF_CUDA_API int nf_cuda_gemm(int tile, const struct nf_cuda_gemm_problem* problem, void* workspace,
                             int64_t workspace_bytes, void* stream);

/* Queues a copy from device memory to device memory that occupies sm_count SMs. The ranges do not overlap; addresses
 * are multiples of 16. */
NF_CUDA_API int nf_cuda_copy(void* dst, const void* src, int64_t bytes, int32_t sm_count, void* stream);

#ifdef __cplusplus
}
#endif

#endif

// The kernels of the extension, once per instruction set (NF_ISA names the namespace).
//
// Every kernel computes in float, whatever the element type, and row i of a result depends on row i
// alone: the order of each reduction is fixed, so a row is bitwise the same in any batch.
#pragma once

#include <cstdint>

namespace nf {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct AttentionArgs {
  const void* q;              // [tokens, num_heads, head_dim], rows q_stride elements apart
  const void* k_cache;        // [pages, num_kv_heads, page_size, head_dim]
  const void* v_cache;        // as k_cache
  const int32_t* page_table;  // [requests, page_table_stride]
  const int32_t* query_start; // [requests + 1], rows of q by request
  const int32_t* seq_lens;    // [requests], tokens in pages including the queries
  void* out;                  // [tokens, num_heads, head_dim], rows out_stride elements apart
  int64_t num_requests, num_heads, num_kv_heads, head_dim, page_size;
  int64_t page_table_stride, q_stride, out_stride;
  float scale;
  int64_t window;             // keys a query sees, itself included; 0: all
};

struct RopeAppendArgs {
  const void* qkv;            // [tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  const int64_t* positions;   // [tokens]
  const int64_t* slots;       // [tokens], page * page_size + offset in the page
  const float* cos_sin;       // [max position, head_dim]: cosines, then sines
  const void* q_norm;         // [head_dim] or null
  const void* k_norm;         // [head_dim] or null
  void* k_cache;
  void* v_cache;
  void* out;                  // [tokens, num_heads * head_dim]
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, page_size, qkv_stride, out_stride;
  float eps;
};

struct RmsNormArgs {
  const void* x;
  const void* weight;
  void* out;
  int64_t num_rows, width, x_stride, out_stride;
  float eps;
};

struct SwiGluArgs {
  const void* gate_up;        // [rows, 2 * width]: gate, then up
  void* out;                  // [rows, width]
  int64_t num_rows, width, gate_up_stride, out_stride;
};

struct KernelTable {
  const char* isa;
  void (*paged_attention)(DType, const AttentionArgs&);
  void (*rope_append)(DType, const RopeAppendArgs&);
  void (*rms_norm)(DType, const RmsNormArgs&);
  void (*swiglu)(DType, const SwiGluArgs&);
};

namespace generic { extern const KernelTable kTable; }
#if defined(NF_X86)
namespace avx2 { extern const KernelTable kTable; }
namespace avx512 { extern const KernelTable kTable; }
#endif

}  // namespace nf

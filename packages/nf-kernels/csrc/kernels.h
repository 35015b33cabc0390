// The kernels of the extension, once per instruction set (NF_ISA names the namespace).
//
// Every kernel adds up in float, whatever the element type, and row i of a result depends on row i alone: the order of
// each sum is fixed, so a row is bitwise the same in any batch and with any number of threads.
//
// Strides are in elements; rows are contiguous.
#pragma once

#include <cstdint>

#include "team.h"

namespace nf {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct AttentionArgs {
  const void* q;               // [tokens, num_heads, head_dim], rows q_stride apart
  const void* k_cache;         // [pages, num_kv_heads, page_size, head_dim]
  const void* v_cache;         // as k_cache
  const int32_t* page_table;   // [requests, page_table_stride]
  const int32_t* query_start;  // [requests + 1], rows of q by request, from any number on; null: one each
  const int32_t* seq_lens;     // [requests], tokens in pages including the queries
  void* out;                   // [tokens, num_heads, head_dim], rows out_stride apart
  float* lse;                  // [tokens, num_heads] or null: logarithm of the sum of exponentials of the scores
  int64_t num_requests, num_heads, num_kv_heads, head_dim, page_size;
  int64_t page_table_stride, q_stride, out_stride;
  float scale;
  float soft_cap;              // scores become soft_cap * tanh(score / soft_cap); 0: as they are
  int64_t window;              // keys a query sees, itself included; 0: all

  // Of a request, in q.
  int64_t first_row(int64_t request) const {
    return query_start ? int64_t{query_start[request]} - query_start[0] : request;
  }
};

struct MergeArgs {
  const void* a;               // [tokens, num_heads, head_dim], as b and out
  const void* b;
  const float* lse_a;          // [tokens, num_heads], as lse_b and lse_out
  const float* lse_b;
  void* out;
  float* lse_out;
  int64_t num_tokens, num_heads, head_dim, a_stride, b_stride, out_stride;
};

struct RopeAppendArgs {
  const void* qkv;             // [tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  const int64_t* positions;    // [tokens]
  const int64_t* slots;        // [tokens], page * page_size + offset in the page
  const float* cos_sin;        // [max position, head_dim]: cosines, then sines
  const void* q_norm;          // [head_dim] or null
  const void* k_norm;          // [head_dim] or null
  void* k_cache;
  void* v_cache;
  void* out;                   // [tokens, num_heads * head_dim]
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, page_size, qkv_stride, out_stride;
  float eps;
};

struct RmsNormArgs {
  const void* x;
  const void* weight;
  void* residual;              // or null: x is added to it, and the sum is normalized
  void* out;
  int64_t num_rows, width, x_stride, residual_stride, out_stride;
  float eps;
};

struct SwiGluArgs {
  const void* gate_up;         // [rows, 2 * width]: gate, then up
  void* out;                   // [rows, width]
  int64_t num_rows, width, gate_up_stride, out_stride;
};

struct LinearArgs {
  const void* x;               // [rows, in_features]
  const void* weight;          // packed (multiply.h), out_features padded with zeros to whole blocks
  const void* bias;            // [out_features] or null
  const void* residual;        // [rows, out_features] or null
  void* out;                   // [rows, out_features]; may be residual itself
  int64_t num_rows, in_features, out_features, x_stride, residual_stride, out_stride;
  bool float_out;              // whether out has floats, and not the elements of x
};

struct GroupedLinearArgs {
  LinearArgs linear;           // without bias and residual; weight: of the first group
  const int64_t* row_start;    // [groups + 1], rows of x and out by group
  int64_t num_groups, weight_stride;
};

struct GatherArgs {
  const void* table;           // [table rows, width], or packed (multiply.h)
  const int64_t* index;        // [rows]
  void* out;                   // [rows, width]
  int64_t num_rows, width, table_stride, out_stride;
};

struct CombineArgs {
  const void* x;               // [tokens * experts of a token, width]
  const int64_t* row_of;       // [tokens, experts of a token], rows of x; -1 for one that counts for nothing
  const float* weights;        // [tokens, experts of a token]
  const void* residual;        // [tokens, width], or null
  void* out;                   // [tokens, width]; may be residual itself
  int64_t num_tokens, experts_per_token, width, residual_stride, out_stride;
};

struct RouteArgs {
  const void* logits;          // [tokens, num_experts]
  int64_t* expert_ids;         // [tokens, experts_per_token]
  float* expert_weights;       // as expert_ids
  int64_t num_tokens, num_experts, experts_per_token, logits_stride;
  bool normalize;
};

struct SampleArgs {
  const float* logits;         // [rows, vocab_size]
  const float* temperature;    // [rows], as the next four
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* uniform;
  int64_t* out;                // [rows]
  void* scratch;               // per thread, sample_scratch_bytes(vocab_size)
  int64_t num_rows, vocab_size, logits_stride;
};

template <typename Args>
using Kernel = void (*)(DType, const Args&, const Team&);

struct KernelTable {
  const char* isa;
  Kernel<AttentionArgs> paged_attention;
  Kernel<MergeArgs> merge_attention;
  Kernel<RopeAppendArgs> rope_append;
  Kernel<RmsNormArgs> rms_norm;
  Kernel<SwiGluArgs> swiglu;
  Kernel<LinearArgs> linear;
  Kernel<GroupedLinearArgs> grouped_linear;
  Kernel<GatherArgs> gather_rows;
  Kernel<GatherArgs> gather_packed_rows;
  Kernel<RouteArgs> moe_route;
  Kernel<CombineArgs> moe_combine;
  void (*exponentials)(const float* logits, int64_t n, float maximum, float temperature, float* out);
  float (*maximum)(const float* values, int64_t n);
};

namespace generic { extern const KernelTable kTable; }
#if defined(NF_X86)
namespace avx2 { extern const KernelTable kTable; }
namespace avx512 { extern const KernelTable kTable; }
namespace avx512_bf16 { extern const KernelTable kTable; }
namespace amx { KernelTable make_table(); }
#endif

}  // namespace nf

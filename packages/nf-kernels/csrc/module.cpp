// pybind11 module nf_kernels._cpu. Tensors arrive as addresses, so that the extension does not link
// against torch and one build serves several torch versions; nf_kernels.ops.cpu checks every shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings.h"
#include "instruction_sets.h"
#include "lane.h"
#include "operations.h"
#include "program.h"
#include "sampling.h"
#include "shared_pool.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Writes an operation down, while this thread records; else queues it on the current lane; else runs it now.
template <typename Operation>
void perform(const Operation& operation) {
  if (nf::Recording* recording = nf::Recording::current()) {
    recording->add(operation);
  } else if (nf::Lane* lane = nf::current_lane()) {
    lane->submit([operation, lane] { operation.run(lane->threads()); });
  } else {
    operation.run(nf::shared_pool());
  }
}

void paged_attention(int dtype, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t page_table,
                     uintptr_t query_start, uintptr_t seq_lens, uintptr_t out, uintptr_t lse, int64_t num_requests,
                     int64_t num_queries, int64_t num_pages, int64_t pages_per_row, int64_t num_heads,
                     int64_t num_kv_heads, int64_t head_dim, int64_t page_size, int64_t page_table_stride,
                     int64_t q_stride, int64_t out_stride, float scale, float soft_cap, int64_t window) {
  perform(nf::PagedAttention{
      static_cast<nf::DType>(dtype),
      {at<void>(q), at<void>(k_cache), at<void>(v_cache), at<int32_t>(page_table), at<int32_t>(query_start),
       at<int32_t>(seq_lens), at<void>(out), at<float>(lse), num_requests, num_heads, num_kv_heads, head_dim, page_size,
       page_table_stride, q_stride, out_stride, scale, soft_cap, window},
      num_queries,
      num_pages,
      pages_per_row});
}

void merge_attention(int dtype, uintptr_t a, uintptr_t b, uintptr_t lse_a, uintptr_t lse_b, uintptr_t out,
                     uintptr_t lse_out, int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t a_stride,
                     int64_t b_stride, int64_t out_stride) {
  perform(nf::MergeAttention{static_cast<nf::DType>(dtype),
                             {at<void>(a), at<void>(b), at<float>(lse_a), at<float>(lse_b), at<void>(out),
                              at<float>(lse_out), num_tokens, num_heads, head_dim, a_stride, b_stride, out_stride}});
}

void rope_append(int dtype, uintptr_t qkv, uintptr_t positions, uintptr_t slots, uintptr_t cos_sin,
                 uintptr_t q_norm, uintptr_t k_norm, uintptr_t k_cache, uintptr_t v_cache,
                 uintptr_t out, int64_t num_tokens, int64_t num_positions, int64_t num_pages,
                 int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t page_size,
                 int64_t qkv_stride, int64_t out_stride, float eps) {
  perform(nf::RopeAppend{static_cast<nf::DType>(dtype),
                         {at<void>(qkv), at<int64_t>(positions), at<int64_t>(slots), at<float>(cos_sin),
                          at<void>(q_norm), at<void>(k_norm), at<void>(k_cache), at<void>(v_cache), at<void>(out),
                          num_tokens, num_heads, num_kv_heads, head_dim, page_size, qkv_stride, out_stride, eps},
                         num_positions,
                         num_pages});
}

void rms_norm(int dtype, uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int64_t num_rows,
              int64_t width, int64_t x_stride, int64_t residual_stride, int64_t out_stride, float eps) {
  perform(nf::RmsNorm{static_cast<nf::DType>(dtype),
                      {at<void>(x), at<void>(weight), at<void>(residual), at<void>(out), num_rows, width, x_stride,
                       residual_stride, out_stride, eps}});
}

void swiglu(int dtype, uintptr_t gate_up, uintptr_t out, int64_t num_rows, int64_t width,
            int64_t gate_up_stride, int64_t out_stride) {
  perform(nf::SwiGlu{static_cast<nf::DType>(dtype),
                     {at<void>(gate_up), at<void>(out), num_rows, width, gate_up_stride, out_stride}});
}

void linear(int dtype, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
            int64_t num_rows, int64_t in_features, int64_t out_features, int64_t x_stride, int64_t residual_stride,
            int64_t out_stride, bool float_out) {
  perform(nf::Linear{static_cast<nf::DType>(dtype),
                     {at<void>(x), at<void>(weight), at<void>(bias), at<void>(residual), at<void>(out), num_rows,
                      in_features, out_features, x_stride, residual_stride, out_stride, float_out}});
}

// `is_embedding` tells what the indices are called.
void gather_rows(int dtype, uintptr_t source, uintptr_t index, uintptr_t out, int64_t num_rows, int64_t width,
                 int64_t source_rows, int64_t source_stride, int64_t out_stride, bool packed, bool is_embedding) {
  perform(nf::GatherRows{
      static_cast<nf::DType>(dtype),
      {at<void>(source), at<int64_t>(index), at<void>(out), num_rows, width, source_stride, out_stride},
      source_rows,
      packed,
      is_embedding ? "token_ids" : "index"});
}

void moe_route(int dtype, uintptr_t logits, uintptr_t expert_ids, uintptr_t expert_weights, int64_t num_tokens,
               int64_t num_experts, int64_t experts_per_token, int64_t logits_stride, bool normalize) {
  perform(nf::MoeRoute{static_cast<nf::DType>(dtype),
                       {at<void>(logits), at<int64_t>(expert_ids), at<float>(expert_weights), num_tokens, num_experts,
                        experts_per_token, logits_stride, normalize}});
}

int64_t moe_experts_scratch_bytes(int dtype, int64_t num_tokens, int64_t experts_per_token, int64_t num_experts,
                                  int64_t hidden, int64_t inner) {
  nf::MoeExperts operation{};
  operation.dtype = static_cast<nf::DType>(dtype);
  operation.num_tokens = num_tokens;
  operation.experts_per_token = experts_per_token;
  operation.num_experts = num_experts;
  operation.hidden = hidden;
  operation.inner = inner;
  return operation.scratch_bytes();
}

void moe_experts(int dtype, uintptr_t x, uintptr_t expert_ids, uintptr_t expert_weights, uintptr_t gate_up,
                 uintptr_t down, uintptr_t residual, uintptr_t out, uintptr_t scratch, int64_t num_tokens,
                 int64_t experts_per_token, int64_t num_experts, int64_t hidden, int64_t inner, int64_t x_stride,
                 int64_t residual_stride, int64_t out_stride, int64_t gate_up_stride, int64_t down_stride,
                 int64_t first_expert, bool is_part) {
  perform(nf::MoeExperts{static_cast<nf::DType>(dtype), at<void>(x), at<int64_t>(expert_ids), at<float>(expert_weights),
                         at<void>(gate_up), at<void>(down), at<void>(residual), at<void>(out), at<void>(scratch),
                         num_tokens, experts_per_token, num_experts, hidden, inner, x_stride, residual_stride,
                         out_stride, gate_up_stride, down_stride, first_expert, is_part});
}

int64_t sample_scratch_bytes(int64_t vocab_size) { return nf::max_threads() * nf::sample_scratch_bytes(vocab_size); }

void sample(uintptr_t logits, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
            uintptr_t uniform, uintptr_t out, uintptr_t scratch, int64_t num_rows, int64_t vocab_size,
            int64_t logits_stride) {
  perform(nf::Sample{{at<float>(logits), at<float>(temperature), at<int64_t>(top_k), at<float>(top_p),
                      at<float>(min_p), at<float>(uniform), at<int64_t>(out), at<void>(scratch), num_rows, vocab_size,
                      logits_stride}});
}

void feed_sampled(uintptr_t token_ids, uintptr_t slots, uintptr_t last_sampled, int64_t num_rows, int64_t num_slots) {
  perform(nf::FeedSampled{at<int64_t>(token_ids), at<int64_t>(slots), at<int64_t>(last_sampled), num_rows, num_slots});
}

void keep_sampled(uintptr_t sampled, uintptr_t slots, uintptr_t last_sampled, int64_t num_rows, int64_t num_slots) {
  perform(nf::KeepSampled{at<int64_t>(sampled), at<int64_t>(slots), at<int64_t>(last_sampled), num_rows, num_slots});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of nf_kernels; use them through nf_kernels.ops.";
  m.def("num_threads", [] { return nf::shared_pool().num_threads(); });
  m.def("set_num_threads", [](int64_t n) { nf::shared_pool().set_num_threads(n); },
        py::call_guard<py::gil_scoped_release>());
  m.def("isa", [] { return nf::kernels().isa; });
  m.def("usable_isas", &nf::usable_isas);
  m.def("use_isa", &nf::use_isa);
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("paged_attention", &paged_attention, release());
  m.def("merge_attention", &merge_attention, release());
  m.def("rope_append", &rope_append, release());
  m.def("rms_norm", &rms_norm, release());
  m.def("swiglu", &swiglu, release());
  m.def("linear", &linear, release());
  m.def("gather_rows", &gather_rows, release());
  m.def("moe_route", &moe_route, release());
  m.def("moe_experts", &moe_experts, release());
  m.def("moe_experts_scratch_bytes", &moe_experts_scratch_bytes);
  m.def("sample", &sample, release());
  m.def("sample_scratch_bytes", &sample_scratch_bytes);
  m.def("feed_sampled", &feed_sampled, release());
  m.def("keep_sampled", &keep_sampled, release());
  nf::bind_lanes(m);
  nf::bind_programs(m);
}

// pybind11 module nf_kernels._cpu. Tensors arrive as addresses, so that the extension does not link
// against torch and one build serves several torch versions; nf_kernels.ops.cpu checks every shape.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(NF_X86)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

#if defined(NF_X86)
// What both wide builds use beside the instructions they are named after. __builtin_cpu_supports
// does not know f16c in every compiler.
bool has_fma_and_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_FMA) && (c & bit_F16C);
}
#endif

const nf::KernelTable& choose_table() {
#if defined(NF_X86)
  if (has_fma_and_f16c()) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return nf::avx512::kTable;
    }
    if (__builtin_cpu_supports("avx2")) return nf::avx2::kTable;
  }
#endif
  return nf::generic::kTable;
}

const nf::KernelTable& table() {
  static const nf::KernelTable& chosen = choose_table();
  return chosen;
}

template <typename T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Refuses an index outside [0, end) before any kernel follows it. ValueError in Python.
template <typename Index>
void check_indices(const char* name, const Index* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= end) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " +
                                  std::to_string(values[i]) + "; expected 0 to " +
                                  std::to_string(end - 1));
    }
  }
}

void check_attention(const nf::AttentionArgs& a, int64_t num_queries, int64_t num_pages,
                     int64_t pages_per_row) {
  if (a.query_start[0] != 0 || a.query_start[a.num_requests] != num_queries) {
    throw std::invalid_argument("query_start runs from " + std::to_string(a.query_start[0]) +
                                " to " + std::to_string(a.query_start[a.num_requests]) +
                                "; expected 0 to " + std::to_string(num_queries) +
                                ", the rows of q");
  }
  for (int64_t r = 0; r < a.num_requests; ++r) {
    const int64_t count = a.query_start[r + 1] - a.query_start[r];
    const int64_t seq_len = a.seq_lens[r];
    if (count < 1 || seq_len < count || seq_len > pages_per_row * a.page_size) {
      throw std::invalid_argument(
          "request " + std::to_string(r) + " has " + std::to_string(count) +
          " queries by query_start and " + std::to_string(seq_len) +
          " tokens by seq_lens; expected at least 1 query, no more queries than tokens, and at "
          "most " + std::to_string(pages_per_row * a.page_size) + " tokens, the page_table's width");
    }
    check_indices("page_table", a.page_table + r * a.page_table_stride,
                  (seq_len + a.page_size - 1) / a.page_size, num_pages);
  }
}

void paged_attention(int dtype, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache,
                     uintptr_t page_table, uintptr_t query_start, uintptr_t seq_lens, uintptr_t out,
                     int64_t num_requests, int64_t num_queries, int64_t num_pages,
                     int64_t pages_per_row, int64_t num_heads, int64_t num_kv_heads,
                     int64_t head_dim, int64_t page_size, int64_t page_table_stride,
                     int64_t q_stride, int64_t out_stride, float scale, int64_t window) {
  const nf::AttentionArgs args{
      at<void>(q), at<void>(k_cache), at<void>(v_cache), at<int32_t>(page_table),
      at<int32_t>(query_start), at<int32_t>(seq_lens), at<void>(out), num_requests, num_heads,
      num_kv_heads, head_dim, page_size, page_table_stride, q_stride, out_stride, scale, window};
  check_attention(args, num_queries, num_pages, pages_per_row);
  table().paged_attention(static_cast<nf::DType>(dtype), args);
}

void rope_append(int dtype, uintptr_t qkv, uintptr_t positions, uintptr_t slots, uintptr_t cos_sin,
                 uintptr_t q_norm, uintptr_t k_norm, uintptr_t k_cache, uintptr_t v_cache,
                 uintptr_t out, int64_t num_tokens, int64_t num_positions, int64_t num_pages,
                 int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t page_size,
                 int64_t qkv_stride, int64_t out_stride, float eps) {
  check_indices("positions", at<int64_t>(positions), num_tokens, num_positions);
  check_indices("slots", at<int64_t>(slots), num_tokens, num_pages * page_size);
  table().rope_append(
      static_cast<nf::DType>(dtype),
      {at<void>(qkv), at<int64_t>(positions), at<int64_t>(slots), at<float>(cos_sin),
       at<void>(q_norm), at<void>(k_norm), at<void>(k_cache), at<void>(v_cache), at<void>(out),
       num_tokens, num_heads, num_kv_heads, head_dim, page_size, qkv_stride, out_stride, eps});
}

void rms_norm(int dtype, uintptr_t x, uintptr_t weight, uintptr_t out, int64_t num_rows,
              int64_t width, int64_t x_stride, int64_t out_stride, float eps) {
  table().rms_norm(static_cast<nf::DType>(dtype), {at<void>(x), at<void>(weight), at<void>(out),
                                                   num_rows, width, x_stride, out_stride, eps});
}

void swiglu(int dtype, uintptr_t gate_up, uintptr_t out, int64_t num_rows, int64_t width,
            int64_t gate_up_stride, int64_t out_stride) {
  table().swiglu(static_cast<nf::DType>(dtype),
                 {at<void>(gate_up), at<void>(out), num_rows, width, gate_up_stride, out_stride});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of nf_kernels; use them through nf_kernels.ops.";
  m.attr("isa") = table().isa;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("paged_attention", &paged_attention, release());
  m.def("rope_append", &rope_append, release());
  m.def("rms_norm", &rms_norm, release());
  m.def("swiglu", &swiglu, release());
}

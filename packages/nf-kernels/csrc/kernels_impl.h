// Definitions of kernels.h, included once per instruction set with NF_ISA set to its namespace.
// Only plain loops and inline helpers in here: a template of the standard library instantiated with
// wide instructions could be merged by the linker into code that runs on a narrower machine.

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "number.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxPageSize = 128;
constexpr int64_t kMaxRows = 32;           // query rows of one attention task
constexpr int64_t kParallelElements = 1 << 14;  // below this, waking threads costs more than it saves

// exp(x) for x <= 0, relative error below 2e-7 (Cephes expf), in a form that compilers vectorize.
inline float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = __builtin_floorf(clamped * 1.44269504088896341f + 0.5f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &exponent, sizeof(power));
  return x < -87.0f ? 0.0f : y * power;
}

template <typename T>
inline void load_row(const T* src, float* dst, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
}

inline __attribute__((always_inline)) float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
inline void prefetch(const T* p, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(p);
  const int64_t end = n * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < end; i += 64) __builtin_prefetch(bytes + i);
}

// Attention of `rows` query rows (some query tokens of one request, all heads of one KV head) over
// the request's pages, one page at a time with a running maximum (online softmax).
// kHeadDim is the head size where it is known to the compiler, 0 where it is not.
template <typename T, int64_t kHeadDim>
void attend(const AttentionArgs& a, int64_t request, int64_t kv_head, int64_t first_query,
            int64_t num_queries) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t d = kHeadDim > 0 ? kHeadDim : a.head_dim;
  const int64_t rows = num_queries * group;
  const int64_t start = a.query_start[request];
  const int64_t query_len = a.query_start[request + 1] - start;
  const int64_t seq_len = a.seq_lens[request];
  // Position of the first query of this task; query i sees the keys [low(i), first_position + i].
  const int64_t first_position = seq_len - query_len + first_query;
  const int64_t last_position = first_position + num_queries - 1;
  const int64_t lowest = (a.window > 0 && first_position - a.window + 1 > 0)
                             ? first_position - a.window + 1 : 0;

  // Rows are packed head_dim apart: a fixed, power-of-two stride would thrash the sets of the L1 cache.
  alignas(64) float q[kMaxRows * kMaxHeadDim];
  alignas(64) float acc[kMaxRows * kMaxHeadDim];
  alignas(64) float page_rows[kMaxPageSize * kMaxHeadDim];  // keys of one page, then its values
  alignas(64) float scores[kMaxPageSize];
  float row_max[kMaxRows], row_sum[kMaxRows];

  for (int64_t i = 0; i < num_queries; ++i) {
    const T* src = static_cast<const T*>(a.q) + (start + first_query + i) * a.q_stride +
                   kv_head * group * d;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t r = i * group + g;
      load_row(src + g * d, q + r * d, d);
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        q[r * d + j] *= a.scale;
        acc[r * d + j] = 0.0f;
      }
      row_max[r] = -__builtin_inff();
      row_sum[r] = 0.0f;
    }
  }

  const int32_t* pages = a.page_table + request * a.page_table_stride;
  for (int64_t page = lowest / a.page_size; page <= last_position / a.page_size; ++page) {
    const int64_t base = page * a.page_size;
    const int64_t offset = (static_cast<int64_t>(pages[page]) * a.num_kv_heads + kv_head) *
                           a.page_size * d;
    if (page < last_position / a.page_size) {
      // Pages lie anywhere in memory, so no hardware prefetcher sees the next one coming.
      const int64_t next = (static_cast<int64_t>(pages[page + 1]) * a.num_kv_heads + kv_head) *
                           a.page_size * d;
      prefetch(static_cast<const T*>(a.k_cache) + next, a.page_size * d);
      prefetch(static_cast<const T*>(a.v_cache) + next, a.page_size * d);
    }
    const T* k_page = static_cast<const T*>(a.k_cache) + offset;
    const T* v_page = static_cast<const T*>(a.v_cache) + offset;
    const int64_t end = last_position + 1 - base < a.page_size ? last_position + 1 - base
                                                               : a.page_size;
    for (int64_t t = 0; t < end; ++t) load_row(k_page + t * d, page_rows + t * d, d);
    alignas(64) float weights[kMaxRows][kMaxPageSize];
    int64_t row_first[kMaxRows], row_end[kMaxRows];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = first_position + r / group;
      int64_t hi = position + 1 - base;
      if (hi > end) hi = end;
      int64_t lo = a.window > 0 ? position - a.window + 1 - base : 0;
      if (lo < 0) lo = 0;
      if (lo > hi) lo = hi;
      if (hi < 0) lo = hi = 0;
      row_first[r] = lo;
      row_end[r] = hi;
      if (lo >= hi) continue;
      float page_max = row_max[r];
      for (int64_t t = lo; t < hi; ++t) {
        scores[t] = dot(q + r * d, page_rows + t * d, d);
        if (scores[t] > page_max) page_max = scores[t];
      }
      const float shrink = row_sum[r] == 0.0f ? 0.0f : exp_nonpositive(row_max[r] - page_max);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t t = lo; t < hi; ++t) {
        weights[r][t] = exp_nonpositive(scores[t] - page_max);
        sum += weights[r][t];
      }
      row_sum[r] = row_sum[r] * shrink + sum;
      row_max[r] = page_max;
      if (shrink != 1.0f) {
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) acc[r * d + j] *= shrink;
      }
    }
    for (int64_t t = 0; t < end; ++t) load_row(v_page + t * d, page_rows + t * d, d);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = row_first[r]; t < row_end[r]; ++t) {
        const float w = weights[r][t];
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) acc[r * d + j] += w * page_rows[t * d + j];
      }
    }
  }

  for (int64_t i = 0; i < num_queries; ++i) {
    T* dst = static_cast<T*>(a.out) + (start + first_query + i) * a.out_stride +
             kv_head * group * d;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t r = i * group + g;
      const float inverse = 1.0f / row_sum[r];
      for (int64_t j = 0; j < d; ++j) store(dst + g * d + j, acc[r * d + j] * inverse);
    }
  }
}

template <typename T, int64_t kHeadDim>
void paged_attention_of(const AttentionArgs& a) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t block = group >= kMaxRows ? 1 : kMaxRows / group;  // query tokens of one task
  int64_t longest = 0;
  for (int64_t r = 0; r < a.num_requests; ++r) {
    const int64_t n = a.query_start[r + 1] - a.query_start[r];
    if (n > longest) longest = n;
  }
  const int64_t blocks = (longest + block - 1) / block;
#pragma omp parallel for collapse(3) schedule(dynamic)
  for (int64_t request = 0; request < a.num_requests; ++request) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t kv_head = 0; kv_head < a.num_kv_heads; ++kv_head) {
        const int64_t n = a.query_start[request + 1] - a.query_start[request];
        const int64_t first = b * block;
        if (first >= n) continue;
        attend<T, kHeadDim>(a, request, kv_head, first, n - first < block ? n - first : block);
      }
    }
  }
}

template <typename T>
void paged_attention(const AttentionArgs& a) {
  switch (a.head_dim) {
    case 64: return paged_attention_of<T, 64>(a);
    case 128: return paged_attention_of<T, 128>(a);
    default: return paged_attention_of<T, 0>(a);
  }
}

inline void normalize_head(float* x, const float* weight, int64_t d, float eps) {
  const float inverse = 1.0f / __builtin_sqrtf(dot(x, x, d) / static_cast<float>(d) + eps);
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) x[j] = x[j] * inverse * weight[j];
}

template <typename T>
void rotate(const float* x, const float* cos_sin, int64_t d, T* dst) {
  const int64_t half = d / 2;
  const float* cosine = cos_sin;
  const float* sine = cos_sin + half;
  for (int64_t j = 0; j < half; ++j) {
    store(dst + j, x[j] * cosine[j] - x[j + half] * sine[j]);
    store(dst + j + half, x[j + half] * cosine[j] + x[j] * sine[j]);
  }
}

template <typename T>
void rope_append(const RopeAppendArgs& a) {
  const int64_t d = a.head_dim;
  alignas(64) float q_weight[kMaxHeadDim], k_weight[kMaxHeadDim];
  if (a.q_norm) load_row(static_cast<const T*>(a.q_norm), q_weight, d);
  if (a.k_norm) load_row(static_cast<const T*>(a.k_norm), k_weight, d);
#pragma omp parallel for if (a.num_tokens * a.qkv_stride > kParallelElements)
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    alignas(64) float x[kMaxHeadDim];
    const T* row = static_cast<const T*>(a.qkv) + token * a.qkv_stride;
    const float* cos_sin = a.cos_sin + a.positions[token] * d;
    T* q_out = static_cast<T*>(a.out) + token * a.out_stride;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      load_row(row + h * d, x, d);
      if (a.q_norm) normalize_head(x, q_weight, d, a.eps);
      rotate(x, cos_sin, d, q_out + h * d);
    }
    const T* k_row = row + a.num_heads * d;
    const T* v_row = k_row + a.num_kv_heads * d;
    const int64_t page = a.slots[token] / a.page_size;
    const int64_t offset = a.slots[token] % a.page_size;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
      const int64_t at = ((page * a.num_kv_heads + h) * a.page_size + offset) * d;
      load_row(k_row + h * d, x, d);
      if (a.k_norm) normalize_head(x, k_weight, d, a.eps);
      rotate(x, cos_sin, d, static_cast<T*>(a.k_cache) + at);
      __builtin_memcpy(static_cast<T*>(a.v_cache) + at, v_row + h * d,
                       static_cast<std::size_t>(d) * sizeof(T));
    }
  }
}

template <typename T>
void rms_norm(const RmsNormArgs& a) {
#pragma omp parallel for if (a.num_rows * a.width > kParallelElements)
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    const T* weight = static_cast<const T*>(a.weight);
    T* out = static_cast<T*>(a.out) + i * a.out_stride;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < a.width; ++j) {
      const float v = to_float(x[j]);
      sum += v * v;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(a.width) + a.eps);
#pragma omp simd
    for (int64_t j = 0; j < a.width; ++j) store(out + j, to_float(x[j]) * inverse * to_float(weight[j]));
  }
}

template <typename T>
void swiglu(const SwiGluArgs& a) {
#pragma omp parallel for if (a.num_rows * a.width > kParallelElements)
  for (int64_t i = 0; i < a.num_rows; ++i) {
    const T* gate = static_cast<const T*>(a.gate_up) + i * a.gate_up_stride;
    const T* up = gate + a.width;
    T* out = static_cast<T*>(a.out) + i * a.out_stride;
#pragma omp simd
    for (int64_t j = 0; j < a.width; ++j) {
      const float g = to_float(gate[j]);
      // sigmoid through exp of a non-positive number, which cannot overflow
      const float e = exp_nonpositive(g < 0.0f ? g : -g);
      const float sigmoid = (g < 0.0f ? e : 1.0f) / (1.0f + e);
      store(out + j, g * sigmoid * to_float(up[j]));
    }
  }
}

#define NF_BY_DTYPE(kernel, Args)                                \
  void kernel##_by_dtype(DType dtype, const Args& args) {        \
    switch (dtype) {                                             \
      case DType::kFloat32: return kernel<float>(args);          \
      case DType::kBFloat16: return kernel<BFloat16>(args);      \
      case DType::kFloat16: return kernel<Float16>(args);        \
    }                                                            \
  }

NF_BY_DTYPE(paged_attention, AttentionArgs)
NF_BY_DTYPE(rope_append, RopeAppendArgs)
NF_BY_DTYPE(rms_norm, RmsNormArgs)
NF_BY_DTYPE(swiglu, SwiGluArgs)

}  // namespace

#define NF_STRING_OF(x) #x
#define NF_STRING(x) NF_STRING_OF(x)
extern const KernelTable kTable{NF_STRING(NF_ISA), paged_attention_by_dtype,
                                rope_append_by_dtype, rms_norm_by_dtype, swiglu_by_dtype};

}  // namespace NF_ISA
}  // namespace nf

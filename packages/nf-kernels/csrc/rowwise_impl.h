// Operations on one row at a time: norms, SwiGLU, rotation.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "math_impl.h"
#include "number.h"
#include "team.h"
#include "vector.h"

namespace nf {
namespace NF_ISA {
namespace {

inline void normalize_head(float* x, const float* weight, int64_t d, float eps) {
  const float inverse = 1.0f / __builtin_sqrtf(dot(x, x, d) / static_cast<float>(d) + eps);
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) x[j] = x[j] * inverse * weight[j];
}

// dst [d] = the pairs (x[j], x[j + d / 2]), each turned by its angle.
template <typename X, typename T>
inline void rotate(const X* x, const float* cos_sin, int64_t d, T* dst) {
  const int64_t half = d / 2;
  int64_t j = 0;
  for (; j + kLanes <= half; j += kLanes) {
    const Vec cosine = load<kLanes>(cos_sin + j), sine = load<kLanes>(cos_sin + half + j);
    const Vec a = load<kLanes>(x + j), b = load<kLanes>(x + half + j);
    store(dst + j, a * cosine - b * sine);
    store(dst + half + j, b * cosine + a * sine);
  }
  if (const int64_t n = half - j; n > 0) {
    const Vec cosine = load_first(cos_sin + j, n), sine = load_first(cos_sin + half + j, n);
    const Vec a = load_first(x + j, n), b = load_first(x + half + j, n);
    store_first(dst + j, n, a * cosine - b * sine);
    store_first(dst + half + j, n, b * cosine + a * sine);
  }
}

// As rotate, of a head that is normalized before where it has a weight.
template <typename T>
inline void rotate_head(const T* x, const float* weight, float eps, const float* cos_sin, int64_t d, T* dst) {
  if (!weight) return rotate(x, cos_sin, d, dst);
  alignas(64) float normalized[kMaxHeadDim];
  load_row(x, normalized, d);
  normalize_head(normalized, weight, d, eps);
  rotate(normalized, cos_sin, d, dst);
}

template <typename T>
void rope_append(const RopeAppendArgs& a, const Team& team) {
  const int64_t d = a.head_dim;
  alignas(64) float q_norm[kMaxHeadDim], k_norm[kMaxHeadDim];
  const float* q_weight = nullptr;
  const float* k_weight = nullptr;
  if (a.q_norm) load_row(static_cast<const T*>(a.q_norm), q_norm, d), q_weight = q_norm;
  if (a.k_norm) load_row(static_cast<const T*>(a.k_norm), k_norm, d), k_weight = k_norm;
  const int64_t page_elements = a.num_kv_heads * a.page_size * d;
  const auto place = [&](int64_t token) {
    return a.slots[token] / a.page_size * page_elements + a.slots[token] % a.page_size * d;
  };
  for (RowRange rows = next_rows(team, a.num_tokens, a.qkv_stride); rows.first < rows.end;
       rows = next_rows(team, a.num_tokens, a.qkv_stride)) {
    for (int64_t token = rows.first; token < rows.end; ++token) {
      const T* row = static_cast<const T*>(a.qkv) + token * a.qkv_stride;
      const float* cos_sin = a.cos_sin + a.positions[token] * d;
      T* q_out = static_cast<T*>(a.out) + token * a.out_stride;
      const T* k_row = row + a.num_heads * d;
      const T* v_row = k_row + a.num_kv_heads * d;
      T* k_out = static_cast<T*>(a.k_cache) + place(token);
      T* v_out = static_cast<T*>(a.v_cache) + place(token);
      // Slots lie anywhere in memory: those of the next token are fetched while this one's are written.
      const int64_t next = token + 1 < rows.end ? place(token + 1) - place(token) : 0;
      for (int64_t h = 0; h < a.num_kv_heads; ++h) {
        const int64_t at = h * a.page_size * d;
        prefetch_to_write(k_out + next + at, d);
        prefetch_to_write(v_out + next + at, d);
        rotate_head(k_row + h * d, k_weight, a.eps, cos_sin, d, k_out + at);
        __builtin_memcpy(v_out + at, v_row + h * d, static_cast<std::size_t>(d) * sizeof(T));
      }
      for (int64_t h = 0; h < a.num_heads; ++h) {
        prefetch(row + a.qkv_stride + h * d, d);
        rotate_head(row + h * d, q_weight, a.eps, cos_sin, d, q_out + h * d);
      }
    }
  }
}

// residual [width] += x; the sum is rounded to T before anything is made of it.
template <typename T>
inline void add_row(const T* x, int64_t width, T* residual) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(residual + j, load<kLanes>(residual + j) + load<kLanes>(x + j));
  if (const int64_t n = width - j; n > 0) store_first(residual + j, n, load_first(residual + j, n) + load_first(x + j, n));
}

// The sum of the squares of a row. What will be written at `out` is fetched beside.
template <typename T>
inline float sum_of_squares(const T* x, int64_t width, T* out) {
  constexpr int kSums = 4;  // on the way at the same time
  Vec sums[kSums] = {};
  int64_t j = 0;
  for (; j + kSums * kLanes <= width; j += kSums * kLanes) {
    prefetch_to_write(out + j, kSums * kLanes);
    for (int i = 0; i < kSums; ++i) {
      const Vec v = load<kLanes>(x + j + i * kLanes);
      sums[i] += v * v;
    }
  }
  for (; j < width; j += kLanes) {
    const Vec v = width - j < kLanes ? load_first(x + j, width - j) : load<kLanes>(x + j);
    sums[0] += v * v;
  }
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out = x times a factor times the weight. What lies at `next`, a row of x, is fetched beside.
template <typename T>
inline void scale_row(const T* x, float factor, const T* weight, const T* next, int64_t width, T* out) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    __builtin_prefetch(next + j);
    store(out + j, load<kLanes>(x + j) * factor * load<kLanes>(weight + j));
  }
  if (const int64_t n = width - j; n > 0) {
    store_first(out + j, n, load_first(x + j, n) * factor * load_first(weight + j, n));
  }
}

template <typename T>
void rms_norm(const RmsNormArgs& a, const Team& team) {
  for (RowRange rows = next_rows(team, a.num_rows, a.width); rows.first < rows.end;
       rows = next_rows(team, a.num_rows, a.width)) {
    for (int64_t i = rows.first; i < rows.end; ++i) {
      const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
      const T* next = x + a.x_stride;
      T* out = static_cast<T*>(a.out) + i * a.out_stride;
      if (a.residual) {
        T* residual = static_cast<T*>(a.residual) + i * a.residual_stride;
        add_row(x, a.width, residual);
        x = residual;
      }
      const float mean = sum_of_squares(x, a.width, out) / static_cast<float>(a.width);
      scale_row(x, 1.0f / __builtin_sqrtf(mean + a.eps), static_cast<const T*>(a.weight), next, a.width, out);
    }
  }
}

inline __attribute__((always_inline)) Vec swiglu(Vec gate, Vec up) { return gate / (1.0f + exponential(-gate)) * up; }

template <typename T>
inline void swiglu_row(const T* gate, const T* up, T* out, int64_t width) {
  constexpr int64_t kAhead = 1 << 9;  // elements
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    __builtin_prefetch(gate + j + kAhead);
    __builtin_prefetch(up + j + kAhead);
    store(out + j, swiglu(load<kLanes>(gate + j), load<kLanes>(up + j)));
  }
  if (j < width) store_first(out + j, width - j, swiglu(load_first(gate + j, width - j), load_first(up + j, width - j)));
}

template <typename T>
void swiglu(const SwiGluArgs& a, const Team& team) {
  for (RowRange rows = next_rows(team, a.num_rows, a.width); rows.first < rows.end;
       rows = next_rows(team, a.num_rows, a.width)) {
    for (int64_t i = rows.first; i < rows.end; ++i) {
      const T* gate = static_cast<const T*>(a.gate_up) + i * a.gate_up_stride;
      swiglu_row(gate, gate + a.width, static_cast<T*>(a.out) + i * a.out_stride, a.width);
    }
  }
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf

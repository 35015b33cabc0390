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

template <typename T>
void rotate(const float* x, const float* cos_sin, int64_t d, T* dst) {
  const int64_t half = d / 2;
  const float* cosine = cos_sin;
  const float* sine = cos_sin + half;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    store(dst + j, x[j] * cosine[j] - x[j + half] * sine[j]);
    store(dst + j + half, x[j + half] * cosine[j] + x[j] * sine[j]);
  }
}

template <typename T>
void rope_append(const RopeAppendArgs& a, const Team& team) {
  const int64_t d = a.head_dim;
  alignas(64) float q_weight[kMaxHeadDim], k_weight[kMaxHeadDim];
  if (a.q_norm) load_row(static_cast<const T*>(a.q_norm), q_weight, d);
  if (a.k_norm) load_row(static_cast<const T*>(a.k_norm), k_weight, d);
  for (RowRange rows = next_rows(team, a.num_tokens, a.qkv_stride); rows.first < rows.end;
       rows = next_rows(team, a.num_tokens, a.qkv_stride)) {
    for (int64_t token = rows.first; token < rows.end; ++token) {
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
        __builtin_memcpy(static_cast<T*>(a.v_cache) + at, v_row + h * d, static_cast<std::size_t>(d) * sizeof(T));
      }
    }
  }
}

template <typename T>
void rms_norm(const RmsNormArgs& a, const Team& team) {
  for (RowRange rows = next_rows(team, a.num_rows, a.width); rows.first < rows.end;
       rows = next_rows(team, a.num_rows, a.width)) {
    for (int64_t i = rows.first; i < rows.end; ++i) {
      const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
      const T* weight = static_cast<const T*>(a.weight);
      T* out = static_cast<T*>(a.out) + i * a.out_stride;
      if (a.residual) {
        T* residual = static_cast<T*>(a.residual) + i * a.residual_stride;
#pragma omp simd
        for (int64_t j = 0; j < a.width; ++j) store(residual + j, to_float(residual[j]) + to_float(x[j]));
        x = residual;
      }
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
}

inline __attribute__((always_inline)) Vec swiglu(Vec gate, Vec up) { return gate / (1.0f + exponential(-gate)) * up; }

template <typename T>
inline void swiglu_row(const T* gate, const T* up, T* out, int64_t width) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(out + j, swiglu(load<kLanes>(gate + j), load<kLanes>(up + j)));
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

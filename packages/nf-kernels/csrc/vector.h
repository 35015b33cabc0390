// Vectors of floats, as wide as the instruction set of the file that includes this, and what loads them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "number.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace nf {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <int lanes>
struct Vectors {
  typedef float Float __attribute__((vector_size(4 * lanes)));
  typedef uint32_t Bits __attribute__((vector_size(4 * lanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));
};
using Vec = Vectors<kLanes>::Float;

template <typename V>
inline __attribute__((always_inline)) V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V>
inline __attribute__((always_inline)) void store_as(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// `lanes` consecutive elements as floats.
template <int lanes>
inline __attribute__((always_inline)) typename Vectors<lanes>::Float load(const float* p) {
  return load_as<typename Vectors<lanes>::Float>(p);
}

template <int lanes>
inline __attribute__((always_inline)) typename Vectors<lanes>::Float load(const BFloat16* p) {
  using V = Vectors<lanes>;
#if defined(__AVX512F__)
  // GCC makes four instructions of the general form below.
  if constexpr (lanes == 16) {
    return reinterpret_cast<typename V::Float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16));
  }
#endif
  const auto wide = __builtin_convertvector(load_as<typename V::Halves>(p), typename V::Bits) << 16;
  return reinterpret_cast<typename V::Float>(wide);
}

template <int lanes>
inline __attribute__((always_inline)) typename Vectors<lanes>::Float load(const Float16* p) {
  using V = typename Vectors<lanes>::Float;
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return reinterpret_cast<V>(_mm512_cvtph_ps(load_as<__m256i>(p)));
#endif
#if defined(__F16C__)
  if constexpr (lanes == 8) return reinterpret_cast<V>(_mm256_cvtph_ps(load_as<__m128i>(p)));
#endif
  V v;
  for (int i = 0; i < lanes; ++i) v[i] = to_float(p[i]);
  return v;
}

// Rounds to elements of T: to nearest, ties to even.
inline __attribute__((always_inline)) void store(float* p, Vec v) { store_as(p, v); }

inline __attribute__((always_inline)) void store(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, kSubnormal) == 0, 1)) {  // of which it would make zeros
    store_as(p, _mm512_cvtneps_pbh((__m512)v));
    return;
  }
#endif
  using V = Vectors<kLanes>;
  const auto wide = reinterpret_cast<V::Bits>(v);
  const auto rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const auto bits = v == v ? rounded : (wide >> 16) | 0x40u;  // a NaN stays one
  store_as(p, __builtin_convertvector(bits, V::Halves));
}

inline __attribute__((always_inline)) void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  store_as(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) store(p + i, v[i]);
#endif
}

// The first n < kLanes elements of a vector; what is loaded beside them is zero.
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
  T elements[kLanes] = {};
  __builtin_memcpy(elements, p, static_cast<std::size_t>(n) * sizeof(T));
  return load<kLanes>(elements);
}

template <typename T>
inline void store_first(T* p, int64_t n, Vec v) {
  T elements[kLanes];
  store(elements, v);
  __builtin_memcpy(p, elements, static_cast<std::size_t>(n) * sizeof(T));
}

// Elements 0, 2, 4, ... of two vectors, and 1, 3, 5, ...
template <int lanes>
inline __attribute__((always_inline)) void separate(typename Vectors<lanes>::Float& a,
                                                    typename Vectors<lanes>::Float& b) {
  typename Vectors<lanes>::Ints even;
  for (int i = 0; i < lanes; ++i) even[i] = 2 * i;
  const auto evens = __builtin_shuffle(a, b, even);
  b = __builtin_shuffle(a, b, even + 1);
  a = evens;
}

// The reverse of it.
template <int lanes>
inline __attribute__((always_inline)) void interleave(typename Vectors<lanes>::Float& a,
                                                      typename Vectors<lanes>::Float& b) {
  typename Vectors<lanes>::Ints low;
  for (int i = 0; i < lanes; ++i) low[i] = i / 2 + i % 2 * lanes;
  const auto lows = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, low + lanes / 2);
  a = lows;
}

// 2 * lanes elements as floats, separated as above: half the work of loading them in order.
template <int lanes>
inline __attribute__((always_inline)) void load_separate(const BFloat16* p, typename Vectors<lanes>::Float& even,
                                                         typename Vectors<lanes>::Float& odd) {
  using V = Vectors<lanes>;
  const auto pairs = load_as<typename V::Bits>(p);
  even = reinterpret_cast<typename V::Float>(pairs << 16);
  odd = reinterpret_cast<typename V::Float>(pairs & 0xffff0000u);
}

inline __attribute__((always_inline)) Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline __attribute__((always_inline)) float max_lane(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

inline __attribute__((always_inline)) float sum_of_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) v[i] += v[i + n];
  }
  return v[0];
#endif
}

}  // namespace
}  // namespace nf

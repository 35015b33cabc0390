// Vectors of floats, as wide as the instruction set of the file that includes this, and what loads them.
#pragma once

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

}  // namespace
}  // namespace nf

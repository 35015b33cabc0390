// Arithmetic that several kernels share.
#pragma once

#include <cstdint>

#include "number.h"
#include "vector.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 512;

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

#if defined(__AVX512F__)

// exp(x), relative error below 3e-7, where a float's range holds it; else 0 or infinity.
inline __attribute__((always_inline)) Vec exponential(Vec x) {
  // Beyond these bounds nothing changes, and what is infinite would become a NaN; the order keeps those there are.
  x = (Vec)_mm512_min_ps(_mm512_set1_ps(104.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x));
  // exp(x) = 2^(n + f), n a multiple of 1/16. A number of this size has four bits for fractions, its last ones.
  constexpr float kSixteenths = 786432.0f;
  constexpr float kLog2E = 1.44269504088896341f, kLog2ERest = 1.92596299e-8f;
  const Vec shifted = x * kLog2E + kSixteenths;
  const Vec n = shifted - kSixteenths;
  const Vec f = (x * kLog2E - n) + x * kLog2ERest;
  const Vec p = ((f * 5.55041087e-2f + 2.40226507e-1f) * f + 6.93147181e-1f) * f + 1.0f;
  // 2^(0/16), 2^(1/16), ...
  const __m512 powers =
      _mm512_setr_ps(1.000000000f, 1.044273782f, 1.090507733f, 1.138788635f,
                     1.189207115f, 1.241857812f, 1.296839555f, 1.354255547f,
                     1.414213562f, 1.476826146f, 1.542210825f, 1.610490332f,
                     1.681792831f, 1.756252160f, 1.834008086f, 1.915206561f);
  const Vec power = (Vec)_mm512_permutexvar_ps((__m512i)shifted, powers);
  return (Vec)_mm512_scalef_ps((__m512)(p * power), (__m512)n);
}

#else

// exp(x), relative error below 2e-7; 0 below -87 and infinity above 88.
inline __attribute__((always_inline)) Vec exponential(Vec x) {
  // A number of this size has no bits for fractions, and its last ones are the exponent.
  constexpr float kInteger = 12582912.0f;
  const Vec shifted = x * 1.44269504088896341f + kInteger;
  const Vec n = shifted - kInteger;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec y = p * (r * r) + (r + 1.0f);
  const auto power = (reinterpret_cast<Vectors<kLanes>::Bits>(shifted) + 127u) << 23;
  const Vec small = x < -87.0f ? Vec{} : y * reinterpret_cast<Vec>(power);
  return x > 88.0f ? Vec{} + __builtin_inff() : small;
}

#endif

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

template <typename T>
inline void prefetch_to_write(T* p, int64_t n) {
  char* bytes = reinterpret_cast<char*>(p);
  const int64_t end = n * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < end; i += 64) __builtin_prefetch(bytes + i, 1);
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf

// Element types of activations and KV cache, and their conversion to and from float.
#pragma once

#include <cstdint>
#include <cstring>

namespace nf {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, sizeof(y));
  return y;
}

inline void store(float* p, float x) { *p = x; }
inline void store(BFloat16* p, float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof(wide));
  // Round to nearest, ties to even; a NaN keeps its quiet bit instead of rounding to infinity.
  const uint32_t rounded = wide + 0x7fffu + ((wide >> 16) & 1u);
  p->bits = static_cast<uint16_t>((x != x) ? ((wide >> 16) | 0x40u) : (rounded >> 16));
}

#if defined(__FLT16_MANT_DIG__)
#define NF_HAVE_FLOAT16 1
using Float16 = _Float16;
inline float to_float(Float16 x) { return static_cast<float>(x); }
inline void store(Float16* p, float x) { *p = static_cast<Float16>(x); }
#endif

}  // namespace nf

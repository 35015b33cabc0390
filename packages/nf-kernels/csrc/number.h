// Element types of activations and KV cache, and their conversion to and from float.
#pragma once

#include <cstdint>

namespace nf {
// Internal to each file that includes this: kernels_<isa>.cpp must get conversions compiled for its
// own instruction set, never a copy that the linker has merged with a wider machine's.
namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }
inline void store(float* p, float x) { *p = x; }

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline void store(BFloat16* p, float x) {
  const uint32_t wide = bits_of(x);
  // Round to nearest, ties to even; a NaN keeps its quiet bit instead of rounding to infinity.
  const uint32_t rounded = wide + 0x7fffu + ((wide >> 16) & 1u);
  p->bits = static_cast<uint16_t>((x != x) ? ((wide >> 16) | 0x40u) : (rounded >> 16));
}

#if defined(__FLT16_MANT_DIG__) && (defined(__F16C__) || defined(__aarch64__))

using Float16 = _Float16;  // converted by an instruction
inline float to_float(Float16 x) { return static_cast<float>(x); }
inline void store(Float16* p, float x) { *p = static_cast<Float16>(x); }

#else

struct Float16 {
  uint16_t bits;
};

inline float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  // The exponents are biased by 15 and 127; the product is exact, also from a subnormal.
  uint32_t wide = bits_of(float_of(magnitude) * 0x1p112f);
  wide |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity or NaN
  return float_of(wide | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

inline void store(Float16* p, float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const uint32_t magnitude = bits_of(x) ^ sign;
  // Round to nearest, ties to even. Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t narrow = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x47800000u) narrow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  p->bits = static_cast<uint16_t>(narrow | (sign >> 16));
}

#endif

}  // namespace
}  // namespace nf

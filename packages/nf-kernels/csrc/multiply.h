// The inner kernel of every matrix product: some rows of x times a tile of packed columns.
//
// Packed columns lie in blocks of kBlock, for each step over the inner dimension one after the other:
// float and float16 [k][kBlock]; bfloat16 [k / 2][kBlock][2], the pairs that its dot-product instruction takes.
// Each element of the result is one sum in the order of k, however many rows and blocks are computed beside it.
#pragma once

#include <cstdint>

#include "number.h"
#include "vector.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kBlock = 32;
constexpr int kBlockVectors = kBlock / kLanes;

// The most rows of one tile of one and of two blocks: as many sums as there are registers for. A product with weights
// from memory wants many rows beside each column; one of few rows wants two blocks, to have enough sums on the way.
#if defined(__AVX512F__)
constexpr int kTallRows = 12;
constexpr int kWideRows = 6;
#elif defined(__AVX2__)
constexpr int kTallRows = 3;
constexpr int kWideRows = 1;
#else
constexpr int kTallRows = 1;
constexpr int kWideRows = 1;
#endif

// Whether two elements of the inner dimension lie side by side.
template <typename T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<BFloat16> = true;

// Elements of a block with an inner dimension of k.
template <typename T>
constexpr int64_t block_size(int64_t k) { return kBlock * (kPaired<T> ? (k + 1) / 2 * 2 : k); }

// Memory that will be needed soon: `bytes` of it, at most two lines, are brought into the cache with every step.
struct Upcoming {
  const void* memory = nullptr;
  int64_t bytes = 0;

  inline __attribute__((always_inline)) void fetch(int64_t step) {
    if (!memory) return;
    const char* at = static_cast<const char*>(memory) + step * bytes;
    __builtin_prefetch(at, 0, 3);
    __builtin_prefetch(at + bytes / 2, 0, 3);
  }
};

// Adds the products of one element of the inner dimension. The columns are loaded first and each element of x once, so
// that no more registers are needed than for the sums, a step's columns and one element.
template <typename T, int rows, int blocks>
inline __attribute__((always_inline)) void multiply_step(const T* x, int64_t x_stride, const T* columns,
                                                         int64_t block_stride,
                                                         Vec (&sums)[rows][blocks * kBlockVectors]) {
  Vec column[blocks * kBlockVectors];
#pragma GCC unroll 16
  for (int v = 0; v < blocks * kBlockVectors; ++v) {
    column[v] = load<kLanes>(columns + v / kBlockVectors * block_stride + v % kBlockVectors * kLanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const float element = to_float(x[r * x_stride]);
#pragma GCC unroll 16
    for (int v = 0; v < blocks * kBlockVectors; ++v) sums[r][v] += element * column[v];
  }
}

// Adds the products of two elements of the inner dimension, or of the last one where `has_second` is false.
template <bool has_second, int rows, int blocks>
inline __attribute__((always_inline)) void multiply_pair(const BFloat16* x, int64_t x_stride, const BFloat16* columns,
                                                         int64_t block_stride,
                                                         Vec (&sums)[rows][blocks * kBlockVectors]) {
  using Bits = Vectors<kLanes>::Bits;
  Bits column[blocks * kBlockVectors];
#pragma GCC unroll 16
  for (int v = 0; v < blocks * kBlockVectors; ++v) {
    column[v] = load_as<Bits>(columns + v / kBlockVectors * block_stride + v % kBlockVectors * 2 * kLanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    const uint32_t pair = has_second ? load_as<uint32_t>(x + r * x_stride) : x[r * x_stride].bits;
#pragma GCC unroll 16
    for (int v = 0; v < blocks * kBlockVectors; ++v) {
#if defined(__AVX512BF16__)
      sums[r][v] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)),
                                         (__m512bh)column[v]);
#else
      sums[r][v] += float_of(pair << 16) * (Vec)(column[v] << 16);
      sums[r][v] += float_of(pair & 0xffff0000u) * (Vec)(column[v] & 0xffff0000u);
#endif
    }
  }
}

// result [rows, blocks * kBlock] = x [rows, k] times packed columns. `next` fetches what will be needed, step by step.
template <int rows, int blocks, typename T, typename Next>
inline void multiply_tile(const T* x, int64_t x_stride, const T* columns, int64_t block_stride, int64_t k, Next& next,
                          float* result, int64_t result_stride) {
  Vec sums[rows][blocks * kBlockVectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < blocks * kBlockVectors; ++v) sums[r][v] = Vec{};
  }
  if constexpr (kPaired<T>) {
    for (int64_t step = 0; step < k / 2; ++step) {
      multiply_pair<true, rows, blocks>(x + 2 * step, x_stride, columns + 2 * step * kBlock, block_stride, sums);
      next.fetch(step);
    }
    if (k % 2) multiply_pair<false, rows, blocks>(x + k - 1, x_stride, columns + (k - 1) * kBlock, block_stride, sums);
  } else {
    for (int64_t step = 0; step < k; ++step) {
      multiply_step<T, rows, blocks>(x + step, x_stride, columns + step * kBlock, block_stride, sums);
      next.fetch(step);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < blocks * kBlockVectors; ++v) {
      store_as(result + r * result_stride + v * kLanes, sums[r][v]);
    }
  }
}

// As multiply_tile, for a number of rows up to `rows`.
template <int rows, int blocks, typename T, typename Next>
inline void multiply(const T* x, int64_t x_stride, int64_t num_rows, const T* columns, int64_t k, Next& next,
                     float* result, int64_t result_stride) {
  if (num_rows == rows) {
    multiply_tile<rows, blocks>(x, x_stride, columns, block_size<T>(k), k, next, result, result_stride);
  } else if constexpr (rows > 1) {
    multiply<rows - 1, blocks>(x, x_stride, num_rows, columns, k, next, result, result_stride);
  }
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf

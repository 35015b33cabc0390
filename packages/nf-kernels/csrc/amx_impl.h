// Matrix products of bfloat16 on the tile registers of AMX. A tile has 16 rows of 64 bytes; one instruction multiplies
// [16, 32] by [32, 16] and adds to [16, 16] floats. Each element is one sum in the order of k here, too.
//
// The instructions are written as assembly: GCC 12 drops stores to the configuration before its intrinsic reads it.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "multiply.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kTileSide = 16;            // rows of a tile, and columns of floats
constexpr int64_t kTileDepth = 32;           // elements of the inner dimension
constexpr int64_t kTileBytes = 64;           // of a row
constexpr int64_t kAmxRows = 2 * kTileSide;  // rows that are multiplied at a time

// Tiles 0 to 3 hold the sums, by rows and columns; 4 and 5 rows of x, 6 and 7 packed columns.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // For products of `upper` rows, and `lower` more.
  TileConfiguration(int64_t upper, int64_t lower) {
    for (int tile = 0; tile < 8; ++tile) {
      const bool columns = tile >= 6;
      const bool second = tile == 2 || tile == 3 || tile == 5;
      row_bytes[tile] = kTileBytes;
      // A tile of no rows is not a configuration; nobody uses this one then.
      rows[tile] = static_cast<uint8_t>(columns ? kTileSide : second ? (lower > 0 ? lower : 1) : upper);
    }
  }
};

#if defined(NF_AMX_EMULATED)

// What the instructions do, for processors that lack them: tests of the code around them.
struct EmulatedTiles {
  TileConfiguration configuration{1, 0};
  alignas(64) unsigned char data[8][kTileSide][kTileBytes];
};
inline EmulatedTiles& emulated() {
  thread_local EmulatedTiles tiles;
  return tiles;
}
inline void configure_tiles(const TileConfiguration& configuration) { emulated().configuration = configuration; }
inline void release_tiles() {}
template <int tile>
inline void zero_tile() { __builtin_memset(emulated().data[tile], 0, sizeof(emulated().data[tile])); }
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  for (int r = 0; r < emulated().configuration.rows[tile]; ++r) {
    __builtin_memcpy(emulated().data[tile][r], static_cast<const char*>(from) + r * stride, kTileBytes);
  }
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
  for (int r = 0; r < emulated().configuration.rows[tile]; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * stride, emulated().data[tile][r], kTileBytes);
  }
}
template <int sums, int x, int columns>
inline void multiply_tiles() {
  EmulatedTiles& t = emulated();
  for (int r = 0; r < t.configuration.rows[sums]; ++r) {
    for (int k = 0; k < t.configuration.rows[columns]; ++k) {
      for (int c = 0; c < kTileSide; ++c) {
        for (int half = 0; half < 2; ++half) {
          const auto* a = reinterpret_cast<const BFloat16*>(t.data[x][r]) + 2 * k + half;
          const auto* b = reinterpret_cast<const BFloat16*>(t.data[columns][k]) + 2 * c + half;
          reinterpret_cast<float*>(t.data[sums][r])[c] += to_float(*a) * to_float(*b);
        }
      }
    }
  }
}

#else

inline void configure_tiles(const TileConfiguration& configuration) {
  asm volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }
template <int tile>
inline void zero_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(tile)); }
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sums, int x, int columns>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(x), "i"(columns));
}

#endif

// One step of kTileDepth over the inner dimension.
inline __attribute__((always_inline)) void multiply_step_amx(const BFloat16* x, int64_t x_stride_bytes,
                                                             const BFloat16* columns, int64_t columns_stride_bytes,
                                                             bool has_lower) {
  load_tile<6>(columns, columns_stride_bytes);
  load_tile<7>(columns + 2 * kTileSide, columns_stride_bytes);
  load_tile<4>(x, x_stride_bytes);
  multiply_tiles<0, 4, 6>();
  multiply_tiles<1, 4, 7>();
  if (has_lower) {
    load_tile<5>(reinterpret_cast<const char*>(x) + kTileSide * x_stride_bytes, x_stride_bytes);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
}

// result [num_rows, kBlock] = x [num_rows, k] times one block of packed columns, for up to kAmxRows rows. The tiles are
// configured for num_rows.
inline void multiply_block_amx(const BFloat16* x, int64_t x_stride, int64_t num_rows, const BFloat16* columns,
                               int64_t k, float* result, int64_t result_stride) {
  constexpr int64_t kPairBytes = kBlock * 2 * static_cast<int64_t>(sizeof(BFloat16));
  const bool has_lower = num_rows > kTileSide;
  zero_tile<0>();
  zero_tile<1>();
  if (has_lower) {
    zero_tile<2>();
    zero_tile<3>();
  }
  int64_t at = 0;
  for (; at + kTileDepth <= k; at += kTileDepth) {
    multiply_step_amx(x + at, x_stride * 2, columns + at * kBlock, kPairBytes, has_lower);
  }
  if (at < k) {
    // What is left is filled up with zeros, on both sides: what lies behind it may be anything.
    alignas(64) BFloat16 x_rest[kAmxRows * kTileDepth] = {};
    alignas(64) BFloat16 columns_rest[kTileDepth * kBlock] = {};
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t j = at; j < k; ++j) x_rest[r * kTileDepth + j - at] = x[r * x_stride + j];
    }
    const int64_t pairs = (k - at + 1) / 2;
    __builtin_memcpy(columns_rest, columns + at * kBlock, static_cast<std::size_t>(pairs * kPairBytes));
    multiply_step_amx(x_rest, kTileDepth * 2, columns_rest, kPairBytes, has_lower);
  }
  store_tile<0>(result, result_stride * 4);
  store_tile<1>(result + kTileSide, result_stride * 4);
  if (has_lower) {
    store_tile<2>(result + kTileSide * result_stride, result_stride * 4);
    store_tile<3>(result + kTileSide * result_stride + kTileSide, result_stride * 4);
  }
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf

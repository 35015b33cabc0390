// Matrix products with packed weights.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "multiply.h"
#include "team.h"
#if defined(NF_AMX)
#include "amx_impl.h"
#endif

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kRowChunk = 192;  // rows of one task; the tile's columns stay in the cache meanwhile

// out [rows, columns] = result + bias + residual, for one tile.
template <typename T, typename Out>
inline void finish_tile_as(const LinearArgs& a, const float* result, int64_t result_stride, int64_t row, int64_t num_rows,
                        int64_t column, int64_t num_columns) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* sums = result + r * result_stride;
    Out* out = static_cast<Out*>(a.out) + (row + r) * a.out_stride + column;
    alignas(64) float values[kBlock];
    for (int64_t j = 0; j < num_columns; ++j) values[j] = sums[j];
    if (a.bias) {
      const T* bias = static_cast<const T*>(a.bias) + column;
#pragma omp simd
      for (int64_t j = 0; j < num_columns; ++j) values[j] += to_float(bias[j]);
    }
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + (row + r) * a.residual_stride + column;
#pragma omp simd
      for (int64_t j = 0; j < num_columns; ++j) values[j] += to_float(residual[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < num_columns; ++j) store(out + j, values[j]);
  }
}

template <typename T>
inline void finish_tile(const LinearArgs& a, const float* result, int64_t result_stride, int64_t row, int64_t num_rows,
                        int64_t column, int64_t num_columns) {
  if (a.float_out) {
    finish_tile_as<T, float>(a, result, result_stride, row, num_rows, column, num_columns);
  } else {
    finish_tile_as<T, T>(a, result, result_stride, row, num_rows, column, num_columns);
  }
}

// One task: a block's columns of some rows. `next` is the weight of the block that this thread will see next, or null.
template <typename T>
inline void multiply_chunk(const LinearArgs& a, int64_t first, int64_t end, int64_t block, const T* next) {
  const int64_t column = block * kBlock;
  const int64_t columns = a.out_features - column < kBlock ? a.out_features - column : kBlock;
  const int64_t size = block_size<T>(a.in_features);
  const T* weight = static_cast<const T*>(a.weight) + block * size;
  // Tiles of about the same height. While the first one's columns come from memory, the processor computes what it can;
  // the others find them in the cache, and the memory would idle: the last two fetch the next block, half of it each. A
  // tile that is alone fetches ahead of itself.
  constexpr int64_t kAhead = 1 << 12;  // elements
  constexpr int64_t kStepBytes = kBlock * (kPaired<T> ? 2 : 1) * static_cast<int64_t>(sizeof(T));
  const int64_t half_block = size / 2;
  const int64_t tiles = (end - first + kTallRows - 1) / kTallRows;
  alignas(64) float result[kTallRows * kBlock];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = first + (end - first) * tile / tiles;
    const int64_t rows = first + (end - first) * (tile + 1) / tiles - row;
    Upcoming upcoming;
    if (tiles == 1) {
      upcoming = {weight + kAhead, kStepBytes};
    } else if (next && tile >= tiles - 2) {
      upcoming = {tile == tiles - 1 ? next + half_block : next, kStepBytes / 2};
    }
    multiply<kTallRows, 1>(static_cast<const T*>(a.x) + row * a.x_stride, a.x_stride, rows, weight, a.in_features,
                           upcoming, result, kBlock);
    finish_tile<T>(a, result, kBlock, row, rows, column, columns);
  }
}

#if defined(NF_AMX)
// As above, on tiles. They are configured for the rows of every tile but the last, which may have fewer.
inline void multiply_chunk_amx(const LinearArgs& a, int64_t first, int64_t end, int64_t block) {
  const int64_t column = block * kBlock;
  const int64_t columns = a.out_features - column < kBlock ? a.out_features - column : kBlock;
  const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + block * block_size<BFloat16>(a.in_features);
  alignas(64) float result[kAmxRows * kBlock];
  int64_t configured = 0;
  for (int64_t row = first; row < end; row += kAmxRows) {
    const int64_t rows = end - row < kAmxRows ? end - row : kAmxRows;
    if (rows != configured) {
      configure_tiles({rows < kTileSide ? rows : kTileSide, rows - kTileSide});
      configured = rows;
    }
    multiply_block_amx(static_cast<const BFloat16*>(a.x) + row * a.x_stride, a.x_stride, rows, weight, a.in_features,
                       result, kBlock);
    finish_tile<BFloat16>(a, result, kBlock, row, rows, column, columns);
  }
}
#endif

template <typename T>
void grouped_linear(const GroupedLinearArgs& a, const Team& team) {
  const int64_t blocks = (a.linear.out_features + kBlock - 1) / kBlock;
  int64_t first_task = 0;  // of the group
  int64_t task = next_task(team);
  for (int64_t group = 0; group < a.num_groups; ++group) {
    const int64_t start = a.row_start[group], stop = a.row_start[group + 1];
    const int64_t end_task = first_task + (stop - start + kRowChunk - 1) / kRowChunk * blocks;
    LinearArgs linear = a.linear;
    linear.weight = static_cast<const T*>(a.linear.weight) + group * a.weight_stride;
    for (; task < end_task; task = next_task(team)) {
      const int64_t first = start + (task - first_task) / blocks * kRowChunk;
      const int64_t end = first + kRowChunk < stop ? first + kRowChunk : stop;
      const int64_t block = (task - first_task) % blocks;
#if defined(NF_AMX)
      if constexpr (kPaired<T>) {
        multiply_chunk_amx(linear, first, end, block);
        continue;
      }
#endif
      const int64_t next = block + team.size;  // as the threads take turns
      multiply_chunk<T>(linear, first, end, block,
                        next < blocks ? static_cast<const T*>(linear.weight) + next * block_size<T>(linear.in_features)
                                      : nullptr);
    }
    first_task = end_task;
  }
#if defined(NF_AMX)
  if constexpr (kPaired<T>) release_tiles();
#endif
}

template <typename T>
void linear(const LinearArgs& a, const Team& team) {
  const int64_t row_start[2] = {0, a.num_rows};
  grouped_linear<T>({a, row_start, 1, 0}, team);
}

// Rows of a table that is packed as the weight of a matrix product: a model's embedding that is its head, too.
template <typename T>
void gather_packed_rows(const GatherArgs& a, const Team& team) {
  for (RowRange rows = next_rows(team, a.num_rows, a.width); rows.first < rows.end;
       rows = next_rows(team, a.num_rows, a.width)) {
    for (int64_t i = rows.first; i < rows.end; ++i) {
      const int64_t id = a.index[i];
      const T* block = static_cast<const T*>(a.table) + id / kBlock * block_size<T>(a.width);
      T* out = static_cast<T*>(a.out) + i * a.out_stride;
      constexpr int64_t kGroup = kPaired<T> ? 2 : 1;
      for (int64_t j = 0; j < a.width; ++j) {
        out[j] = block[(j / kGroup * kBlock + id % kBlock) * kGroup + j % kGroup];
      }
    }
  }
}

template <typename T>
void gather_rows(const GatherArgs& a, const Team& team) {
  for (RowRange rows = next_rows(team, a.num_rows, a.width); rows.first < rows.end;
       rows = next_rows(team, a.num_rows, a.width)) {
    for (int64_t i = rows.first; i < rows.end; ++i) {
      __builtin_memcpy(static_cast<T*>(a.out) + i * a.out_stride,
                       static_cast<const T*>(a.table) + a.index[i] * a.table_stride,
                       static_cast<std::size_t>(a.width) * sizeof(T));
    }
  }
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf

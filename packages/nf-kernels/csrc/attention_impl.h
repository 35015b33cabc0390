// Attention over paged keys and values, with a running maximum (online softmax).
#pragma once

#include <cstddef>

#include "kernels.h"
#include "math_impl.h"
#include "multiply.h"
#include "team.h"
#include "vector.h"

namespace nf {
namespace NF_ISA {
namespace {

constexpr int64_t kMaxRows = 32;           // query rows of one task
constexpr int64_t kTileKeys = 2 * kBlock;  // keys that are scored together; tiles begin at multiples of it
constexpr int64_t kGroupKeys = 16;         // keys of a tile that lie one after the other
constexpr int64_t kGroups = kTileKeys / kGroupKeys;

// Where the keys and values of a tile are, by groups.
template <typename T>
struct TileRows {
  const T* k[kGroups];
  const T* v[kGroups];
};

// The pages of one request and KV head.
template <typename T>
struct PagedRows {
  const T* k;
  const T* v;
  const int32_t* pages;
  int64_t page_size, d, page_stride;

  PagedRows(const AttentionArgs& a, int64_t request, int64_t kv_head)
      : pages(a.page_table + request * a.page_table_stride), page_size(a.page_size), d(a.head_dim),
        page_stride(a.num_kv_heads * a.page_size * a.head_dim) {
    k = static_cast<const T*>(a.k_cache) + kv_head * page_size * d;
    v = static_cast<const T*>(a.v_cache) + kv_head * page_size * d;
  }

  // Finds the keys base + [first, end). The others of the tile are scored, too, and then ignored: for them any memory
  // will do that can be read. Pages of another size than whole groups are copied to `spare`, [2, kTileKeys, d].
  inline void find(int64_t base, int64_t first, int64_t end, T* spare, TileRows<T>& rows) const {
    if (end > kTileKeys) end = kTileKeys;
    if (page_size % kGroupKeys == 0) {
      const int64_t first_group = first / kGroupKeys, end_group = (end + kGroupKeys - 1) / kGroupKeys;
      int64_t page = base / page_size, slot = base % page_size;
      for (int64_t group = 0; group < kGroups; ++group) {
        if (group >= first_group && group < end_group) {
          const int64_t offset = pages[page] * page_stride + slot * d;
          rows.k[group] = k + offset;
          rows.v[group] = v + offset;
        }
        slot += kGroupKeys;
        if (slot == page_size) {
          slot = 0;
          ++page;
        }
      }
      for (int64_t group = 0; group < kGroups; ++group) {
        if (group >= first_group && group < end_group) continue;
        rows.k[group] = rows.k[first_group];
        rows.v[group] = rows.v[first_group];
      }
      return;
    }
    for (int64_t key = first; key < end; ++key) {
      const int64_t position = base + key;
      const int64_t offset = pages[position / page_size] * page_stride + position % page_size * d;
      __builtin_memcpy(spare + key * d, k + offset, static_cast<std::size_t>(d) * sizeof(T));
      __builtin_memcpy(spare + (kTileKeys + key) * d, v + offset, static_cast<std::size_t>(d) * sizeof(T));
    }
    for (int64_t group = 0; group < kGroups; ++group) {
      rows.k[group] = spare + group * kGroupKeys * d;
      rows.v[group] = spare + (kTileKeys + group * kGroupKeys) * d;
    }
  }
};

// The keys and values of the next tile, which are brought into the cache group by group while this one is computed.
// Pages lie anywhere in memory, so no hardware prefetcher sees them coming.
template <typename T>
struct UpcomingTile {
  const T* groups[2 * kGroups];
  int64_t left = 0;

  UpcomingTile(const TileRows<T>& rows, bool exists) {
    if (!exists) return;
    for (int64_t group = 0; group < kGroups; ++group) {
      groups[left++] = rows.v[group];
      groups[left++] = rows.k[group];
    }
  }

  inline __attribute__((always_inline)) void fetch_group(int64_t d) {
    if (left > 0) prefetch(groups[--left], kGroupKeys * d);
  }
};

// As below, for the last words of a row. Inlined, GCC 12 warns of overflow where it finds that there are none.
inline __attribute__((noinline)) void transpose_last_words(const uint32_t* rows, int64_t units, int64_t count,
                                                           uint32_t* to) {
  for (int64_t unit = units - count; unit < units; ++unit) {
    for (int i = 0; i < kGroupKeys; ++i) to[unit * kBlock + i] = rows[i * units + unit];
  }
}

// to [units][kBlock] = transpose of kGroupKeys rows of `units` 32-bit words.
inline __attribute__((always_inline)) void transpose_words(const uint32_t* rows, int64_t units, uint32_t* to) {
  int64_t rest = units;
#if defined(__AVX512F__)
  for (int64_t unit = 0; rest >= 16; unit += 16, rest -= 16) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * units + unit);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 16; half += 8) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        b[half + i] = _mm512_shuffle_i32x4(a[half + i], a[half + i + 4], 0x88);
        b[half + i + 4] = _mm512_shuffle_i32x4(a[half + i], a[half + i + 4], 0xdd);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      _mm512_storeu_si512(to + (unit + i) * kBlock, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
      _mm512_storeu_si512(to + (unit + i + 8) * kBlock, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
  }
#endif
  if (rest > 0) transpose_last_words(rows, units, rest, to);
}

// Packs the keys of a tile as columns of a matrix product.
template <typename T>
inline __attribute__((always_inline)) void pack_keys(const TileRows<T>& rows, int64_t d, UpcomingTile<T>& upcoming,
                                                     T* to) {
  for (int64_t group = 0; group < kGroups; ++group) {
    upcoming.fetch_group(d);
    const int64_t key = group * kGroupKeys;
    T* block = to + key / kBlock * block_size<T>(d);
    if constexpr (kPaired<T> || sizeof(T) == sizeof(uint32_t)) {
      constexpr int64_t kUnit = static_cast<int64_t>(sizeof(uint32_t) / sizeof(T));
      transpose_words(reinterpret_cast<const uint32_t*>(rows.k[group]), d / kUnit,
                      reinterpret_cast<uint32_t*>(block + key % kBlock * kUnit));
    } else {
      for (int64_t j = 0; j < d; ++j) {
        for (int64_t i = 0; i < kGroupKeys; ++i) block[j * kBlock + key % kBlock + i] = rows.k[group][i * d + j];
      }
    }
  }
}

// mixed [rows, d] += weights [rows, kTileKeys] times the values of keys first to end, for some vectors of columns.
template <int rows, int vectors, int lanes, typename T>
inline __attribute__((always_inline)) void mix_tile(const float* weights, const TileRows<T>& tile, int64_t column,
                                                    int64_t first, int64_t end, float* mixed, int64_t d) {
  using V = typename Vectors<lanes>::Float;
  V sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sums[r][v] = load<lanes>(mixed + r * d + column + v * lanes);
  }
  for (int64_t group = first / kGroupKeys; group * kGroupKeys < end; ++group) {
    const int64_t start = group * kGroupKeys;
    const int64_t stop = end < start + kGroupKeys ? end : start + kGroupKeys;
    const T* values = tile.v[group] + column;
    for (int64_t key = first > start ? first : start; key < stop; ++key) {
      V value[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) value[v] = load<lanes>(values + (key - start) * d + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const float weight = weights[r * kTileKeys + key];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sums[r][v] += weight * value[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store_as(mixed + r * d + column + v * lanes, sums[r][v]);
  }
}

template <int vectors, int lanes, int rows = kWideRows, typename T>
inline void mix_rows(const float* weights, int64_t num_rows, const TileRows<T>& tile, int64_t column, int64_t first,
                     int64_t end, float* mixed, int64_t d) {
  if (num_rows == rows) {
    mix_tile<rows, vectors, lanes>(weights, tile, column, first, end, mixed, d);
  } else if constexpr (rows > 1) {
    mix_rows<vectors, lanes, rows - 1>(weights, num_rows, tile, column, first, end, mixed, d);
  }
}

// mixed [num_rows, d] += weights [num_rows, kTileKeys] times the values of keys first to end.
template <typename T>
inline __attribute__((always_inline)) void mix(const float* weights, int64_t num_rows, const TileRows<T>& tile, int64_t first, int64_t end, float* mixed,
         int64_t d) {
  for (int64_t r = 0; r < num_rows; r += kWideRows) {
    const int64_t count = num_rows - r < kWideRows ? num_rows - r : kWideRows;
    const float* w = weights + r * kTileKeys;
    float* to = mixed + r * d;
    int64_t column = 0;
    for (; column + 4 * kLanes <= d; column += 4 * kLanes) {
      mix_rows<4, kLanes>(w, count, tile, column, first, end, to, d);
    }
    for (; column + kLanes <= d; column += kLanes) mix_rows<1, kLanes>(w, count, tile, column, first, end, to, d);
    for (; column + 4 <= d; column += 4) mix_rows<1, 4>(w, count, tile, column, first, end, to, d);
    for (; column < d; ++column) {
      for (int64_t i = 0; i < count; ++i) {
        float sum = to[i * d + column];
        for (int64_t key = first; key < end; ++key) {
          sum += w[i * kTileKeys + key] * to_float(tile.v[key / kGroupKeys][key % kGroupKeys * d + column]);
        }
        to[i * d + column] = sum;
      }
    }
  }
}

// Some query rows of one request, all heads of one KV head, and what their softmax has come to.
struct AttentionRows {
  int64_t rows;
  int64_t first_position, last_position;  // of the queries
  alignas(64) float mixed[kMaxRows * kMaxHeadDim];
  float maximum[kMaxRows], sum[kMaxRows];
};

// Scales a row of scores, caps them, and hides those outside [first, end).
inline void finish_scores(const AttentionArgs& a, int64_t first, int64_t end, float* row) {
  if (a.soft_cap > 0.0f) {
    for (int t = 0; t < kTileKeys; ++t) {
      const float score = row[t] * a.scale;
      // tanh through exp of a non-positive number, which cannot overflow
      const float e = exp_nonpositive(-2.0f * __builtin_fabsf(score / a.soft_cap));
      row[t] = __builtin_copysignf(a.soft_cap * (1.0f - e) / (1.0f + e), score);
    }
  } else {
    for (int t = 0; t < kTileKeys; ++t) row[t] *= a.scale;
  }
  if (first <= 0 && end >= kTileKeys) return;
  const int low = first > 0 ? static_cast<int>(first) : 0;
  const int high = end < kTileKeys ? static_cast<int>(end) : static_cast<int>(kTileKeys);
  for (int t = 0; t < kTileKeys; ++t) row[t] = t >= low && t < high ? row[t] : -__builtin_inff();
}

// Turns a tile's scores into weights and shrinks what was mixed before, row by row.
template <typename T>
inline __attribute__((always_inline)) void soften(const AttentionArgs& a, AttentionRows& state, int64_t d, int64_t base,
                                                  UpcomingTile<T>& upcoming, float* scores) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  for (int64_t r = 0; r < state.rows; ++r) {
    upcoming.fetch_group(d);
    float* row = scores + r * kTileKeys;
    const int64_t position = state.first_position + r / group;
    finish_scores(a, a.window > 0 ? position - a.window + 1 - base : 0, position + 1 - base, row);
    float maximum = state.maximum[r];
#pragma omp simd reduction(max : maximum)
    for (int t = 0; t < kTileKeys; ++t) maximum = row[t] > maximum ? row[t] : maximum;
    if (maximum == -__builtin_inff()) {  // nothing seen yet: a window that begins later
      for (int t = 0; t < kTileKeys; ++t) row[t] = 0.0f;
      continue;
    }
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int t = 0; t < kTileKeys; ++t) {
      row[t] = exp_nonpositive(row[t] - maximum);
      sum += row[t];
    }
    const float shrink = exp_nonpositive(state.maximum[r] - maximum);
    state.sum[r] = state.sum[r] * shrink + sum;
    state.maximum[r] = maximum;
    if (shrink != 1.0f) {
      float* mixed = state.mixed + r * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) mixed[j] *= shrink;
    }
  }
}

// kHeadDim is the head size where the compiler knows it, 0 where it does not.
template <typename T, int64_t kHeadDim>
void attend(const AttentionArgs& a, int64_t request, int64_t kv_head, int64_t first_query, int64_t num_queries) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t d = kHeadDim > 0 ? kHeadDim : a.head_dim;
  const int64_t start = a.first_row(request);
  const int64_t query_len = a.first_row(request + 1) - start;
  AttentionRows state;
  state.rows = num_queries * group;
  state.first_position = a.seq_lens[request] - query_len + first_query;
  state.last_position = state.first_position + num_queries - 1;

  // Rows lie head_dim apart: a fixed, power-of-two stride would thrash the sets of the L1 cache.
  alignas(64) T queries[kMaxRows * kMaxHeadDim];
  alignas(64) T keys[kTileKeys * kMaxHeadDim];
  alignas(64) float scores[kMaxRows * kTileKeys];
  for (int64_t i = 0; i < num_queries; ++i) {
    const T* q = static_cast<const T*>(a.q) + (start + first_query + i) * a.q_stride + kv_head * group * d;
    __builtin_memcpy(queries + i * group * d, q, static_cast<std::size_t>(group * d) * sizeof(T));
  }
  for (int64_t j = 0; j < state.rows * d; ++j) state.mixed[j] = 0.0f;
  for (int64_t r = 0; r < state.rows; ++r) {
    state.maximum[r] = -__builtin_inff();
    state.sum[r] = 0.0f;
  }

  const PagedRows<T> paged(a, request, kv_head);
  const int64_t lowest =
      a.window > 0 && state.first_position >= a.window ? state.first_position - a.window + 1 : 0;
  const int64_t beyond = state.last_position + 1;
  // Two of each: this tile's, and the next one's.
  alignas(64) T spare[2][2 * kTileKeys * kMaxHeadDim];
  TileRows<T> tiles[2];
  int64_t base = lowest / kTileKeys * kTileKeys;
  paged.find(base, lowest - base, beyond - base, spare[0], tiles[0]);
  for (int turn = 0; base < beyond; base += kTileKeys, turn ^= 1) {
    const int64_t first = lowest > base ? lowest - base : 0;
    const int64_t end = beyond - base < kTileKeys ? beyond - base : kTileKeys;
    const bool last = base + kTileKeys >= beyond;
    if (!last) paged.find(base + kTileKeys, 0, beyond - base - kTileKeys, spare[turn ^ 1], tiles[turn ^ 1]);
    UpcomingTile<T> upcoming(tiles[turn ^ 1], !last);
    pack_keys(tiles[turn], d, upcoming, keys);
    for (int64_t r = 0; r < state.rows; r += kWideRows) {
      const int64_t count = state.rows - r < kWideRows ? state.rows - r : kWideRows;
      multiply<kWideRows, 2>(queries + r * d, d, count, keys, d, {}, scores + r * kTileKeys, kTileKeys);
    }
    soften(a, state, d, base, upcoming, scores);
    while (upcoming.left > 0) upcoming.fetch_group(d);
    mix(scores, state.rows, tiles[turn], first, end, state.mixed, d);
  }

  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t token = start + first_query + i;
    T* out = static_cast<T*>(a.out) + token * a.out_stride + kv_head * group * d;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t r = i * group + g;
      const float inverse = 1.0f / state.sum[r];
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) store(out + g * d + j, state.mixed[r * d + j] * inverse);
      if (a.lse) {
        a.lse[token * a.num_heads + kv_head * group + g] = state.maximum[r] + __builtin_logf(state.sum[r]);
      }
    }
  }
}

template <typename T, int64_t kHeadDim>
void paged_attention_of(const AttentionArgs& a, const Team& team) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t block = group >= kMaxRows ? 1 : kMaxRows / group;  // query tokens of one task
  int64_t first_task = 0;  // of the request
  int64_t task = next_task(team);
  for (int64_t request = 0; request < a.num_requests; ++request) {
    const int64_t n = a.first_row(request + 1) - a.first_row(request);
    const int64_t end_task = first_task + (n + block - 1) / block * a.num_kv_heads;
    for (; task < end_task; task = next_task(team)) {
      const int64_t first = (task - first_task) / a.num_kv_heads * block;
      attend<T, kHeadDim>(a, request, (task - first_task) % a.num_kv_heads, first, n - first < block ? n - first : block);
    }
    first_task = end_task;
  }
}

template <typename T>
void paged_attention(const AttentionArgs& a, const Team& team) {
  switch (a.head_dim) {
#if defined(__AVX2__)
    case 64: return paged_attention_of<T, 64>(a, team);
    case 80: return paged_attention_of<T, 80>(a, team);
    case 96: return paged_attention_of<T, 96>(a, team);
    case 128: return paged_attention_of<T, 128>(a, team);
    case 256: return paged_attention_of<T, 256>(a, team);
#endif
    default: return paged_attention_of<T, 0>(a, team);
  }
}

// out = the attention over the keys of both states; each state is a mean and the logarithm of its weight.
template <typename T>
void merge_attention(const MergeArgs& a, const Team& team) {
  const int64_t count = a.num_tokens * a.num_heads, d = a.head_dim;
  for (RowRange rows = next_rows(team, count, d); rows.first < rows.end;
       rows = next_rows(team, count, d)) {
    for (int64_t i = rows.first; i < rows.end; ++i) {
      const int64_t token = i / a.num_heads, head = i % a.num_heads;
      const float x = a.lse_a[i], y = a.lse_b[i];
      const float maximum = x > y ? x : y;
      const bool empty = maximum == -__builtin_inff();  // neither state has seen a key
      const float wx = empty ? 0.0f : exp_nonpositive(x - maximum);
      const float wy = empty ? 0.0f : exp_nonpositive(y - maximum);
      const float inverse = 1.0f / (wx + wy);
      const T* from_x = static_cast<const T*>(a.a) + token * a.a_stride + head * d;
      const T* from_y = static_cast<const T*>(a.b) + token * a.b_stride + head * d;
      T* out = static_cast<T*>(a.out) + token * a.out_stride + head * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        // A state without keys may hold anything, NaN too, which a zero weight would not silence.
        const float value_x = wx > 0.0f ? to_float(from_x[j]) * wx : 0.0f;
        const float value_y = wy > 0.0f ? to_float(from_y[j]) * wy : 0.0f;
        store(out + j, empty ? 0.0f : (value_x + value_y) * inverse);
      }
      a.lse_out[i] = empty ? maximum : maximum + __builtin_logf(wx + wy);
    }
  }
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf

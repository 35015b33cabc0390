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

  // Those of another head, which lie some elements further on in their pages.
  inline __attribute__((always_inline)) TileRows of_head(int64_t head, int64_t head_elements) const {
    TileRows rows;
    for (int64_t group = 0; group < kGroups; ++group) {
      rows.k[group] = k[group] + head * head_elements;
      rows.v[group] = v[group] + head * head_elements;
    }
    return rows;
  }
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

// The keys and values of the next tile, which are brought into the cache bit by bit while this one is computed: pages
// lie anywhere in memory, so no prefetcher of the hardware sees them coming, and many lines at once would wait for each
// other.
template <typename T>
class UpcomingTile {
 public:
  UpcomingTile(const TileRows<T>& rows, int64_t d) : group_bytes_(kGroupKeys * d * static_cast<int64_t>(sizeof(T))) {
    for (int64_t group = 0; group < kGroups; ++group) {
      groups_[group] = reinterpret_cast<const char*>(rows.k[group]);
      groups_[kGroups + group] = reinterpret_cast<const char*>(rows.v[group]);
    }
  }

  // Fetches some lines, the keys' first, until there are no more.
  inline __attribute__((always_inline)) void fetch_lines() {
    constexpr int kLines = 4;
    if (at_ >= group_bytes_) {
      if (group_ + 1 == 2 * kGroups) return;
      ++group_;
      at_ = 0;
    }
    const char* from = groups_[group_] + at_;
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(from + i * 64, 0, 3);
    at_ += kLines * 64;
  }

  // The same beside a step of a product, which takes little time.
  inline __attribute__((always_inline)) void fetch(int64_t step) {
    if (step % 2 == 0) fetch_lines();
  }

 private:
  const char* groups_[2 * kGroups];
  int64_t group_bytes_, at_ = 0;
  int group_ = 0;
};

// As below, for the last words of a row. Inlined, GCC 12 warns of overflow where it finds that there are none.
inline __attribute__((noinline)) void transpose_last_words(const uint32_t* rows, int64_t units, int64_t count,
                                                           uint32_t* to) {
  for (int64_t unit = units - count; unit < units; ++unit) {
    for (int i = 0; i < kGroupKeys; ++i) to[unit * kBlock + i] = rows[i * units + unit];
  }
}

// to [units][kBlock] = transpose of kGroupKeys rows of `units` 32-bit words.
template <typename Next>
inline __attribute__((always_inline)) void transpose_words(const uint32_t* rows, int64_t units,
                                                           [[maybe_unused]] Next& next,
                                                           uint32_t* to) {
  int64_t rest = units;
#if defined(__AVX512F__)
  for (int64_t unit = 0; rest >= 16; unit += 16, rest -= 16) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows + i * units + unit);
    next.fetch_lines();
    next.fetch_lines();
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

// Packs the keys first to end of a tile as columns of a matrix product.
template <typename T>
inline __attribute__((always_inline)) void pack_keys(const TileRows<T>& rows, int64_t d, int64_t first, int64_t end,
                                                     UpcomingTile<T>& next, T* to) {
  for (int64_t group = first / kGroupKeys; group * kGroupKeys < end; ++group) {
    const int64_t key = group * kGroupKeys;
    T* block = to + key / kBlock * block_size<T>(d);
    if constexpr (kPaired<T> || sizeof(T) == sizeof(uint32_t)) {
      constexpr int64_t kUnit = static_cast<int64_t>(sizeof(uint32_t) / sizeof(T));
      transpose_words(reinterpret_cast<const uint32_t*>(rows.k[group]), d / kUnit, next,
                      reinterpret_cast<uint32_t*>(block + key % kBlock * kUnit));
    } else {
      next.fetch_lines();
      for (int64_t j = 0; j < d; ++j) {
        for (int64_t i = 0; i < kGroupKeys; ++i) block[j * kBlock + key % kBlock + i] = rows.k[group][i * d + j];
      }
    }
  }
}

// The values of a tile's keys first to end.
template <typename T>
struct TileValues {
  const TileRows<T>& rows;
  int64_t first, end, d;
};

// mixed [rows, d] += weights [rows, kTileKeys] times values, for some vectors of columns.
template <int rows, int vectors, int lanes, typename T>
inline __attribute__((always_inline)) void mix_tile(const float* weights, const TileValues<T>& values, int64_t column,
                                                    UpcomingTile<T>& next, float* mixed) {
  using V = typename Vectors<lanes>::Float;
  constexpr bool separated = kPaired<T> && vectors % 2 == 0;  // every other column in a vector of its own
  const int64_t d = values.d;
  V sums[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sums[r][v] = load<lanes>(mixed + r * d + column + v * lanes);
#pragma GCC unroll 16
    for (int v = 0; separated && v < vectors; v += 2) separate<lanes>(sums[r][v], sums[r][v + 1]);
  }
  for (int64_t group = values.first / kGroupKeys; group * kGroupKeys < values.end; ++group) {
    const int64_t start = group * kGroupKeys;
    const int64_t stop = values.end < start + kGroupKeys ? values.end : start + kGroupKeys;
    const T* from = values.rows.v[group] + column;
    for (int64_t key = values.first > start ? values.first : start; key < stop; ++key) {
      V value[vectors];
      const T* row = from + (key - start) * d;
      if constexpr (separated) {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v += 2) load_separate<lanes>(row + v * lanes, value[v], value[v + 1]);
      } else {
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) value[v] = load<lanes>(row + v * lanes);
      }
      if (key % 2 == 0) next.fetch_lines();
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
    for (int v = 0; separated && v < vectors; v += 2) interleave<lanes>(sums[r][v], sums[r][v + 1]);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store_as(mixed + r * d + column + v * lanes, sums[r][v]);
  }
}

template <int vectors, int lanes, int rows = kWideRows, typename T>
inline void mix_rows(const float* weights, int64_t num_rows, const TileValues<T>& values, int64_t column,
                     UpcomingTile<T>& next, float* mixed) {
  if (num_rows == rows) {
    mix_tile<rows, vectors, lanes>(weights, values, column, next, mixed);
  } else if constexpr (rows > 1) {
    mix_rows<vectors, lanes, rows - 1>(weights, num_rows, values, column, next, mixed);
  }
}

// mixed [num_rows, d] += weights [num_rows, kTileKeys] times values, for up to kWideRows rows.
template <typename T>
inline __attribute__((always_inline)) void mix(const float* weights, int64_t num_rows, const TileValues<T>& values,
                                               UpcomingTile<T>& next, float* mixed) {
  const int64_t d = values.d;
  int64_t column = 0;
  for (; column + 4 * kLanes <= d; column += 4 * kLanes) {
    mix_rows<4, kLanes>(weights, num_rows, values, column, next, mixed);
  }
  for (; column + kLanes <= d; column += kLanes) mix_rows<1, kLanes>(weights, num_rows, values, column, next, mixed);
  for (; column + 4 <= d; column += 4) mix_rows<1, 4>(weights, num_rows, values, column, next, mixed);
  for (; column < d; ++column) {
    for (int64_t i = 0; i < num_rows; ++i) {
      float sum = mixed[i * d + column];
      for (int64_t key = values.first; key < values.end; ++key) {
        sum += weights[i * kTileKeys + key] *
               to_float(values.rows.v[key / kGroupKeys][key % kGroupKeys * d + column]);
      }
      mixed[i * d + column] = sum;
    }
  }
}

// Some queries of a request, for some of the KV heads.
struct AttentionTask {
  int64_t request, first_query, num_queries, kv_head, num_kv_heads;
};

// What the softmax of a task's rows has come to. A row is a query's head; the rows of a KV head follow each other.
struct AttentionRows {
  alignas(64) float mixed[kMaxRows * kMaxHeadDim];
  float maximum[kMaxRows], sum[kMaxRows];
};

constexpr int kTileVectors = static_cast<int>(kTileKeys) / kLanes;

// Scales a row of scores, caps them, and hides those outside [first, end).
inline __attribute__((always_inline)) void finish_scores(const AttentionArgs& a, int64_t first, int64_t end,
                                                         Vec (&row)[kTileVectors]) {
#pragma GCC unroll 16
  for (int v = 0; v < kTileVectors; ++v) row[v] *= a.scale;
  if (a.soft_cap > 0.0f) {
    for (int v = 0; v < kTileVectors; ++v) {
      // tanh through exp of a non-positive number, which cannot overflow
      const Vec size = row[v] < 0.0f ? -row[v] : row[v];
      const Vec e = exponential(size * (-2.0f / a.soft_cap));
      const Vec capped = a.soft_cap * (1.0f - e) / (1.0f + e);
      row[v] = row[v] < 0.0f ? -capped : capped;
    }
  }
  if (first <= 0 && end >= kTileKeys) return;
  using Ints = Vectors<kLanes>::Ints;
  const auto low = static_cast<int32_t>(first > 0 ? first : 0);
  const auto high = static_cast<int32_t>(end < kTileKeys ? end : kTileKeys);
  Ints key;
  for (int i = 0; i < kLanes; ++i) key[i] = i;
  for (int v = 0; v < kTileVectors; ++v, key += kLanes) {
    row[v] = (key >= low) & (key < high) ? row[v] : Vec{} - __builtin_inff();
  }
}

// Turns a tile's scores [num_rows, kTileKeys] into weights and shrinks what was mixed before, row by row. The rows are
// those of the state from first_row on, of queries from first_position on.
template <typename T>
inline __attribute__((always_inline)) void soften(const AttentionArgs& a, AttentionRows& state, int64_t first_row,
                                                  int64_t num_rows, int64_t first_position, int64_t d, int64_t base,
                                                  float* scores, UpcomingTile<T>& next) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  for (int64_t r = 0; r < num_rows; ++r) {
    next.fetch_lines();
    next.fetch_lines();
    Vec row[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) row[v] = load<kLanes>(scores + r * kTileKeys + v * kLanes);
    const int64_t position = first_position + r / group;
    finish_scores(a, a.window > 0 ? position - a.window + 1 - base : 0, position + 1 - base, row);
    Vec largest = row[0];
#pragma GCC unroll 16
    for (int v = 1; v < kTileVectors; ++v) largest = max(row[v], largest);
    float& seen_maximum = state.maximum[first_row + r];
    const float tile_maximum = max_lane(largest);
    const float maximum = tile_maximum > seen_maximum ? tile_maximum : seen_maximum;
    float* to = scores + r * kTileKeys;
    if (maximum == -__builtin_inff()) {  // nothing seen yet: a window that begins later
      for (int v = 0; v < kTileVectors; ++v) store(to + v * kLanes, Vec{});
      continue;
    }
    Vec sum{};
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v) {
      const Vec weight = exponential(row[v] - maximum);
      store(to + v * kLanes, weight);
      sum += weight;
    }
    float& seen_sum = state.sum[first_row + r];
    if (maximum == seen_maximum) {
      seen_sum += sum_of_lanes(sum);
      continue;
    }
    const float shrink = exp_nonpositive(seen_maximum - maximum);
    seen_sum = seen_sum * shrink + sum_of_lanes(sum);
    seen_maximum = maximum;
    float* mixed = state.mixed + (first_row + r) * d;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) mixed[j] *= shrink;
  }
}

// The first key that a query sees.
inline int64_t first_key(const AttentionArgs& a, int64_t position) {
  return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
}

// Where the first tile of a task is, in pages of whole groups.
template <typename T>
inline TileRows<T> first_tile(const AttentionArgs& a, const AttentionTask& task) {
  const int64_t query_len = a.first_row(task.request + 1) - a.first_row(task.request);
  const int64_t first_position = a.seq_lens[task.request] - query_len + task.first_query;
  const int64_t key = first_key(a, first_position), base = key / kTileKeys * kTileKeys;
  TileRows<T> rows;
  PagedRows<T>(a, task.request, task.kv_head)
      .find(base, key - base, first_position + task.num_queries - base, nullptr, rows);
  return rows;
}

// kHeadDim is the head size where the compiler knows it, 0 where it does not. The first tile of the task after this one,
// where that is known, is fetched during the last one of this.
template <typename T, int64_t kHeadDim>
void attend(const AttentionArgs& a, const AttentionTask& task, const AttentionTask* following) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t d = kHeadDim > 0 ? kHeadDim : a.head_dim;
  const int64_t start = a.first_row(task.request);
  const int64_t query_len = a.first_row(task.request + 1) - start;
  const int64_t head_rows = task.num_queries * group;  // of a KV head
  const int64_t first_position = a.seq_lens[task.request] - query_len + task.first_query;
  AttentionRows state;

  // Rows lie head_dim apart: a fixed, power-of-two stride would thrash the sets of the L1 cache.
  alignas(64) T queries[kMaxRows * kMaxHeadDim];
  alignas(64) T keys[kTileKeys * kMaxHeadDim];
  alignas(64) float scores[kMaxRows * kTileKeys];
  const int64_t first_head = task.kv_head * group;
  for (int64_t head = 0; head < task.num_kv_heads; ++head) {
    for (int64_t i = 0; i < task.num_queries; ++i) {
      const T* q = static_cast<const T*>(a.q) + (start + task.first_query + i) * a.q_stride;
      __builtin_memcpy(queries + (head * head_rows + i * group) * d, q + (first_head + head * group) * d,
                       static_cast<std::size_t>(group * d) * sizeof(T));
    }
  }
  const int64_t all_rows = task.num_kv_heads * head_rows;
  for (int64_t j = 0; j < all_rows * d; ++j) state.mixed[j] = 0.0f;
  for (int64_t r = 0; r < all_rows; ++r) {
    state.maximum[r] = -__builtin_inff();
    state.sum[r] = 0.0f;
  }

  const PagedRows<T> paged(a, task.request, task.kv_head);
  const int64_t lowest = first_key(a, first_position);
  const int64_t beyond = first_position + task.num_queries;
  // Two of each: this tile's, and the next one's.
  alignas(64) T spare[2][2 * kTileKeys * kMaxHeadDim];
  TileRows<T> tiles[2];
  int64_t base = lowest / kTileKeys * kTileKeys;
  paged.find(base, lowest - base, beyond - base, spare[0], tiles[0]);
  for (int turn = 0; base < beyond; base += kTileKeys, turn ^= 1) {
    const int64_t first = lowest > base ? lowest - base : 0;
    const int64_t end = beyond - base < kTileKeys ? beyond - base : kTileKeys;
    TileRows<T>& next = tiles[turn ^ 1];
    if (base + kTileKeys < beyond) {
      paged.find(base + kTileKeys, 0, beyond - base - kTileKeys, spare[turn ^ 1], next);
    } else {
      next = following ? first_tile<T>(a, *following) : tiles[turn];
    }
    for (int64_t head = 0; head < task.num_kv_heads; ++head) {
      const TileRows<T> rows = tiles[turn].of_head(head, a.page_size * d);
      UpcomingTile<T> upcoming(head + 1 < task.num_kv_heads ? tiles[turn].of_head(head + 1, a.page_size * d) : next, d);
      pack_keys(rows, d, first, end, upcoming, keys);
      const int64_t first_row = head * head_rows;
      const int64_t row_blocks = (head_rows + kWideRows - 1) / kWideRows;
      for (int64_t i = 0; i < row_blocks; ++i) {
        const int64_t r = head_rows * i / row_blocks, count = head_rows * (i + 1) / row_blocks - r;
        multiply<kWideRows, 2>(queries + (first_row + r) * d, d, count, keys, d, upcoming, scores + r * kTileKeys,
                               kTileKeys);
      }
      soften(a, state, first_row, head_rows, first_position, d, base, scores, upcoming);
      for (int64_t i = 0; i < row_blocks; ++i) {
        const int64_t r = head_rows * i / row_blocks, count = head_rows * (i + 1) / row_blocks - r;
        mix(scores + r * kTileKeys, count, TileValues<T>{rows, first, end, d}, upcoming,
            state.mixed + (first_row + r) * d);
      }
    }
  }

  for (int64_t r = 0; r < all_rows; ++r) {
    const int64_t token = start + task.first_query + r % head_rows / group;
    const int64_t head = first_head + r / head_rows * group + r % group;
    const float* mixed = state.mixed + r * d;
    const float scale = 1.0f / state.sum[r];
    T* out = static_cast<T*>(a.out) + token * a.out_stride + head * d;
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) store(out + j, load<kLanes>(mixed + j) * scale);
    if (j < d) store_first(out + j, d - j, load_first(mixed + j, d - j) * scale);
    if (a.lse) a.lse[token * a.num_heads + head] = state.maximum[r] + __builtin_logf(state.sum[r]);
  }
}

// The tasks of a call, by number: those of a request follow each other.
class AttentionTasks {
 public:
  AttentionTasks(const AttentionArgs& a, const Team& team) : a_(a) {
    const int64_t group = a.num_heads / a.num_kv_heads;
    query_block_ = group >= kMaxRows ? 1 : kMaxRows / group;
    int64_t blocks = 0;
    for (int64_t r = 0; r < a.num_requests; ++r) blocks += query_blocks(r);
    // Pages hold the heads one after the other, and memory is read fastest in long pieces: a task takes all heads that it
    // has room for, unless too few tasks would be left.
    constexpr int64_t kTasksPerThread = 4;
    most_heads_ = a.page_size % kGroupKeys == 0 ? blocks * a.num_kv_heads / (kTasksPerThread * team.size) : 1;
    enter(0);
  }

  // Finds a task; its number must not be lower than the one before.
  bool find(int64_t number, AttentionTask& task) {
    while (number >= end_) {
      if (request_ + 1 >= a_.num_requests) return false;
      enter(request_ + 1);
    }
    const int64_t index = number - first_;
    const int64_t part = index % parts_, query = index / parts_ * query_block_;
    const int64_t head = a_.num_kv_heads * part / parts_;
    task = {request_, query, queries_ - query < query_block_ ? queries_ - query : query_block_, head,
            a_.num_kv_heads * (part + 1) / parts_ - head};
    return true;
  }

 private:
  int64_t query_blocks(int64_t request) const {
    return (a_.first_row(request + 1) - a_.first_row(request) + query_block_ - 1) / query_block_;
  }

  void enter(int64_t request) {
    request_ = request;
    queries_ = request < a_.num_requests ? a_.first_row(request + 1) - a_.first_row(request) : 0;
    const int64_t rows = (queries_ < query_block_ ? queries_ : query_block_) * (a_.num_heads / a_.num_kv_heads);
    int64_t heads = rows > 0 ? kMaxRows / rows : 1;
    if (heads > most_heads_) heads = most_heads_;
    if (heads < 1) heads = 1;
    parts_ = (a_.num_kv_heads + heads - 1) / heads;
    first_ = end_;
    end_ = first_ + (queries_ + query_block_ - 1) / query_block_ * parts_;
  }

  const AttentionArgs& a_;
  int64_t query_block_, most_heads_;
  int64_t request_ = 0, queries_ = 0, parts_ = 1;  // of the request that was found last
  int64_t first_ = 0, end_ = 0;                    // its tasks
};

template <typename T, int64_t kHeadDim>
void paged_attention_of(const AttentionArgs& a, const Team& team) {
  AttentionTasks tasks(a, team);
  AttentionTask task, following;
  for (int64_t number = next_task(team); tasks.find(number, task); number = next_task(team)) {
    // As the threads take turns.
    AttentionTasks ahead = tasks;
    const bool known = a.page_size % kGroupKeys == 0 && ahead.find(number + team.size, following);
    attend<T, kHeadDim>(a, task, known ? &following : nullptr);
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

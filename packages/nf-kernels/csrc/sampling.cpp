#include "sampling.h"

#include <algorithm>
#include <cmath>

namespace nf {
namespace {

constexpr int64_t kFew = 512;  // candidates that are sorted before all are

// Tokens of a row by falling weight, sorted as far as anybody looks.
struct Candidates {
  const float* weights;
  int32_t* tokens;
  int64_t count;
  int64_t sorted = 0;

  void sort(int64_t n) {
    const auto heavier = [this](int32_t a, int32_t b) {
      return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
    };
    if (n < count) std::nth_element(tokens, tokens + n, tokens + count, heavier);
    std::sort(tokens, tokens + n, heavier);
    sorted = n;
  }

  float operator[](int64_t rank) {
    if (rank >= sorted) sort(rank < kFew ? std::min(kFew, count) : count);
    return weights[tokens[rank]];
  }
};

// The first index whose cumulative weight exceeds `uniform` of the total.
template <typename WeightOf>
int64_t invert(int64_t count, double total, double uniform, WeightOf weight_of) {
  // Strictly below the total, whatever the rounding: an index of weight 0 is never drawn.
  const double target = std::min(uniform * total, std::nextafter(total, 0.0));
  double cumulative = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    cumulative += weight_of(i);
    if (cumulative > target) return i;
  }
  return 0;  // a row of NaN has no distribution; its token is at least one of the vocabulary
}

int64_t sample_row(const SampleArgs& a, const KernelTable& table, int64_t row, float* weights, int32_t* tokens) {
  const float* logits = a.logits + row * a.logits_stride;
  const float maximum = table.maximum(logits, a.vocab_size);
  const float temperature = a.temperature[row];
  if (!(temperature > 0.0f)) {
    const float* found = std::find(logits, logits + a.vocab_size, maximum);
    return found == logits + a.vocab_size ? 0 : found - logits;
  }
  table.exponentials(logits, a.vocab_size, maximum, temperature, weights);
  double total = 0.0;
  for (int64_t i = 0; i < a.vocab_size; ++i) total += weights[i];
  const int64_t top_k = a.top_k[row];
  const float top_p = a.top_p[row], min_p = a.min_p[row];
  const double uniform = a.uniform[row];
  if (top_k <= 0 && top_p >= 1.0f && min_p <= 0.0f) {
    return invert(a.vocab_size, total, uniform, [&](int64_t i) { return weights[i]; });
  }
  int64_t count = 0;
  for (int64_t i = 0; i < a.vocab_size; ++i) {
    if (weights[i] > 0.0f) tokens[count++] = static_cast<int32_t>(i);
  }
  Candidates candidates{weights, tokens, count};
  if (top_k > 0 && top_k < count) {
    candidates.sort(top_k);
    candidates.count = count = top_k;
    total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += candidates[i];
  }
  const float least = min_p;  // the largest weight is exp(0) = 1
  double kept = 0.0;
  int64_t num_kept = 0;
  for (; num_kept < count; ++num_kept) {
    const float weight = candidates[num_kept];
    if (weight < least || (top_p < 1.0f && kept >= static_cast<double>(top_p) * total)) break;
    kept += weight;
  }
  const int64_t rank = invert(num_kept, kept, uniform, [&](int64_t i) { return candidates[i]; });
  return num_kept > 0 ? tokens[rank] : 0;
}

}  // namespace

int64_t sample_scratch_bytes(int64_t vocab_size) {
  return vocab_size * static_cast<int64_t>(sizeof(float) + sizeof(int32_t));
}

void sample(const SampleArgs& a, const KernelTable& table, const Team& team) {
  char* scratch = static_cast<char*>(a.scratch) + team.index * sample_scratch_bytes(a.vocab_size);
  float* weights = reinterpret_cast<float*>(scratch);
  int32_t* tokens = reinterpret_cast<int32_t*>(weights + a.vocab_size);
  for (int64_t row = next_task(team); row < a.num_rows; row = next_task(team)) {
    a.out[row] = sample_row(a, table, row, weights, tokens);
  }
}

}  // namespace nf

// Choosing the experts of a token, and adding up what they say.
#pragma once

#include "kernels.h"
#include "math_impl.h"
#include "team.h"

namespace nf {
namespace NF_ISA {
namespace {

template <typename T>
void moe_route(const RouteArgs& a, const Team& team) {
  const int64_t k = a.experts_per_token;
  for (RowRange rows = next_rows(team, a.num_tokens, a.num_experts); rows.first < rows.end;
       rows = next_rows(team, a.num_tokens, a.num_experts)) {
    for (int64_t token = rows.first; token < rows.end; ++token) {
      const T* logits = static_cast<const T*>(a.logits) + token * a.logits_stride;
      int64_t* ids = a.expert_ids + token * k;
      float* weights = a.expert_weights + token * k;
      // The largest k, kept in order; of equal ones the first.
      int64_t kept = 0;
      for (int64_t e = 0; e < a.num_experts; ++e) {
        const float value = to_float(logits[e]);
        int64_t at = kept < k ? kept : k;
        while (at > 0 && weights[at - 1] < value) --at;
        if (at == k) continue;
        for (int64_t i = kept < k ? kept : k - 1; i > at; --i) {
          weights[i] = weights[i - 1];
          ids[i] = ids[i - 1];
        }
        weights[at] = value;
        ids[at] = e;
        if (kept < k) ++kept;
      }
      const float maximum = weights[0];
      float all = 0.0f, chosen = 0.0f;
      for (int64_t e = 0; e < a.num_experts; ++e) all += exp_nonpositive(to_float(logits[e]) - maximum);
      for (int64_t i = 0; i < k; ++i) {
        weights[i] = exp_nonpositive(weights[i] - maximum);
        chosen += weights[i];
      }
      const float total = a.normalize ? chosen : all;
      for (int64_t i = 0; i < k; ++i) weights[i] /= total;
    }
  }
}

template <typename T>
void moe_combine(const CombineArgs& a, const Team& team) {
  for (RowRange rows = next_rows(team, a.num_tokens, a.width); rows.first < rows.end;
       rows = next_rows(team, a.num_tokens, a.width)) {
    for (int64_t token = rows.first; token < rows.end; ++token) {
      T* out = static_cast<T*>(a.out) + token * a.out_stride;
      constexpr int64_t kPiece = 256;  // elements that are added up at a time
      for (int64_t first = 0; first < a.width; first += kPiece) {
        const int64_t n = a.width - first < kPiece ? a.width - first : kPiece;
        alignas(64) float sum[kPiece];
        if (a.residual) {
          load_row(static_cast<const T*>(a.residual) + token * a.residual_stride + first, sum, n);
        } else {
          for (int64_t j = 0; j < n; ++j) sum[j] = 0.0f;
        }
        for (int64_t i = 0; i < a.experts_per_token; ++i) {
          const int64_t choice = token * a.experts_per_token + i;
          if (a.row_of[choice] < 0) continue;
          const T* x = static_cast<const T*>(a.x) + a.row_of[choice] * a.width + first;
          const float weight = a.weights[choice];
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) sum[j] += weight * to_float(x[j]);
        }
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) store(out + first + j, sum[j]);
      }
    }
  }
}

}  // namespace
}  // namespace NF_ISA
}  // namespace nf

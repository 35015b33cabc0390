// The operations: their arguments, what is checked when their turn comes, and the kernels they consist of.
//
// `run` throws std::invalid_argument for an index out of range, before anything is written. An operation that can be
// recorded shows its operands (operands.h), so that a launch can work on some of their rows.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"
#include "threads.h"

namespace nf {

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// embedding and gather_rows.
struct GatherRows {
  DType dtype;
  GatherArgs args;
  int64_t table_rows;
  bool packed;        // whether the table is
  const char* index;  // its name in errors

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    visit.num_rows(args.num_rows);
    visit.row_values(args.index);
    visit.rows(args.out, args.out_stride, element_bytes(dtype));
  }
};

struct RmsNorm {
  DType dtype;
  RmsNormArgs args;

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    const int64_t bytes = element_bytes(dtype);
    visit.num_rows(args.num_rows);
    visit.rows(args.x, args.x_stride, bytes);
    visit.rows(args.residual, args.residual_stride, bytes);
    visit.rows(args.out, args.out_stride, bytes);
  }
};

struct SwiGlu {
  DType dtype;
  SwiGluArgs args;

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    visit.num_rows(args.num_rows);
    visit.rows(args.gate_up, args.gate_up_stride, element_bytes(dtype));
    visit.rows(args.out, args.out_stride, element_bytes(dtype));
  }
};

struct Linear {
  DType dtype;
  LinearArgs args;

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    const int64_t bytes = element_bytes(dtype);
    visit.num_rows(args.num_rows);
    visit.rows(args.x, args.x_stride, bytes);
    visit.rows(args.residual, args.residual_stride, bytes);
    visit.rows(args.out, args.out_stride, args.float_out ? 4 : bytes);
  }
};

struct RopeAppend {
  DType dtype;
  RopeAppendArgs args;
  int64_t num_positions, num_pages;

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    visit.num_rows(args.num_tokens);
    visit.row_values(args.positions);
    visit.row_values(args.slots);
    visit.rows(args.qkv, args.qkv_stride, element_bytes(dtype));
    visit.rows(args.out, args.out_stride, element_bytes(dtype));
  }
};

// prefill_attention and decode_attention.
struct PagedAttention {
  DType dtype;
  AttentionArgs args;
  int64_t num_queries, num_pages, pages_per_row;

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    visit.num_rows(num_queries);
    visit.num_requests(args.num_requests);
    if (!args.query_start) visit.one_row_per_request();
    visit.request_rows(args.page_table, args.page_table_stride, pages_per_row);
    visit.request_values(args.seq_lens);
    visit.request_values(args.query_start, 1);
    visit.rows(args.q, args.q_stride, element_bytes(dtype));
    visit.rows(args.out, args.out_stride, element_bytes(dtype));
    visit.rows(args.lse, args.num_heads, sizeof(float));
  }

 private:
  void check() const;
};

struct MergeAttention {
  DType dtype;
  MergeArgs args;

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    visit.num_rows(args.num_tokens);
    visit.rows(args.a, args.a_stride, element_bytes(dtype));
    visit.rows(args.b, args.b_stride, element_bytes(dtype));
    visit.rows(args.out, args.out_stride, element_bytes(dtype));
    visit.rows(args.lse_a, args.num_heads, sizeof(float));
    visit.rows(args.lse_b, args.num_heads, sizeof(float));
    visit.rows(args.lse_out, args.num_heads, sizeof(float));
  }
};

struct MoeRoute {
  DType dtype;
  RouteArgs args;

  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    visit.num_rows(args.num_tokens);
    visit.rows(args.logits, args.logits_stride, element_bytes(dtype));
    visit.rows(args.expert_ids, args.experts_per_token, sizeof(int64_t));
    visit.rows(args.expert_weights, args.experts_per_token, sizeof(float));
  }
};

struct MoeExperts {
  DType dtype;
  const void* x;                // [tokens, hidden]
  const int64_t* expert_ids;    // [tokens, experts_per_token]
  const float* expert_weights;  // as expert_ids
  const void* gate_up;          // packed, gate_up_stride elements for each expert
  const void* down;             // packed, likewise
  const void* residual;         // [tokens, hidden], or null
  void* out;                    // [tokens, hidden]
  void* scratch;                // scratch_bytes
  int64_t num_tokens, experts_per_token, num_experts, hidden, inner;
  int64_t x_stride, residual_stride, out_stride, gate_up_stride, down_stride;
  int64_t first_expert;  // id of the first one that is here
  bool is_part;          // whether ids of experts that are elsewhere are legal; they count for nothing

  int64_t scratch_bytes() const;
  void run(Threads& threads) const;
  template <typename Visitor>
  void operands(Visitor& visit) {
    visit.num_rows(num_tokens);
    visit.rows(x, x_stride, element_bytes(dtype));
    visit.rows(expert_ids, experts_per_token, sizeof(int64_t));
    visit.rows(expert_weights, experts_per_token, sizeof(float));
    visit.rows(residual, residual_stride, element_bytes(dtype));
    visit.rows(out, out_stride, element_bytes(dtype));
  }
};

struct Sample {
  SampleArgs args;

  void run(Threads& threads) const;
};

// Gives rows whose token is not known yet (below 0) the one that was sampled last in their slot.
struct FeedSampled {
  int64_t* token_ids;
  const int64_t *slots, *last_sampled;
  int64_t num_rows, num_slots;

  void run(Threads& threads) const;
};

struct KeepSampled {
  const int64_t *sampled, *slots;
  int64_t* last_sampled;
  int64_t num_rows, num_slots;

  void run(Threads& threads) const;
};

}  // namespace nf

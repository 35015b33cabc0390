#include "operations.h"

#include <cstddef>
#include <stdexcept>

#include "instruction_sets.h"
#include "sampling.h"

namespace nf {
namespace {

template <typename Args>
void run_kernel(Threads& threads, Kernel<Args> kernel, DType dtype, const Args& args, int64_t work) {
  threads.run(work, [&](const Team& team) { kernel(dtype, args, team); });
}

// Refuses an index outside [0, end).
template <typename Index>
void check_indices(const char* name, const Index* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= end) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) +
                                  "; expected 0 to " + std::to_string(end - 1));
    }
  }
}

// What moe_experts keeps in its scratch: rows are the choices (a token and one of its experts), sorted by expert.
struct ExpertScratch {
  int64_t *row_start, *token_of_row, *row_of_choice;
  char *gathered, *gate_up, *inner;
  int64_t bytes;

  explicit ExpertScratch(const MoeExperts& o) {
    const int64_t choices = o.num_tokens * o.experts_per_token;
    const int64_t element = element_bytes(o.dtype);
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      const int64_t offset = used;
      used += (size + 63) / 64 * 64;
      return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(o.scratch) + static_cast<uintptr_t>(offset));
    };
    row_start = reinterpret_cast<int64_t*>(take((o.num_experts + 1) * 8));
    token_of_row = reinterpret_cast<int64_t*>(take(choices * 8));
    row_of_choice = reinterpret_cast<int64_t*>(take(choices * 8));
    gathered = take(choices * o.hidden * element);
    gate_up = take(choices * 2 * o.inner * element);
    inner = take(choices * o.inner * element);
    bytes = used;
  }
};

// Choices of experts that are elsewhere have the rows behind those of all that are here, where no product looks.
void sort_by_expert(const int64_t* ids, int64_t choices, int64_t experts_per_token, int64_t first_expert,
                    int64_t num_experts, const ExpertScratch& s) {
  const auto is_here = [=](int64_t id) { return id >= first_expert && id < first_expert + num_experts; };
  for (int64_t e = 0; e <= num_experts; ++e) s.row_start[e] = 0;
  for (int64_t i = 0; i < choices; ++i) {
    if (is_here(ids[i])) ++s.row_start[ids[i] - first_expert + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) s.row_start[e + 1] += s.row_start[e];
  int64_t elsewhere = s.row_start[num_experts];
  for (int64_t i = 0; i < choices; ++i) {
    const bool here = is_here(ids[i]);
    const int64_t row = here ? s.row_start[ids[i] - first_expert]++ : elsewhere++;
    s.token_of_row[row] = i / experts_per_token;
    s.row_of_choice[i] = here ? row : -1;
  }
  for (int64_t e = num_experts; e > 0; --e) s.row_start[e] = s.row_start[e - 1];
  s.row_start[0] = 0;
}

}  // namespace

void GatherRows::run(Threads& threads) const {
  check_indices(index, args.index, args.num_rows, table_rows);
  run_kernel(threads, packed ? kernels().gather_packed_rows : kernels().gather_rows, dtype, args,
             args.num_rows * args.width);
}

void RmsNorm::run(Threads& threads) const {
  run_kernel(threads, kernels().rms_norm, dtype, args, args.num_rows * args.width);
}

void SwiGlu::run(Threads& threads) const {
  run_kernel(threads, kernels().swiglu, dtype, args, args.num_rows * args.width);
}

void Linear::run(Threads& threads) const {
  run_kernel(threads, kernels().linear, dtype, args, args.num_rows * args.in_features * args.out_features / 8);
}

void RopeAppend::run(Threads& threads) const {
  check_indices("positions", args.positions, args.num_tokens, num_positions);
  check_indices("slots", args.slots, args.num_tokens, num_pages * args.page_size);
  run_kernel(threads, kernels().rope_append, dtype, args, args.num_tokens * args.qkv_stride);
}

void PagedAttention::check() const {
  const int64_t first = args.query_start ? args.query_start[0] : 0;
  if (args.first_row(args.num_requests) != num_queries) {
    throw std::invalid_argument("query_start runs from " + std::to_string(first) + " to " +
                                std::to_string(first + args.first_row(args.num_requests)) + "; expected " +
                                std::to_string(first) + " to " + std::to_string(first + num_queries) +
                                ", the rows of q");
  }
  for (int64_t r = 0; r < args.num_requests; ++r) {
    const int64_t count = args.first_row(r + 1) - args.first_row(r);
    const int64_t seq_len = args.seq_lens[r];
    if (count < 1 || seq_len < count || seq_len > pages_per_row * args.page_size) {
      throw std::invalid_argument("request " + std::to_string(r) + " has " + std::to_string(count) +
                                  " queries by query_start and " + std::to_string(seq_len) +
                                  " tokens by seq_lens; expected at least 1 query, no more queries than tokens, and at "
                                  "most " +
                                  std::to_string(pages_per_row * args.page_size) + " tokens, the page_table's width");
    }
    check_indices("page_table", args.page_table + r * args.page_table_stride,
                  (seq_len + args.page_size - 1) / args.page_size, num_pages);
  }
}

void PagedAttention::run(Threads& threads) const {
  check();
  threads.run_together([this](const Team& team) { kernels().paged_attention(dtype, args, team); });
}

void MergeAttention::run(Threads& threads) const {
  run_kernel(threads, kernels().merge_attention, dtype, args, args.num_tokens * args.num_heads * args.head_dim);
}

void MoeRoute::run(Threads& threads) const {
  run_kernel(threads, kernels().moe_route, dtype, args, args.num_tokens * args.num_experts);
}

int64_t MoeExperts::scratch_bytes() const { return ExpertScratch(*this).bytes; }

void MoeExperts::run(Threads& threads) const {
  const int64_t choices = num_tokens * experts_per_token;
  const ExpertScratch s(*this);
  if (!is_part) check_indices("expert_ids", expert_ids, choices, num_experts);
  sort_by_expert(expert_ids, choices, experts_per_token, first_expert, num_experts, s);
  run_kernel(threads, kernels().gather_rows, dtype,
             {x, s.token_of_row, s.gathered, choices, hidden, x_stride, hidden}, choices * hidden);
  const auto grouped = [&](const void* from, const void* weight, void* to, int64_t in, int64_t features,
                           int64_t stride) {
    run_kernel(threads, kernels().grouped_linear, dtype,
               {{from, weight, nullptr, nullptr, to, choices, in, features, in, 0, features, false},
                s.row_start,
                num_experts,
                stride},
               choices * in * features / 8);
  };
  grouped(s.gathered, gate_up, s.gate_up, hidden, 2 * inner, gate_up_stride);
  run_kernel(threads, kernels().swiglu, dtype, {s.gate_up, s.inner, choices, inner, 2 * inner, inner},
             choices * inner);
  grouped(s.inner, down, s.gathered, inner, hidden, down_stride);
  run_kernel(threads, kernels().moe_combine, dtype,
             {s.gathered, s.row_of_choice, expert_weights, residual, out, num_tokens, experts_per_token, hidden,
              residual_stride, out_stride},
             choices * hidden);
}

void Sample::run(Threads& threads) const {
  threads.run(args.num_rows * args.vocab_size, [this](const Team& team) { sample(args, kernels(), team); });
}

void FeedSampled::run(Threads&) const {
  check_indices("slots", slots, num_rows, num_slots);
  for (int64_t i = 0; i < num_rows; ++i) {
    if (token_ids[i] < 0) token_ids[i] = last_sampled[slots[i]];
  }
}

void KeepSampled::run(Threads&) const {
  check_indices("slots", slots, num_rows, num_slots);
  for (int64_t i = 0; i < num_rows; ++i) last_sampled[slots[i]] = sampled[i];
}

}  // namespace nf

// pybind11 module nf_kernels._cpu. Tensors arrive as addresses, so that the extension does not link
// against torch and one build serves several torch versions; nf_kernels.ops.cpu checks every shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "lane.h"
#include "pool.h"
#include "sampling.h"
#include "team.h"

#if defined(NF_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace {

#if defined(NF_X86)
// Whether two tables agree on products of every number of rows that a tile can have, and of an odd inner dimension.
bool same_products(const nf::KernelTable& a, const nf::KernelTable& b) {
  constexpr int64_t kRows = 33, kInner = 75, kColumns = 40, kPacked = 64 * 76;
  std::vector<uint16_t> x(kRows * kInner), weight(kPacked), results[2];
  uint32_t state = 1;
  for (std::vector<uint16_t>* values : {&x, &weight}) {
    for (uint16_t& value : *values) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<uint16_t>(0x3f00u | ((state >> 16) & 0x80ffu));  // of magnitude 0.5 to 2
    }
  }
  for (int64_t rows = 1; rows <= kRows; ++rows) {
    for (int i = 0; i < 2; ++i) {
      results[i].assign(static_cast<std::size_t>(rows * kColumns), 0);
      int64_t taken = 0;
      (i ? b : a).linear(nf::DType::kBFloat16,
                         {x.data(), weight.data(), nullptr, nullptr, results[i].data(), rows, kInner, kColumns, kInner,
                          0, kColumns, false},
                         {0, 1, &taken});
    }
    for (std::size_t j = 0; j < results[0].size(); ++j) {
      // The sums differ by float's rounding at most, the results by one step of bfloat16.
      const int distance = static_cast<int16_t>(results[0][j] - results[1][j]);
      if (distance < -1 || distance > 1) return false;
    }
  }
  return true;
}

// What both wide builds use beside the instructions they are named after. __builtin_cpu_supports
// does not know f16c in every compiler.
bool has_fma_and_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_FMA) && (c & bit_F16C);
}

const nf::KernelTable& amx_table() {
  static const nf::KernelTable table = nf::amx::make_table();
  return table;
}

// Whether the processor has tiles, the kernel lets this process use them, and their results are right: code for them
// has been compiled wrongly before.
bool has_amx() {
#if defined(NF_AMX_EMULATED)
  return same_products(amx_table(), nf::avx512_bf16::kTable);
#elif defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  return same_products(amx_table(), nf::avx512_bf16::kTable);
#else
  return false;
#endif
}
#endif

// The instruction sets of this processor, the best one first.
std::vector<const nf::KernelTable*> usable_tables() {
  std::vector<const nf::KernelTable*> tables;
#if defined(NF_X86)
  if (has_fma_and_f16c()) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16")) {
        if (has_amx()) tables.push_back(&amx_table());
        tables.push_back(&nf::avx512_bf16::kTable);
      }
      tables.push_back(&nf::avx512::kTable);
    }
    if (__builtin_cpu_supports("avx2")) tables.push_back(&nf::avx2::kTable);
  }
#endif
  tables.push_back(&nf::generic::kTable);
  return tables;
}

const nf::KernelTable* chosen_table = usable_tables().front();

const nf::KernelTable& table() { return *chosen_table; }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const nf::KernelTable* usable : usable_tables()) names.push_back(usable->isa);
  return names;
}

void use_isa(const std::string& name) {
  for (const nf::KernelTable* usable : usable_tables()) {
    if (name == usable->isa) {
      chosen_table = usable;
      return;
    }
  }
  throw std::invalid_argument("isa is " + name + ", which this processor does not have; see usable_isas()");
}

constexpr int64_t kParallelWork = 1 << 15;  // elements; below this, waking threads costs more than it saves

// Threads that operations run on when no lane is current. Made when the first operation needs it, and never destroyed:
// the system ends its threads with the process.
class SharedPool {
 public:
  std::shared_ptr<nf::Pool> get() {
    const std::lock_guard lock(mutex_);
    if (!pool_) pool_ = std::make_shared<nf::Pool>(num_threads_ - 1);
    return pool_;
  }
  void set_num_threads(int64_t num_threads) {
    if (num_threads < 1) {
      throw std::invalid_argument("num_threads is " + std::to_string(num_threads) + "; expected 1 or more");
    }
    const std::lock_guard lock(mutex_);
    num_threads_ = num_threads;
    pool_.reset();
  }
  int64_t num_threads() {
    const std::lock_guard lock(mutex_);
    return num_threads_;
  }

 private:
  std::mutex mutex_;
  int64_t num_threads_ = 1;
  std::shared_ptr<nf::Pool> pool_;
};

SharedPool& shared_pool() {
  static SharedPool* const pool = new SharedPool;
  return *pool;
}

// The most threads that run a kernel together, shared ones or a lane's.
int64_t max_threads() {
  return std::max<int64_t>(std::thread::hardware_concurrency(), shared_pool().num_threads());
}

// Runs a kernel: on the current lane, in its turn; else now, on the shared threads, or on this one alone when there is
// little to do. `run` may outlive the call and holds what it needs by value.
template <typename Run>
void run_team(int64_t work, Run run) {
  const auto run_alone = [run] {
    int64_t taken = 0;
    run(nf::Team{0, 1, &taken});
  };
  const bool alone = work < kParallelWork;
  if (nf::Lane* lane = nf::current_lane()) {
    if (alone) {
      lane->submit_alone(run_alone);
    } else {
      lane->submit(run);
    }
  } else if (alone || shared_pool().num_threads() == 1) {
    run_alone();
  } else {
    shared_pool().get()->run(run);
  }
}

template <typename Args>
void run(nf::Kernel<Args> kernel, int dtype, const Args& args, int64_t work) {
  run_team(work, [=](const nf::Team& team) { kernel(static_cast<nf::DType>(dtype), args, team); });
}

// Runs what must come before a kernel, such as the check of its indices, which an earlier operation may still have to
// write: on the current lane, in its turn, else now.
template <typename Run>
void run_before(Run run) {
  if (nf::Lane* lane = nf::current_lane()) {
    lane->submit_alone(run);
  } else {
    run();
  }
}

template <typename T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Refuses an index outside [0, end) before any kernel follows it. ValueError in Python.
template <typename Index>
void check_indices(const char* name, const Index* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= end) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " +
                                  std::to_string(values[i]) + "; expected 0 to " +
                                  std::to_string(end - 1));
    }
  }
}

void check_attention(const nf::AttentionArgs& a, int64_t num_queries, int64_t num_pages,
                     int64_t pages_per_row) {
  if (a.first_row(0) != 0 || a.first_row(a.num_requests) != num_queries) {
    throw std::invalid_argument("query_start runs from " + std::to_string(a.first_row(0)) +
                                " to " + std::to_string(a.first_row(a.num_requests)) +
                                "; expected 0 to " + std::to_string(num_queries) +
                                ", the rows of q");
  }
  for (int64_t r = 0; r < a.num_requests; ++r) {
    const int64_t count = a.first_row(r + 1) - a.first_row(r);
    const int64_t seq_len = a.seq_lens[r];
    if (count < 1 || seq_len < count || seq_len > pages_per_row * a.page_size) {
      throw std::invalid_argument(
          "request " + std::to_string(r) + " has " + std::to_string(count) +
          " queries by query_start and " + std::to_string(seq_len) +
          " tokens by seq_lens; expected at least 1 query, no more queries than tokens, and at "
          "most " + std::to_string(pages_per_row * a.page_size) + " tokens, the page_table's width");
    }
    check_indices("page_table", a.page_table + r * a.page_table_stride,
                  (seq_len + a.page_size - 1) / a.page_size, num_pages);
  }
}

void paged_attention(int dtype, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t page_table,
                     uintptr_t query_start, uintptr_t seq_lens, uintptr_t out, uintptr_t lse, int64_t num_requests,
                     int64_t num_queries, int64_t num_pages, int64_t pages_per_row, int64_t num_heads,
                     int64_t num_kv_heads, int64_t head_dim, int64_t page_size, int64_t page_table_stride,
                     int64_t q_stride, int64_t out_stride, float scale, float soft_cap, int64_t window) {
  const nf::AttentionArgs args{
      at<void>(q), at<void>(k_cache), at<void>(v_cache), at<int32_t>(page_table), at<int32_t>(query_start),
      at<int32_t>(seq_lens), at<void>(out), at<float>(lse), num_requests, num_heads, num_kv_heads, head_dim,
      page_size, page_table_stride, q_stride, out_stride, scale, soft_cap, window};
  run_before([=] { check_attention(args, num_queries, num_pages, pages_per_row); });
  run(table().paged_attention, dtype, args, kParallelWork);
}

void merge_attention(int dtype, uintptr_t a, uintptr_t b, uintptr_t lse_a, uintptr_t lse_b, uintptr_t out,
                     uintptr_t lse_out, int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t a_stride,
                     int64_t b_stride, int64_t out_stride) {
  run(table().merge_attention, dtype,
      nf::MergeArgs{at<void>(a), at<void>(b), at<float>(lse_a), at<float>(lse_b), at<void>(out), at<float>(lse_out),
                    num_tokens, num_heads, head_dim, a_stride, b_stride, out_stride},
      num_tokens * num_heads * head_dim);
}

void rope_append(int dtype, uintptr_t qkv, uintptr_t positions, uintptr_t slots, uintptr_t cos_sin,
                 uintptr_t q_norm, uintptr_t k_norm, uintptr_t k_cache, uintptr_t v_cache,
                 uintptr_t out, int64_t num_tokens, int64_t num_positions, int64_t num_pages,
                 int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t page_size,
                 int64_t qkv_stride, int64_t out_stride, float eps) {
  run_before([=] {
    check_indices("positions", at<int64_t>(positions), num_tokens, num_positions);
    check_indices("slots", at<int64_t>(slots), num_tokens, num_pages * page_size);
  });
  run(table().rope_append, dtype,
      nf::RopeAppendArgs{at<void>(qkv), at<int64_t>(positions), at<int64_t>(slots), at<float>(cos_sin),
                         at<void>(q_norm), at<void>(k_norm), at<void>(k_cache), at<void>(v_cache), at<void>(out),
                         num_tokens, num_heads, num_kv_heads, head_dim, page_size, qkv_stride, out_stride, eps},
      num_tokens * qkv_stride);
}

void rms_norm(int dtype, uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int64_t num_rows,
              int64_t width, int64_t x_stride, int64_t residual_stride, int64_t out_stride, float eps) {
  run(table().rms_norm, dtype,
      nf::RmsNormArgs{at<void>(x), at<void>(weight), at<void>(residual), at<void>(out), num_rows, width, x_stride,
                      residual_stride, out_stride, eps},
      num_rows * width);
}

void swiglu(int dtype, uintptr_t gate_up, uintptr_t out, int64_t num_rows, int64_t width,
            int64_t gate_up_stride, int64_t out_stride) {
  run(table().swiglu, dtype,
      nf::SwiGluArgs{at<void>(gate_up), at<void>(out), num_rows, width, gate_up_stride, out_stride}, num_rows * width);
}

void linear(int dtype, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
            int64_t num_rows, int64_t in_features, int64_t out_features, int64_t x_stride, int64_t residual_stride,
            int64_t out_stride, bool float_out) {
  run(table().linear, dtype,
      nf::LinearArgs{at<void>(x), at<void>(weight), at<void>(bias), at<void>(residual), at<void>(out), num_rows,
                     in_features, out_features, x_stride, residual_stride, out_stride, float_out},
      num_rows * in_features * out_features / 8);
}

void gather_rows(int dtype, uintptr_t source, uintptr_t index, uintptr_t out, int64_t num_rows, int64_t width,
                 int64_t source_rows, int64_t source_stride, int64_t out_stride, bool packed,
                 const std::string& name) {
  run_before([=] { check_indices(name.c_str(), at<int64_t>(index), num_rows, source_rows); });
  run(packed ? table().gather_packed_rows : table().gather_rows, dtype,
      nf::GatherArgs{at<void>(source), at<int64_t>(index), at<void>(out), num_rows, width, source_stride, out_stride},
      num_rows * width);
}

void moe_route(int dtype, uintptr_t logits, uintptr_t expert_ids, uintptr_t expert_weights, int64_t num_tokens,
               int64_t num_experts, int64_t experts_per_token, int64_t logits_stride, bool normalize) {
  run(table().moe_route, dtype,
      nf::RouteArgs{at<void>(logits), at<int64_t>(expert_ids), at<float>(expert_weights), num_tokens, num_experts,
                    experts_per_token, logits_stride, normalize},
      num_tokens * num_experts);
}

// What moe_experts keeps in its scratch: rows are the choices (a token and one of its experts), sorted by expert.
struct ExpertScratch {
  int64_t *row_start, *token_of_row, *row_of_choice;
  char *gathered, *gate_up, *inner;
  int64_t bytes;

  ExpertScratch(uintptr_t scratch, int64_t choices, int64_t experts, int64_t hidden, int64_t inner_size,
                int64_t element_bytes) {
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      const int64_t offset = used;
      used += (size + 63) / 64 * 64;
      return at<char>(scratch + static_cast<uintptr_t>(offset));
    };
    row_start = reinterpret_cast<int64_t*>(take((experts + 1) * 8));
    token_of_row = reinterpret_cast<int64_t*>(take(choices * 8));
    row_of_choice = reinterpret_cast<int64_t*>(take(choices * 8));
    gathered = take(choices * hidden * element_bytes);
    gate_up = take(choices * 2 * inner_size * element_bytes);
    inner = take(choices * inner_size * element_bytes);
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

int64_t element_bytes(int dtype) { return static_cast<nf::DType>(dtype) == nf::DType::kFloat32 ? 4 : 2; }

int64_t moe_experts_scratch_bytes(int dtype, int64_t num_tokens, int64_t experts_per_token, int64_t num_experts,
                                  int64_t hidden, int64_t inner) {
  return ExpertScratch(0, num_tokens * experts_per_token, num_experts, hidden, inner, element_bytes(dtype)).bytes;
}

void moe_experts(int dtype, uintptr_t x, uintptr_t expert_ids, uintptr_t expert_weights, uintptr_t gate_up,
                 uintptr_t down, uintptr_t residual, uintptr_t out, uintptr_t scratch, int64_t num_tokens,
                 int64_t experts_per_token, int64_t num_experts, int64_t hidden, int64_t inner, int64_t x_stride,
                 int64_t residual_stride, int64_t out_stride, int64_t gate_up_stride, int64_t down_stride,
                 int64_t first_expert, bool is_part) {
  const int64_t choices = num_tokens * experts_per_token;
  const int64_t* ids = at<int64_t>(expert_ids);
  const ExpertScratch s(scratch, choices, num_experts, hidden, inner, element_bytes(dtype));
  run_before([=] {
    if (!is_part) check_indices("expert_ids", ids, choices, num_experts);
    sort_by_expert(ids, choices, experts_per_token, first_expert, num_experts, s);
  });
  run(table().gather_rows, dtype,
      nf::GatherArgs{at<void>(x), s.token_of_row, s.gathered, choices, hidden, x_stride, hidden}, choices * hidden);
  const auto grouped = [&](void* from, uintptr_t weight, void* to, int64_t in, int64_t features, int64_t stride) {
    run(table().grouped_linear, dtype,
        nf::GroupedLinearArgs{{from, at<void>(weight), nullptr, nullptr, to, choices, in, features, in, 0, features, false},
                              s.row_start, num_experts, stride},
        choices * in * features / 8);
  };
  grouped(s.gathered, gate_up, s.gate_up, hidden, 2 * inner, gate_up_stride);
  run(table().swiglu, dtype, nf::SwiGluArgs{s.gate_up, s.inner, choices, inner, 2 * inner, inner}, choices * inner);
  grouped(s.inner, down, s.gathered, inner, hidden, down_stride);
  run(table().moe_combine, dtype,
      nf::CombineArgs{s.gathered, s.row_of_choice, at<float>(expert_weights), at<void>(residual), at<void>(out),
                      num_tokens, experts_per_token, hidden, residual_stride, out_stride},
      choices * hidden);
}

int64_t sample_scratch_bytes(int64_t vocab_size) { return max_threads() * nf::sample_scratch_bytes(vocab_size); }

void sample(uintptr_t logits, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
            uintptr_t uniform, uintptr_t out, uintptr_t scratch, int64_t num_rows, int64_t vocab_size,
            int64_t logits_stride) {
  const nf::SampleArgs args{at<float>(logits), at<float>(temperature), at<int64_t>(top_k), at<float>(top_p),
                            at<float>(min_p), at<float>(uniform), at<int64_t>(out), at<void>(scratch), num_rows,
                            vocab_size, logits_stride};
  run_team(num_rows * vocab_size, [=](const nf::Team& team) { nf::sample(args, table(), team); });
}

// A lane ends without the GIL: what it still has to run may want it.
template <typename Threads>
std::shared_ptr<nf::Lane> make_lane(Threads threads) {
  return std::shared_ptr<nf::Lane>(new nf::Lane(std::move(threads)), [](nf::Lane* lane) {
    const py::gil_scoped_release release;
    delete lane;
  });
}

// Queues a call of a Python function, which holds the GIL for as long as it runs.
void call_on_lane(nf::Lane& lane, py::function function) {
  const std::shared_ptr<py::function> held(new py::function(std::move(function)), [](py::function* last) {
    const py::gil_scoped_acquire gil;
    delete last;
  });
  lane.submit_alone([held] {
    const py::gil_scoped_acquire gil;
    try {
      (*held)();
    } catch (const py::error_already_set& error) {
      throw std::runtime_error(error.what());  // which is read without the GIL
    }
  });
}

void feed_sampled(uintptr_t token_ids, uintptr_t slots, uintptr_t last_sampled, int64_t num_rows, int64_t num_slots) {
  run_before([=] {
    check_indices("slots", at<int64_t>(slots), num_rows, num_slots);
    for (int64_t i = 0; i < num_rows; ++i) {
      if (at<int64_t>(token_ids)[i] < 0) at<int64_t>(token_ids)[i] = at<int64_t>(last_sampled)[at<int64_t>(slots)[i]];
    }
  });
}

void keep_sampled(uintptr_t sampled, uintptr_t slots, uintptr_t last_sampled, int64_t num_rows, int64_t num_slots) {
  run_before([=] {
    check_indices("slots", at<int64_t>(slots), num_rows, num_slots);
    for (int64_t i = 0; i < num_rows; ++i) at<int64_t>(last_sampled)[at<int64_t>(slots)[i]] = at<int64_t>(sampled)[i];
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of nf_kernels; use them through nf_kernels.ops.";
  m.def("num_threads", [] { return shared_pool().num_threads(); });
  m.def("set_num_threads", [](int64_t n) { shared_pool().set_num_threads(n); },
        py::call_guard<py::gil_scoped_release>());
  m.def("isa", [] { return table().isa; });
  m.def("usable_isas", &usable_isas);
  m.def("use_isa", &use_isa);
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("paged_attention", &paged_attention, release());
  m.def("merge_attention", &merge_attention, release());
  m.def("rope_append", &rope_append, release());
  m.def("rms_norm", &rms_norm, release());
  m.def("swiglu", &swiglu, release());
  m.def("linear", &linear, release());
  m.def("gather_rows", &gather_rows, release());
  m.def("moe_route", &moe_route, release());
  m.def("moe_experts", &moe_experts, release());
  m.def("moe_experts_scratch_bytes", &moe_experts_scratch_bytes);
  m.def("sample", &sample, release());
  m.def("sample_scratch_bytes", &sample_scratch_bytes);
  m.def("feed_sampled", &feed_sampled, release());
  m.def("keep_sampled", &keep_sampled, release());

  py::class_<nf::Event, std::shared_ptr<nf::Event>>(m, "Event")
      .def("done", &nf::Event::done)
      .def("wait", &nf::Event::wait, release())
      .def("failed", &nf::Event::failed)
      .def("time", &nf::Event::time);
  py::class_<nf::Lane, std::shared_ptr<nf::Lane>>(m, "Lane")
      .def(py::init(&make_lane<std::vector<int>>), py::arg("cores"))
      .def_static("of_threads", &make_lane<int64_t>, py::arg("threads"))
      .def("record", &nf::Lane::record)
      .def("wait", &nf::Lane::wait)
      .def("synchronize", &nf::Lane::synchronize, release())
      .def("error", &nf::Lane::error)
      .def("call", &call_on_lane)
      .def_property_readonly("cores", &nf::Lane::cores);
  m.def("set_current_lane", [](nf::Lane* lane) { nf::current_lane() = lane; }, py::arg("lane").none(true));
}

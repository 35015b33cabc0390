#include "instruction_sets.h"

#include <atomic>
#include <cstdint>
#include <stdexcept>

#if defined(NF_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nf {
namespace {

#if defined(NF_X86)
// Whether two tables agree on products of every number of rows that a tile can have, and of an odd inner dimension.
bool same_products(const KernelTable& a, const KernelTable& b) {
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
      (i ? b : a).linear(DType::kBFloat16,
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

const KernelTable& amx_table() {
  static const KernelTable table = amx::make_table();
  return table;
}

// Whether the processor has tiles, the kernel lets this process use them, and their results are right: code for them
// has been compiled wrongly before.
bool has_amx() {
#if defined(NF_AMX_EMULATED)
  return same_products(amx_table(), avx512_bf16::kTable);
#elif defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  return same_products(amx_table(), avx512_bf16::kTable);
#else
  return false;
#endif
}
#endif

// The instruction sets of this processor, the best one first.
std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(NF_X86)
  if (has_fma_and_f16c()) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16")) {
        if (has_amx()) tables.push_back(&amx_table());
        tables.push_back(&avx512_bf16::kTable);
      }
      tables.push_back(&avx512::kTable);
    }
    if (__builtin_cpu_supports("avx2")) tables.push_back(&avx2::kTable);
  }
#endif
  tables.push_back(&generic::kTable);
  return tables;
}

std::atomic<const KernelTable*> chosen_table = usable_tables().front();

}  // namespace

const KernelTable& kernels() { return *chosen_table.load(std::memory_order_relaxed); }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const KernelTable* usable : usable_tables()) names.push_back(usable->isa);
  return names;
}

void use_isa(const std::string& name) {
  for (const KernelTable* usable : usable_tables()) {
    if (name == usable->isa) {
      chosen_table.store(usable, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument("isa is " + name + ", which this processor does not have; see usable_isas()");
}

}  // namespace nf

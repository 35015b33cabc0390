// Matrix products of bfloat16 on AMX; all else is as in avx512_bf16.
#if defined(NF_X86)
#define NF_ISA amx
#define NF_AMX
#include "linear_impl.h"

namespace nf {
namespace amx {
namespace {

void linear_by_dtype(DType dtype, const LinearArgs& args, const Team& team) {
  if (dtype == DType::kBFloat16) return linear<BFloat16>(args, team);
  avx512_bf16::kTable.linear(dtype, args, team);
}

void grouped_linear_by_dtype(DType dtype, const GroupedLinearArgs& args, const Team& team) {
  if (dtype == DType::kBFloat16) return grouped_linear<BFloat16>(args, team);
  avx512_bf16::kTable.grouped_linear(dtype, args, team);
}

}  // namespace

KernelTable make_table() {
  KernelTable table = avx512_bf16::kTable;
  table.isa = "amx";
  table.linear = linear_by_dtype;
  table.grouped_linear = grouped_linear_by_dtype;
  return table;
}

}  // namespace amx
}  // namespace nf
#endif

// Definitions of kernels.h, included once per instruction set with NF_ISA set to its namespace.
// Only plain loops and inline helpers in here: a template of the standard library instantiated with
// wide instructions could be merged by the linker into code that runs on a narrower machine.

#include "attention_impl.h"
#include "kernels.h"
#include "linear_impl.h"
#include "math_impl.h"
#include "moe_impl.h"
#include "rowwise_impl.h"

namespace nf {
namespace NF_ISA {
namespace {

template <typename Args, void (*f32)(const Args&, const Team&), void (*bf16)(const Args&, const Team&),
          void (*f16)(const Args&, const Team&)>
void by_dtype(DType dtype, const Args& args, const Team& team) {
  switch (dtype) {
    case DType::kFloat32: return f32(args, team);
    case DType::kBFloat16: return bf16(args, team);
    case DType::kFloat16: return f16(args, team);
  }
}

void exponentials(const float* logits, int64_t n, float maximum, float temperature, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_nonpositive((logits[i] - maximum) / temperature);
}

float maximum(const float* values, int64_t n) {
  float largest = -__builtin_inff();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

}  // namespace

#define NF_STRING_OF(x) #x
#define NF_STRING(x) NF_STRING_OF(x)
#define NF_KERNEL(name, Args) by_dtype<Args, name<float>, name<BFloat16>, name<Float16>>
extern const KernelTable kTable{
    NF_STRING(NF_ISA),
    NF_KERNEL(paged_attention, AttentionArgs),
    NF_KERNEL(merge_attention, MergeArgs),
    NF_KERNEL(rope_append, RopeAppendArgs),
    NF_KERNEL(rms_norm, RmsNormArgs),
    NF_KERNEL(swiglu, SwiGluArgs),
    NF_KERNEL(linear, LinearArgs),
    NF_KERNEL(grouped_linear, GroupedLinearArgs),
    NF_KERNEL(gather_rows, GatherArgs),
    NF_KERNEL(gather_packed_rows, GatherArgs),
    NF_KERNEL(moe_route, RouteArgs),
    NF_KERNEL(moe_combine, CombineArgs),
    exponentials,
    maximum,
};

}  // namespace NF_ISA
}  // namespace nf

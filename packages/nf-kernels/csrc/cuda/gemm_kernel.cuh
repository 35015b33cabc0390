// A matrix product by CUTLASS: a persistent, warp-specialized kernel for sm_90a whose number of SMs is an argument.
//
// Written for CUTLASS 4.2. Included once per tile and dtype, because such a kernel takes most of a minute and some
// gigabytes to compile.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include <type_traits>

#include "gemm.h"

namespace nf_cuda {

enum class Schedule {
  kPingpong,     // two groups of warps work on a tile each: one multiplies while the other writes its result
  kCooperative,  // two groups of warps share a tile of at least 128 rows
  kStreamK,      // cooperative; tiles that do not fill the SMs are cut along k, and their parts added up in order
};

// One tile for one dtype. kRows are rows of x, kColumns rows of weight. A swapped tile computes the transpose,
// weight · xᵀ, because the tensor cores take no fewer than 64 rows of their first operand: with few rows of x it is
// weight that has them.
template <typename Element, int kRows, int kColumns, int kDepth, int kClusterRows, int kClusterColumns,
          Schedule kSchedule, bool kSwapped>
class Gemm {
  template <int kOfRows, int kOfColumns>
  using Pair = std::conditional_t<kSwapped, cute::Shape<cute::Int<kOfColumns>, cute::Int<kOfRows>>,
                                  cute::Shape<cute::Int<kOfRows>, cute::Int<kOfColumns>>>;
  using TileMN = Pair<kRows, kColumns>;
  using ClusterMN = Pair<kClusterRows, kClusterColumns>;
  using TileShape = decltype(cute::append(TileMN{}, cute::Int<kDepth>{}));
  using ClusterShape = decltype(cute::append(ClusterMN{}, cute::Int<1>{}));
  static constexpr bool kPingpong = kSchedule == Schedule::kPingpong;

  static constexpr int kAlignment = 8;  // elements in 16 bytes, what the tensor memory accelerator moves at least
  using OutLayout = std::conditional_t<kSwapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Fusion = std::conditional_t<kSwapped, cutlass::epilogue::fusion::LinCombPerRowBias<Element, float>,
                                    cutlass::epilogue::fusion::LinCombPerColBias<Element, float>>;
  using EpilogueSchedule = std::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                              cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, OutLayout, kAlignment, Element,
      OutLayout, kAlignment, EpilogueSchedule, Fusion>::CollectiveOp;

  using MainloopSchedule = std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                              cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;

  using Scheduler = std::conditional_t<kSchedule == Schedule::kStreamK, cutlass::gemm::StreamKScheduler,
                                       cutlass::gemm::PersistentScheduler>;
  using Shape = cute::Shape<int, int, int, int>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape, Mainloop, Epilogue, Scheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Device::Arguments;
  using Stride = cute::Stride<int64_t, cute::_1, int64_t>;

  static constexpr int kClusterSize = kClusterRows * kClusterColumns;

  static auto out_stride(int64_t stride) {
    if constexpr (kSwapped) {
      return cute::Stride<cute::_1, int64_t, int64_t>{cute::_1{}, stride, 0};
    } else {
      return Stride{stride, cute::_1{}, 0};
    }
  }

  static Shape shape(int64_t m, int64_t n, int64_t k) {
    return {static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1};
  }

  static Arguments arguments(const nf_cuda_gemm_problem& p) {
    const auto element = [](const void* address) { return static_cast<const Element*>(address); };
    const Stride x_stride{p.x_stride, cute::_1{}, 0}, weight_stride{p.weight_stride, cute::_1{}, 0};
    Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    if constexpr (kSwapped) {
      args.problem_shape = shape(p.n, p.m, p.k);
      args.mainloop = {element(p.weight), weight_stride, element(p.x), x_stride};
    } else {
      args.problem_shape = shape(p.m, p.n, p.k);
      args.mainloop = {element(p.x), x_stride, element(p.weight), weight_stride};
    }
    args.epilogue.thread.alpha = 1.0f;
    args.epilogue.thread.beta = p.residual ? 1.0f : 0.0f;
    args.epilogue.thread.bias_ptr = element(p.bias);
    // Without a residual nothing is read, but a tensor map of something is made.
    args.epilogue.ptr_C = p.residual ? element(p.residual) : element(p.out);
    args.epilogue.dC = out_stride(p.residual ? p.residual_stride : p.out_stride);
    args.epilogue.ptr_D = static_cast<Element*>(p.out);
    args.epilogue.dD = out_stride(p.out_stride);
    // Whole clusters: the grid must be a multiple of them.
    args.hw_info.sm_count = p.sm_count / kClusterSize * kClusterSize;
    return args;
  }

  static bool takes(const nf_cuda_gemm_problem& p) {
    return Device::can_implement(arguments(p)) == cutlass::Status::kSuccess;
  }

  static int64_t workspace_bytes(const nf_cuda_gemm_problem& p) {
    return static_cast<int64_t>(Device::get_workspace_size(arguments(p)));
  }

  static int64_t blocks(const nf_cuda_gemm_problem& p) {
    const Arguments args = arguments(p);
    using TileScheduler = typename Kernel::TileScheduler;
    const auto params = TileScheduler::to_underlying_arguments(args.problem_shape, TileShape{}, ClusterShape{},
                                                               args.hw_info, args.scheduler, nullptr);
    const dim3 grid = TileScheduler::get_grid_shape(params, args.problem_shape, TileShape{}, ClusterShape{},
                                                    args.hw_info, args.scheduler);
    return static_cast<int64_t>(grid.x) * grid.y * grid.z;
  }

  static int run(const nf_cuda_gemm_problem& p, void* workspace, cudaStream_t stream) {
    Device gemm;
    const cutlass::Status status = gemm.run(arguments(p), workspace, stream);
    return status == cutlass::Status::kSuccess ? NF_CUDA_OK : NF_CUDA_NOT_LAUNCHED;
  }

 public:
  static constexpr GemmKernel kKernel{kClusterSize, takes, workspace_bytes, blocks, run};
};

}  // namespace nf_cuda

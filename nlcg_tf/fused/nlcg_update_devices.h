// What the op does otherwise on a CPU than on a GPU.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_DEVICES_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_DEVICES_H_

#include <cstring>
#include <functional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlcg_update.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/denormal.h"
#include "tensorflow/core/util/work_sharder.h"
#if NLCG_CUDA
#include "nlcg_update_cuda.h"
#endif

namespace tensorflow {
namespace nlcg_op {

template <typename T>
struct CpuDevice {
  static absl::Status Copy(OpKernelContext*, void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    return absl::OkStatus();
  }
  // Returns whether the weights were updated, which the CPU knows and a GPU does not without waiting.
  static bool Update(OpKernelContext* ctx, const nlcg::Settings& settings,
                     const std::vector<nlcg::Variable<T>>& variables, const T* given, T* reals,
                     int64_t* counts, const nlcg::Call& call) {
    auto* workers = ctx->device()->tensorflow_cpu_worker_threads();
    int64_t size = 0;
    for (const nlcg::Variable<T>& v : variables) size += v.size;
    const auto parallel_for = [workers, size](int64_t count,
                                              const std::function<void(int64_t, int64_t)>& work) {
      // A quarter of a cycle an element: below about a million elements, as in ResNet-32, waking
      // another thread takes longer than the sweep. Longer sweeps are bound by memory anyway.
      const int64_t cycles_per_chunk = count == 0 ? 1 : size / 4 / count + 1;
      Shard(workers->num_threads, workers->workers, count, cycles_per_chunk,
            [&work](int64_t begin, int64_t end) {
              // TensorFlow's threads flush denormals, the caller's may not: all must do alike.
              port::ScopedFlushDenormal flush;
              work(begin, end);
            });
    };
    return nlcg::UpdateOnCpu<T>(settings, variables, given, reals, counts, parallel_for, call);
  }
  static constexpr bool kKnowsOutcome = true;
};

#if NLCG_CUDA
inline absl::Status GpuStatus(const char* error) {
  return error == nullptr ? absl::OkStatus()
                          : absl::InternalError(absl::StrCat("NlcgUpdate: ", error));
}

template <typename T>
struct GpuDevice {
  static void* Stream(OpKernelContext* ctx) {
    return ctx->eigen_device<Eigen::GpuDevice>().stream();
  }
  static absl::Status Copy(OpKernelContext* ctx, void* to, const void* from, size_t bytes) {
    return GpuStatus(nlcg::CopyOnGpu(to, from, bytes, Stream(ctx)));
  }
  static bool Update(OpKernelContext* ctx, const nlcg::Settings& settings,
                     const std::vector<nlcg::Variable<T>>& variables, const T* given, T* reals,
                     int64_t* counts, const nlcg::Call& call) {
    Tensor scratch;
    const int64_t bytes = nlcg::GpuScratchBytes(variables);
    absl::Status status = ctx->allocate_temp(DT_INT8, TensorShape({bytes}), &scratch);
    if (status.ok()) {
      status = GpuStatus(nlcg::UpdateOnGpu(settings, variables, given, reals, counts,
                                           scratch.data(), Stream(ctx), call));
    }
    if (!status.ok()) ctx->SetStatus(status);
    return false;
  }
  static constexpr bool kKnowsOutcome = false;
};
#endif

}  // namespace nlcg_op
}  // namespace tensorflow

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_DEVICES_H_

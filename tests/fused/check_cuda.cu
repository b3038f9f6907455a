// A C interface to the CUDA kernels for check_cuda.py: no TensorFlow, only nvcc.

#include <cuda_runtime.h>

#include "nlcg_update_cuda.h"

namespace {

// `one_by_one`: a call for each sweep, as workers do of which each has a part of the parameters.
template <typename T>
const char* UpdateByCalls(const nlcg::Settings& settings,
                          const std::vector<nlcg::Variable<T>>& variables, const T* given, T* reals,
                          int64_t* counts, void* scratch, size_t bytes) {
  struct Outputs {
    nlcg::Sums sums;
    nlcg::Stage<T> stage;
  };
  Outputs* outputs;
  if (cudaMalloc(reinterpret_cast<void**>(&outputs), 3 * sizeof(Outputs)) != cudaSuccess) {
    return "out of memory";
  }
  nlcg::Call call;
  const char* error = nullptr;
  for (call.sweep = nlcg::FirstSweep(settings); call.sweep <= nlcg::kSweepStep && !error;
       ++call.sweep) {
    Outputs* const own = outputs + call.sweep;
    call.sums = own->sums.values;
    call.stage = &own->stage;
    cudaMemset(scratch, 0xFF, bytes);  // nothing is left there for the next call
    error = nlcg::UpdateOnGpu(settings, variables, given, reals, counts, scratch, nullptr, call);
    call.totals = call.sums;
    call.stage_before = call.stage;
  }
  cudaFree(outputs);  // waits
  return error;
}

// `fresh`: in memory of its own full of NaN, so that a read before a write shows. Otherwise in memory
// that the calls share, which takes no time; the stream orders them.
template <typename T>
const char* Update(const nlcg::Settings* settings, bool fresh, bool one_by_one, int count, T** w,
                   T** d, T** h, T** g_prev, T** g, T** preconditioned, T* ratios, T* sums,
                   const int64_t* sizes, const double* weight_decays, const T* given, T* reals,
                   int64_t* counts) {
  std::vector<nlcg::Variable<T>> variables(count);
  for (int i = 0; i < count; ++i) {
    variables[i] = {w[i],
                    d[i],
                    nlcg::UsesBfgs(*settings) ? h[i] : nullptr,
                    nlcg::KeepsGradient(*settings) ? g_prev[i] : nullptr,
                    nlcg::KeepsGradient(*settings) ? g_prev[i] : nullptr,
                    g[i],
                    settings->preconditioner == nlcg::kGiven ? preconditioned[i] : nullptr,
                    settings->lars_coefficient > 0 ? ratios + i : nullptr,
                    nlcg::KeepsSums(*settings) ? sums + 4 * i : nullptr,
                    sizes[i],
                    weight_decays[i]};
  }
  static void* shared = nullptr;
  static size_t shared_bytes = 0;
  const size_t bytes = nlcg::GpuScratchBytes(variables);
  void* scratch = shared;
  if (fresh || bytes > shared_bytes) {
    if (cudaMalloc(&scratch, bytes) != cudaSuccess) return "out of memory";
    cudaMemset(scratch, 0xFF, bytes);
  }
  const char* error =
      one_by_one ? UpdateByCalls(*settings, variables, given, reals, counts, scratch, bytes)
                 : nlcg::UpdateOnGpu(*settings, variables, given, reals, counts, scratch, nullptr);
  if (fresh) {
    cudaFree(scratch);  // waits
  } else if (scratch != shared) {
    if (shared != nullptr) cudaFree(shared);
    shared = scratch;
    shared_bytes = bytes;
  }
  return error;
}

}  // namespace

// For the caller, who describes the settings once more.
extern "C" int nlcg_settings_bytes() { return sizeof(nlcg::Settings); }

#define NLCG_EXPORT(T, name)                                                                       \
  extern "C" const char* name(                                                                     \
      const nlcg::Settings* settings, bool fresh, bool one_by_one, int count, T** w, T** d, T** h, \
      T** g_prev, T** g, T** preconditioned, T* ratios, T* sums, const int64_t* sizes,             \
      const double* weight_decays, const T* given, T* reals, int64_t* counts) {                    \
    return Update<T>(settings, fresh, one_by_one, count, w, d, h, g_prev, g, preconditioned,       \
                     ratios, sums, sizes, weight_decays, given, reals, counts);                    \
  }
NLCG_EXPORT(float, nlcg_update_float32)
NLCG_EXPORT(double, nlcg_update_float64)

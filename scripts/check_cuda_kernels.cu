// A C interface to the CUDA kernels for check_cuda_kernels.py: no TensorFlow, only nvcc.

#include <cuda_runtime.h>

#include "nlcg_update_cuda.h"

namespace {

template <typename T>
const char* Update(int count, T** w, T** d, T** h, T** g_prev, T** g, T* ratios,
                   const int64_t* sizes, int preconditioner, int rule, int line_search, double lars,
                   const T* learning_rate, const T* loss, T* reals, int64_t* counts, void* stream) {
  nlcg::Settings settings = {};
  settings.preconditioner = preconditioner;
  settings.rule = rule;
  settings.line_search = line_search;
  settings.epsilon = 1e-8;
  settings.lars_coefficient = lars;
  settings.decrease_threshold = 0.02;
  settings.increase_threshold = 0.01;
  settings.decrease_factor = 0.975;
  settings.increase_factor = 1.025;
  settings.minimum_scale = 1e-4;
  std::vector<nlcg::Variable<T>> variables(count);
  for (int i = 0; i < count; ++i) {
    variables[i] = {w[i],      d[i], preconditioner ? h[i] : nullptr, g_prev[i], g_prev[i], g[i],
                    lars > 0 ? ratios + i : nullptr, sizes[i], 0.0};
  }
  // The same scratch memory for all calls: the stream orders them.
  static void* scratch = nullptr;
  static size_t scratch_bytes = 0;
  const size_t bytes = nlcg::GpuScratchBytes(variables);
  if (bytes > scratch_bytes) {
    cudaFree(scratch);
    if (cudaMalloc(&scratch, bytes) != cudaSuccess) return "out of memory";
    scratch_bytes = bytes;
  }
  return nlcg::UpdateOnGpu(settings, variables, learning_rate, loss, reals, counts, scratch, stream);
}

}  // namespace

#define NLCG_EXPORT(T, name)                                                                        \
  extern "C" const char* name(int count, T** w, T** d, T** h, T** g_prev, T** g, T* ratios,         \
                              const int64_t* sizes, int preconditioner, int rule, int line_search,  \
                              double lars, const T* learning_rate, const T* loss, T* reals,         \
                              int64_t* counts, void* stream) {                                      \
    return Update<T>(count, w, d, h, g_prev, g, ratios, sizes, preconditioner, rule, line_search,   \
                     lars, learning_rate, loss, reals, counts, stream);                             \
  }
NLCG_EXPORT(float, nlcg_update_float32)
NLCG_EXPORT(double, nlcg_update_float64)

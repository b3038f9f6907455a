// The GPU side of the NLCG update, for a host compiler: no CUDA and no TensorFlow headers.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_CUDA_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_CUDA_H_

#include <cstddef>
#include <vector>

#include "nlcg_update.h"

namespace nlcg {

// Bytes of device memory that UpdateOnGpu needs for its table and partial sums: about one for 250
// elements.
template <typename T>
size_t GpuScratchBytes(const std::vector<Variable<T>>& variables);

// Enqueues one update, or a sweep of one, on `stream` (a cudaStream_t) and returns at once. All
// pointers, also those in `variables` and `call`, are device pointers; `g_prev_out` is never null where
// the gradient is kept. Returns null, or CUDA's description of the error that kept it from being enqueued.
template <typename T>
const char* UpdateOnGpu(const Settings& settings, const std::vector<Variable<T>>& variables,
                        const T* given, T* reals, int64_t* counts, void* scratch, void* stream,
                        const Call& call = {});

// Enqueues a copy on the device.
const char* CopyOnGpu(void* to, const void* from, size_t bytes, void* stream);

}  // namespace nlcg

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_CUDA_H_

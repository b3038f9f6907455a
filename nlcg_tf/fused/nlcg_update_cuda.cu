// The CUDA kernels: a block for each chunk of the variables, a table of the variables on the device,
// partial sums in fixed order. No TensorFlow here, and no wait for the device: the scalars stay there.
//
// Launches for n variables: ceil(n / 48) for the table, then 6, or 8 with LARS scaling.

#include <cuda_runtime.h>

#include <algorithm>

#include "nlcg_update_cuda.h"

namespace nlcg {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;
constexpr int kSumThreads = 512;

template <typename T>
struct Entry {
  Variable<T> v;
  int64_t first_chunk;
};

// What fits into the 4 KiB of a kernel's arguments: so the table needs no copy from host memory.
constexpr int kEntries = 48;
template <typename T>
struct Entries {
  Entry<T> entry[kEntries];
};

static_assert(sizeof(Entries<double>) + 16 <= 4096, "more than a kernel's arguments may hold");

struct Sums {
  double a, b, c, d;
};

// The device memory of one update.
template <typename T>
struct Scratch {
  Entry<T>* table;
  Sums* sums;  // one for each chunk
  Stage<T>* stage;
  int count;
  int64_t chunks;
};

inline int64_t ChunkCount(int64_t size) { return (size + kChunk - 1) / kChunk; }

inline size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

template <typename T>
__global__ void WriteTable(Entries<T> entries, int first, int count, Entry<T>* table) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) table[first + i] = entries.entry[i];
}

// Adds up one value of each thread; thread 0 gets the sum. Always in the same order.
template <int kSize>
__device__ double BlockSum(double value, double* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kSize / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

template <int kSize>
__device__ Sums BlockSums(Sums mine, double* shared) {
  Sums total;
  total.a = BlockSum<kSize>(mine.a, shared);
  total.b = BlockSum<kSize>(mine.b, shared);
  total.c = BlockSum<kSize>(mine.c, shared);
  total.d = BlockSum<kSize>(mine.d, shared);
  return total;
}

// The last variable that begins at or before this chunk and has elements.
template <typename T>
__device__ int FindVariable(const Entry<T>* table, int count, int64_t chunk) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

enum Sweep { kSweepCurvature, kSweepPlain, kSweepHessian, kSweepStep, kSweepLars };

template <typename T, int kSweep>
__global__ void __launch_bounds__(kThreads)
    SweepKernel(Settings settings, Scratch<T> scratch, const T* reals) {
  __shared__ double shared[kThreads];
  if (kSweep != kSweepCurvature && kSweep != kSweepPlain && scratch.stage->skip) return;
  const int64_t chunk = blockIdx.x;
  const Entry<T> entry = scratch.table[FindVariable(scratch.table, scratch.count, chunk)];
  const Variable<T>& v = entry.v;
  const int64_t begin = (chunk - entry.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < v.size ? begin + kChunk : v.size;
  const T epsilon = T(settings.epsilon);
  const T ratio = v.trust_ratio != nullptr ? *v.trust_ratio : T(1);
  const bool middle = settings.rule == kPolakRibiere;
  T a = 0, b = 0, c = 0, d = 0;

  if (kSweep == kSweepCurvature) {
    const T step = reals[kStepSize] * ratio;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const T g = v.g[i], g_prev = v.g_prev[i], h = v.h[i], s = step * v.d[i];
      a += g - g;
      b += (g - g_prev) * s;
      c += s * (h * s);
      if (middle) d += g * (g_prev / (h + epsilon));
    }
  } else if (kSweep == kSweepPlain) {
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const T g = v.g[i];
      a += g - g;
      b += g * (g / (T(1) + epsilon));
      if (middle) d += g * (v.g_prev[i] / (T(1) + epsilon));
    }
  } else if (kSweep == kSweepHessian) {
    const Stage<T>& stage = *scratch.stage;
    const T step = stage.step_prev * ratio;
    const bool accepted = stage.accepted;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const T g = v.g[i];
      T h = v.h[i];
      if (accepted) {
        h = HessianDiagonal(h, step * v.d[i], g - v.g_prev[i], stage.inv_shs, stage.inv_ys);
        v.h[i] = h;
      }
      a += g * (g / (h + epsilon));
    }
  } else if (kSweep == kSweepStep) {
    const Stage<T>& stage = *scratch.stage;
    const T decay_rate = T(v.weight_decay) * stage.learning_rate;
    const bool lars = settings.lars_coefficient > 0;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const T g = v.g[i], w = v.w[i], h = settings.preconditioner ? v.h[i] : T(1);
      const T direction = Direction(g, h, v.d[i], epsilon, stage.beta);
      v.d[i] = direction;
      v.g_prev_out[i] = g;
      if (lars) {
        d += w * w;
      } else {
        v.w[i] = Weight(w, direction, decay_rate, stage.alpha);
      }
      a += g * direction;
      b += g * g;
      c += direction * direction;
    }
  } else {
    const Stage<T>& stage = *scratch.stage;
    const T decay_rate = T(v.weight_decay) * stage.learning_rate;
    const T step = stage.alpha * ratio;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      v.w[i] = Weight(v.w[i], v.d[i], decay_rate, step);
    }
    return;
  }
  const Sums total = BlockSums<kThreads>({double(a), double(b), double(c), double(d)}, shared);
  if (threadIdx.x == 0) scratch.sums[chunk] = total;
}

__device__ Sums SumChunks(const Sums* sums, int64_t first, int64_t last, double* shared) {
  Sums mine = {0, 0, 0, 0};
  for (int64_t i = first + threadIdx.x; i < last; i += kSumThreads) {
    mine.a += sums[i].a;
    mine.b += sums[i].b;
    mine.c += sums[i].c;
    mine.d += sums[i].d;
  }
  return BlockSums<kSumThreads>(mine, shared);
}

// One block: adds up the chunks of a sweep and does the scalar work that follows it.
template <typename T, int kSweep>
__global__ void __launch_bounds__(kSumThreads)
    FinishKernel(Settings settings, Scratch<T> scratch, int real_count, const T* learning_rate,
                 const T* loss, T* reals, int64_t* counts) {
  __shared__ double shared[kSumThreads];
  const Sums total = SumChunks(scratch.sums, 0, scratch.chunks, shared);
  if (threadIdx.x != 0) return;
  Stage<T>* stage = scratch.stage;
  if (kSweep == kSweepCurvature || kSweep == kSweepPlain) {
    const bool plain = kSweep == kSweepPlain;
    Begin(settings, reals, counts, *learning_rate, *loss, stage);
    FinishCurvature(settings, total.a, plain ? 0 : total.b, plain ? 0 : total.c, total.d, stage);
    if (plain) FinishDirection(settings, reals, total.b, stage);
  } else if (kSweep == kSweepHessian) {
    if (!stage->skip) FinishDirection(settings, reals, total.a, stage);
  } else {
    FinishStep(settings, real_count, total.a, total.b, total.c, stage, reals, counts);
  }
}

// A block for each variable: its LARS factor.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    TrustRatioKernel(Settings settings, Scratch<T> scratch) {
  __shared__ double shared[kSumThreads];
  if (scratch.stage->skip) return;
  const Entry<T>& entry = scratch.table[blockIdx.x];
  const int64_t chunks = (entry.v.size + kChunk - 1) / kChunk;
  const Sums total =
      SumChunks(scratch.sums, entry.first_chunk, entry.first_chunk + chunks, shared);
  if (threadIdx.x == 0) *entry.v.trust_ratio = TrustRatio<T>(settings, total.d, total.c);
}

const char* Describe(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

template <typename T>
size_t GpuScratchBytes(const std::vector<Variable<T>>& variables) {
  int64_t chunks = 0;
  for (const Variable<T>& v : variables) chunks += ChunkCount(v.size);
  return Aligned(sizeof(Stage<T>)) + Aligned(variables.size() * sizeof(Entry<T>)) +
         chunks * sizeof(Sums);
}

template <typename T>
const char* UpdateOnGpu(const Settings& settings, const std::vector<Variable<T>>& variables,
                        const T* learning_rate, const T* loss, T* reals, int64_t* counts,
                        void* scratch_memory, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  char* memory = static_cast<char*>(scratch_memory);
  Scratch<T> scratch;
  scratch.stage = reinterpret_cast<Stage<T>*>(memory);
  memory += Aligned(sizeof(Stage<T>));
  scratch.table = reinterpret_cast<Entry<T>*>(memory);
  memory += Aligned(variables.size() * sizeof(Entry<T>));
  scratch.sums = reinterpret_cast<Sums*>(memory);
  scratch.chunks = 0;

  // Variables without elements have no chunk, and would only confuse the search.
  scratch.count = 0;
  Entries<T> entries;
  int filled = 0;
  const auto flush = [&] {
    if (filled == 0) return;
    WriteTable<T><<<1, 64, 0, stream>>>(entries, scratch.count - filled, filled, scratch.table);
    filled = 0;
  };
  for (const Variable<T>& v : variables) {
    if (v.size == 0) continue;
    entries.entry[filled++] = {v, scratch.chunks};
    scratch.count += 1;
    scratch.chunks += ChunkCount(v.size);
    if (filled == kEntries) flush();
  }
  flush();
  if (scratch.chunks > 2147483647) return "too many elements for one grid";

  const int blocks = static_cast<int>(scratch.chunks), real_count = RealCount(settings);
#define NLCG_SWEEP(kind)                                                                \
  if (blocks > 0) SweepKernel<T, kind><<<blocks, kThreads, 0, stream>>>(settings, scratch, reals)
#define NLCG_FINISH(kind)                                                                    \
  FinishKernel<T, kind><<<1, kSumThreads, 0, stream>>>(settings, scratch, real_count, \
                                                       learning_rate, loss, reals, counts)
  if (settings.preconditioner) {
    NLCG_SWEEP(kSweepCurvature);
    NLCG_FINISH(kSweepCurvature);
    NLCG_SWEEP(kSweepHessian);
    NLCG_FINISH(kSweepHessian);
  } else {
    NLCG_SWEEP(kSweepPlain);
    NLCG_FINISH(kSweepPlain);
  }
  NLCG_SWEEP(kSweepStep);
  if (settings.lars_coefficient > 0 && blocks > 0) {
    TrustRatioKernel<T><<<scratch.count, kSumThreads, 0, stream>>>(settings, scratch);
    NLCG_SWEEP(kSweepLars);
  }
  NLCG_FINISH(kSweepStep);
#undef NLCG_SWEEP
#undef NLCG_FINISH
  return Describe(cudaGetLastError());
}

const char* CopyOnGpu(void* to, const void* from, size_t bytes, void* stream) {
  return Describe(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                                  static_cast<cudaStream_t>(stream)));
}

template size_t GpuScratchBytes<float>(const std::vector<Variable<float>>&);
template size_t GpuScratchBytes<double>(const std::vector<Variable<double>>&);
template const char* UpdateOnGpu<float>(const Settings&, const std::vector<Variable<float>>&,
                                        const float*, const float*, float*, int64_t*, void*, void*);
template const char* UpdateOnGpu<double>(const Settings&, const std::vector<Variable<double>>&,
                                         const double*, const double*, double*, int64_t*, void*,
                                         void*);

}  // namespace nlcg

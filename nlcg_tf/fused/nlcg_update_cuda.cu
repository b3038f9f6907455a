// The CUDA kernels: a block for each chunk of the variables, a table of the variables on the device,
// partial sums in fixed order. No TensorFlow here, and no wait for the device: the scalars stay there.
//
// Launches for n variables: ceil(n / 42) for the table, then 4, or 6 with BFGS; one more with LARS
// scaling. For one sweep of an update: the table, one if there were others before, and 2.

#include <cuda_runtime.h>

#include <algorithm>

#include "nlcg_update_cuda.h"
#include "nlcg_update_stages.h"
#include "nlcg_update_sweeps.h"

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
constexpr int kEntries = 42;
template <typename T>
struct Entries {
  Entry<T> entry[kEntries];
};

static_assert(sizeof(Entries<double>) + 16 <= 4096, "more than a kernel's arguments may hold");

// The device memory of one update.
template <typename T>
struct Scratch {
  Entry<T>* table;
  Sums* sums;  // one for each chunk
  Stage<T>* stage;
  int count;
  int64_t chunks;
};

NLCG_HOST_DEVICE int64_t ChunkCount(int64_t size) { return (size + kChunk - 1) / kChunk; }

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
__device__ Sums BlockSums(const Sums& mine, double* shared) {
  Sums total;
  for (int i = 0; i < kSums; ++i) total.values[i] = BlockSum<kSize>(mine.values[i], shared);
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

// A thread takes one element at a time.
template <typename T>
struct Lanes {
  using V = T;
  static constexpr int64_t kCount = 1;
  NLCG_HOST_DEVICE static T Load(const T* p, int64_t) { return *p; }
  NLCG_HOST_DEVICE static void Store(T* p, T x, int64_t) { *p = x; }
  NLCG_HOST_DEVICE static void Stream(T* p, T x) { *p = x; }
  NLCG_HOST_DEVICE static double Sum(T x) { return x; }
  struct ExactSum {
    double sum = 0;
    template <typename... X>
    NLCG_HOST_DEVICE void Add(X... x) {
      sum += (... * double(x));
    }
    NLCG_HOST_DEVICE double Result() const { return sum; }
  };
  template <typename Body>
  NLCG_HOST_DEVICE static void ForEach(int64_t begin, int64_t end, Body& body) {
#pragma unroll 4
    for (int64_t i = begin; i < end; i += kThreads) body(i, 1);
  }
};

template <typename T, int kSweep, int kPreconditioner>
__global__ void __launch_bounds__(kThreads)
    SweepKernel(Settings settings, Scratch<T> scratch, const T* reals) {
  __shared__ double shared[kThreads];
  // The first sweep comes before anything is known of this update.
  if (kSweep != FirstSweep(settings) && scratch.stage->skip) return;
  const int64_t chunk = blockIdx.x;
  const Entry<T> entry = scratch.table[FindVariable(scratch.table, scratch.count, chunk)];
  const int64_t begin = (chunk - entry.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < entry.v.size ? begin + kChunk : entry.v.size;
  const Sums sums = RunSweep<T, kPreconditioner>(Sweep(kSweep), settings, *scratch.stage,
                                                 Previous<T>(settings, reals), entry.v,
                                                 begin + threadIdx.x, end);
  if (kSweep == kSweepLars) return;
  const Sums total = BlockSums<kThreads>(sums, shared);
  if (threadIdx.x == 0) scratch.sums[chunk] = total;
}

__device__ Sums SumChunks(const Sums* sums, int64_t first, int64_t last, double* shared) {
  Sums mine = {};
  for (int64_t i = first + threadIdx.x; i < last; i += kSumThreads) {
    for (int j = 0; j < kSums; ++j) mine.values[j] += sums[i].values[j];
  }
  return BlockSums<kSumThreads>(mine, shared);
}

// The scalars of an update; pointers to the device.
template <typename T>
struct Scalars {
  const T* given;
  T* reals;
  int64_t* counts;
};

// Goes on where the call before ended: with the scalar work that follows its sweep.
template <typename T>
__global__ void ResumeKernel(Settings settings, Call call, Scalars<T> scalars, Stage<T>* stage) {
  memcpy(stage, call.stage_before, sizeof(*stage));
  Sums totals;
  for (int i = 0; i < kSums; ++i) totals.values[i] = call.totals[i];
  Finish(settings, call.sweep - 1, scalars.given, totals, stage, scalars.reals, scalars.counts);
}

// Block 0 adds up the chunks of a sweep and does the scalar work that follows it. After sweep 3 there
// is a block for each variable besides: its LARS factor, and its sums for the next update.
template <typename T, int kSweep>
__global__ void __launch_bounds__(kSumThreads)
    FinishKernel(Settings settings, Call call, Scratch<T> scratch, Scalars<T> scalars) {
  __shared__ double shared[kSumThreads];
  Stage<T>* stage = scratch.stage;
  if (blockIdx.x > 0) {
    if (stage->skip) return;
    const Entry<T>& entry = scratch.table[blockIdx.x - 1];
    const int64_t end = entry.first_chunk + ChunkCount(entry.v.size);
    const Sums own = SumChunks(scratch.sums, entry.first_chunk, end, shared);
    if (threadIdx.x == 0) FinishVariable(settings, own, entry.v);
    return;
  }
  const Sums total = SumChunks(scratch.sums, 0, scratch.chunks, shared);
  if (threadIdx.x != 0) return;
  if (kSweep == FirstSweep(settings)) Begin(scalars.reals, scalars.counts, scalars.given, stage);
  if (kSweep == call.sweep) {
    // A sweep that was skipped left nothing to add up.
    for (int i = 0; i < kSums; ++i) call.sums[i] = stage->skip ? 0 : total.values[i];
  }
  if (kSweep == call.sweep && kSweep != kSweepStep) {
    memcpy(call.stage, stage, sizeof(*stage));
    return;
  }
  Finish(settings, kSweep, scalars.given, total, stage, scalars.reals, scalars.counts);
}

// All launches of a call but those that write the table.
template <typename T, int kPreconditioner>
void Launch(const Settings& settings, const Call& call, const Scratch<T>& scratch,
            const Scalars<T>& scalars, cudaStream_t stream) {
  const int blocks = static_cast<int>(scratch.chunks);
  const bool keeps = settings.lars_coefficient > 0 || KeepsSums(settings);
  const auto has = [&call](int kind) { return call.sweep == kAllSweeps || call.sweep == kind; };
#define NLCG_SWEEP(kind)                                                     \
  if (blocks > 0) {                                                          \
    SweepKernel<T, kind, kPreconditioner>                                    \
        <<<blocks, kThreads, 0, stream>>>(settings, scratch, scalars.reals); \
  }
#define NLCG_FINISH(kind, extra_blocks) \
  FinishKernel<T, kind>                 \
      <<<1 + (extra_blocks), kSumThreads, 0, stream>>>(settings, call, scratch, scalars)
  if (call.totals != nullptr) {
    ResumeKernel<T><<<1, 1, 0, stream>>>(settings, call, scalars, scratch.stage);
  }
  if (kPreconditioner == kBfgs && has(kSweepCurvature)) {
    NLCG_SWEEP(kSweepCurvature);
    NLCG_FINISH(kSweepCurvature, 0);
  }
  if (has(kSweepDirection)) {
    NLCG_SWEEP(kSweepDirection);
    NLCG_FINISH(kSweepDirection, 0);
  }
  if (has(kSweepStep)) {
    NLCG_SWEEP(kSweepStep);
    NLCG_FINISH(kSweepStep, keeps ? scratch.count : 0);
    if (settings.lars_coefficient > 0) NLCG_SWEEP(kSweepLars);
  }
#undef NLCG_SWEEP
#undef NLCG_FINISH
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
                        const T* given, T* reals, int64_t* counts, void* scratch_memory,
                        void* stream_pointer, const Call& call) {
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

  const auto launch = UsesBfgs(settings)                  ? Launch<T, kBfgs>
                      : settings.preconditioner == kGiven ? Launch<T, kGiven>
                                                          : Launch<T, kIdentity>;
  launch(settings, call, scratch, {given, reals, counts}, stream);
  return Describe(cudaGetLastError());
}

const char* CopyOnGpu(void* to, const void* from, size_t bytes, void* stream) {
  return Describe(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                                  static_cast<cudaStream_t>(stream)));
}

template size_t GpuScratchBytes<float>(const std::vector<Variable<float>>&);
template size_t GpuScratchBytes<double>(const std::vector<Variable<double>>&);
template const char* UpdateOnGpu<float>(const Settings&, const std::vector<Variable<float>>&,
                                        const float*, float*, int64_t*, void*, void*, const Call&);
template const char* UpdateOnGpu<double>(const Settings&, const std::vector<Variable<double>>&,
                                         const double*, double*, int64_t*, void*, void*,
                                         const Call&);

}  // namespace nlcg

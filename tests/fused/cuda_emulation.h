// Stands in for <cuda_runtime.h>, so that g++ builds the CUDA kernels for the CPU: to find mistakes in
// their logic where there is no GPU. cuda_problem.py rewrites their launches.
//
// The threads of a block are fibers: one runs at a time, from barrier to barrier. Their order is drawn
// anew for each stretch, that of the blocks for each launch: where a barrier is missing, or the result
// depends on an order that CUDA does not promise, numbers come out wrong or differ between runs.

#ifndef NLCG_TF_TESTS_FUSED_CUDA_EMULATION_H_
#define NLCG_TF_TESTS_FUSED_CUDA_EMULATION_H_

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks run one after another
#define __syncthreads() emulation::Wait(__LINE__)

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
using cudaStream_t = struct CUstream_st*;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulation {

constexpr int kDone = 0;

struct Fiber {
  jmp_buf context;
  int place = kDone;  // or the line of the barrier where the fiber waits
  std::vector<char> stack = std::vector<char>(1 << 16);
};

inline std::deque<Fiber> fibers;  // kept: to make one is slow
inline Fiber* running;
inline jmp_buf scheduler;
inline ucontext_t creator;
inline std::function<void()> kernel;
inline std::minstd_rand random_order;
inline cudaError_t last_error = cudaSuccess;
inline std::map<void*, size_t> memory;

inline void Fail(const char* message) {
  std::fprintf(stderr, "error: %s\n", message);
  std::abort();
}

// Jumps: swapcontext also asks the system for the signal mask, and there are millions of switches.
__attribute__((noinline)) inline void Switch(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

inline void Wait(int place) {  // until all threads of the block wait, or are done
  running->place = place;
  Switch(running->context, scheduler);
}

inline void RunFiber() {
  if (_setjmp(running->context) == 0) setcontext(&creator);
  for (;;) {
    kernel();
    Wait(kDone);
  }
}

inline void MakeFiber() {
  running = &fibers.emplace_back();
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = running->stack.data();
  context.uc_stack.ss_size = running->stack.size();
  makecontext(&context, RunFiber, 0);
  swapcontext(&creator, &context);
}

inline std::vector<unsigned> AnyOrder(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  return order;
}

inline void RunBlock() {
  do {
    for (unsigned thread : AnyOrder(blockDim.x)) {
      threadIdx.x = thread;
      running = &fibers[thread];
      Switch(scheduler, running->context);
    }
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
      if (fibers[thread].place != fibers[0].place) Fail("the threads of a block part at a barrier");
    }
  } while (fibers[0].place != kDone);
}

extern "C" {
__attribute__((used)) inline int emulation_launches;
}

// What kernel<<<grid, block, shared, stream>>>(arguments) becomes: Launch(...)(arguments).
template <typename... P>
auto Launch(int64_t grid, int64_t block, size_t, cudaStream_t, void (*function)(P...)) {
  static_assert((sizeof(P) + ...) <= 4096, "more than a kernel's arguments may hold");
  return [=](P... arguments) {
    emulation_launches += 1;
    if (grid < 1 || grid > 2147483647 || block < 1 || block > 1024) {
      last_error = cudaErrorInvalidConfiguration;
      return;
    }
    blockDim.x = block;
    while (fibers.size() < blockDim.x) MakeFiber();
    kernel = [&] { function(arguments...); };
    for (unsigned index : AnyOrder(grid)) {
      blockIdx.x = index;
      RunBlock();
    }
  };
}

}  // namespace emulation

// Fresh memory reads as NaN. Behind it lies a margin whose bytes must stay.
constexpr size_t kMargin = 256;

inline cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = std::malloc(bytes + kMargin);
  std::memset(*pointer, 0xFF, bytes + kMargin);
  emulation::memory[*pointer] = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaFree(void* pointer) {
  const char* margin = static_cast<char*>(pointer) + emulation::memory.at(pointer);
  if (std::count(margin, margin + kMargin, '\xFF') != kMargin) {
    emulation::Fail("a kernel wrote beyond its memory");
  }
  emulation::memory.erase(pointer);
  std::free(pointer);
  return cudaSuccess;
}

inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }

#endif  // NLCG_TF_TESTS_FUSED_CUDA_EMULATION_H_

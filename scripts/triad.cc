// The machine's memory bandwidth: a[i] = b[i] + s c[i] (STREAM's triad) with a number of threads.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t size, int threads) {
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([=] {
      for (int64_t i = size * t / threads, end = size * (t + 1) / threads; i < end; ++i) {
        a[i] = b[i] + s * c[i];
      }
    });
  }
  for (auto& worker : workers) worker.join();
}

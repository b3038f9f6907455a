// The machine's memory bandwidth with a number of threads: STREAM's triad.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t size,
                      int threads) {
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([=] {
      const int64_t end = size * (t + 1) / threads;
      for (int64_t i = size * t / threads; i < end; ++i) a[i] = b[i] + s * c[i];
    });
  }
  for (auto& worker : workers) worker.join();
}

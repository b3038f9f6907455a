// The machine's memory bandwidth with a number of threads: STREAM's triad, and reading alone.
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace {

void OnThreads(int64_t size, int threads, const std::function<void(int, int64_t, int64_t)>& work) {
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back(work, t, size * t / threads, size * (t + 1) / threads);
  }
  for (auto& worker : workers) worker.join();
}

}  // namespace

extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t size,
                      int threads) {
  OnThreads(size, threads, [=](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) a[i] = b[i] + s * c[i];
  });
}

// The maximum of all elements, which the compiler can neither drop nor may not vectorise.
extern "C" float read_all(const float* a, const float* b, const float* c, int64_t size,
                          int threads) {
  std::vector<float> found(threads);
  OnThreads(size, threads, [=, &found](int t, int64_t begin, int64_t end) {
    float most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float ab = a[i] > b[i] ? a[i] : b[i], abc = ab > c[i] ? ab : c[i];
      most = most > abc ? most : abc;
    }
    found[t] = most;
  });
  float most = 0;
  for (float x : found) most = most > x ? most : x;
  return most;
}

// The CPU kernel without TensorFlow, against a plain double-precision loop; for sanitize.sh.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "nlcg_update.h"
#include "reference.h"

using nlcg::Settings;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// Starting a thread under ThreadSanitizer takes milliseconds, and one update shows a race as well as
// eight do.
#ifdef __SANITIZE_THREAD__
constexpr int kUpdates = 2;
#else
constexpr int kUpdates = 8;
#endif

nlcg::ParallelFor Threads(int threads) {
  return [threads](int64_t count, const std::function<void(int64_t, int64_t)>& work) {
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([=] { work(count * t / threads, count * (t + 1) / threads); });
    }
    for (auto& worker : workers) worker.join();
  };
}

// Gradients of a bowl at `w`, with noise.
template <typename T>
void SetGradients(const std::vector<std::vector<T>>& w, Buffers<T>* b) {
  for (size_t v = 0; v < w.size(); ++v) {
    for (size_t j = 0; j < w[v].size(); ++j) {
      b->g[v][j] = T(w[v][j] * (1 + v) + 0.1 * Random());
      b->preconditioned[v][j] = b->g[v][j] * T(0.2 + j % 3);
    }
  }
}

// `adopt`: the caller makes g the next g_prev, as the op does with a gradient that nobody else holds.
template <typename T>
void UpdateOnThreads(const Settings& settings, const std::vector<T>& given, int threads, bool adopt,
                     Buffers<T>* b) {
  CHECK(nlcg::UpdateOnCpu<T>(settings, b->Variables(settings, adopt), given.data(), b->reals.data(),
                             b->counts.data(), Threads(threads)));
  if (!adopt || !nlcg::KeepsGradient(settings)) return;
  for (size_t v = 0; v < b->g.size(); ++v) {
    std::copy(b->g[v].begin() + b->offset, b->g[v].end(), b->g_prev[v].begin() + b->offset);
  }
}

// The same by two workers of which each has half of each variable, a sweep at a time.
template <typename T>
void UpdateInHalves(const Settings& settings, const std::vector<T>& given, Buffers<T>* b) {
  std::vector<nlcg::Variable<T>> halves[2];
  for (nlcg::Variable<T> v : b->Variables(settings, false)) {
    v.curvature_sums = nullptr;
    nlcg::Variable<T> rest = v;
    v.size /= 2;
    for (T** x : {&rest.w, &rest.d, &rest.h, &rest.g_prev_out}) *x += *x != nullptr ? v.size : 0;
    for (const T** x : {&rest.g, &rest.preconditioned, &rest.g_prev})
      *x += *x != nullptr ? v.size : 0;
    rest.size -= v.size;
    halves[0].push_back(v);
    halves[1].push_back(rest);
  }
  auto reals = b->reals;
  auto counts = b->counts;
  nlcg::Sums totals[3] = {}, sums = {};
  nlcg::Stage<T> stages[2][3];
  nlcg::Call call;
  call.sums = sums.values;
  for (call.sweep = nlcg::FirstSweep(settings); call.sweep <= nlcg::kSweepStep; ++call.sweep) {
    for (int i = 0; i < 2; ++i) {
      call.stage = &stages[i][call.sweep];
      if (call.totals != nullptr) call.stage_before = &stages[i][call.sweep - 1];
      const bool done = nlcg::UpdateOnCpu<T>(
          settings, halves[i], given.data(), i == 0 ? b->reals.data() : reals.data(),
          i == 0 ? b->counts.data() : counts.data(), Threads(2), call);
      CHECK(done == (call.sweep == nlcg::kSweepStep));
      for (int j = 0; j < nlcg::kSums; ++j) totals[call.sweep].values[j] += sums.values[j];
    }
    call.totals = totals[call.sweep].values;
  }
  // They agree in all but the cosine, which each can tell of its half only.
  reals[nlcg::kCosine] = b->reals[nlcg::kCosine];
  CHECK(reals == b->reals && counts == b->counts);
}

template <typename T>
void CheckSameBits(const Buffers<T>& a, const Buffers<T>& b) {
  CHECK(a.All() == b.All());
  CHECK(std::memcmp(a.sums.data(), b.sums.data(), a.sums.size() * sizeof(T)) == 0);
}

// All but the scalars, to rounding.
template <typename T>
void CheckAgreement(const Buffers<T>& actual, const Buffers<T>& expected) {
  const double bound = sizeof(T) == 4 ? 2e-4 : 1e-11;
  const std::vector<T> a = actual.All(), e = expected.All();
  double difference = 0, norm = 0;
  for (size_t i = expected.reals.size(); i < a.size(); ++i) {
    difference += (a[i] - e[i]) * (a[i] - e[i]);
    norm += double(e[i]) * e[i];
  }
  CHECK(std::sqrt(difference) <= bound * std::sqrt(norm));
}

// A gradient or loss that is not finite: no byte changes but two counts.
template <typename T>
void CheckSkips(const Settings& settings, Buffers<T>* b) {
  size_t v = 0;
  while (v < b->g.size() && b->g[v].size() == size_t(b->offset)) ++v;
  if (v == b->g.size()) return;
  for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    for (int where = 0; where < 3; ++where) {
      std::vector<T> given = {T(0.05), T(0.04), T(1), T(0.8), T(1)};
      if (where > 0) given[where] = T(bad);
      T& element = b->g[v].back();
      const T good = element;
      if (where == 0) element = T(bad);
      std::vector<T> before = b->All();
      const bool done = nlcg::UpdateOnCpu<T>(settings, b->Variables(settings, false), given.data(),
                                             b->reals.data(), b->counts.data(), Threads(2));
      CHECK(!done);
      std::vector<T> after = b->All();
      before.resize(before.size() - 4);
      after.resize(after.size() - 4);
      CHECK(std::memcmp(before.data(), after.data(), before.size() * sizeof(T)) == 0);
      element = good;
    }
  }
}

template <typename T>
void Run(const Settings& settings, const std::vector<int64_t>& sizes, int offset, bool adopt) {
  const uint32_t seed = random_state;
  Buffers<T> expected(sizes, offset);
  std::vector<Buffers<T>> actual;
  for (int i = 0; i < 4; ++i) {
    random_state = seed;
    actual.emplace_back(sizes, offset);
  }
  const int threads[] = {1, 2, 7};
  for (int update = 0; update < kUpdates; ++update) {
    const T loss = T(2 + Random());
    const std::vector<T> given = {T(0.05), T(0.04), loss, T(0.8), loss};
    const uint32_t gradients = random_state;
    SetGradients(expected.w, &expected);
    for (int i = 0; i < 4; ++i) {
      random_state = gradients;
      SetGradients(expected.w, &actual[i]);
      if (i < 3) UpdateOnThreads(settings, given, threads[i], adopt, &actual[i]);
    }
    Reference<T>(settings, &expected, given).Update();
    CheckSameBits(actual[0], actual[1]);  // for any number of threads
    CheckSameBits(actual[0], actual[2]);
    CheckAgreement(actual[0], expected);
    if (settings.lars_coefficient > 0) continue;  // needs whole variables
    UpdateInHalves(settings, given, &actual[3]);
    CheckAgreement(actual[3], expected);
  }
  CheckSkips(settings, &actual[0]);
}

template <typename T>
void RunAll() {
  Settings settings = {};
  settings.epsilon = 1e-8;
#ifdef __SANITIZE_THREAD__
  const std::vector<std::vector<int64_t>> shapes = {{63, 64, 65}, {0, 40000, 3}, {70001}};
#else
  const std::vector<std::vector<int64_t>> shapes = {
      {0}, {1}, {63, 64, 65}, {0, 7, 0, 16384, 1}, {16385, 3, 33000}, {100003}};
#endif
  settings.momentum = 0.9;
  int number = 0;
  for (int preconditioner = nlcg::kIdentity; preconditioner <= nlcg::kGiven; ++preconditioner) {
    for (int rule = nlcg::kFletcherReeves; rule <= nlcg::kMomentum; ++rule) {
      for (bool nesterov : {false, true}) {
        for (double lars : {0.0, 0.02}) {
          settings.preconditioner = preconditioner;
          settings.rule = rule;
          if (preconditioner == nlcg::kGiven && nlcg::LooksBack(settings)) continue;
          settings.decay = preconditioner == nlcg::kBfgs ? 1 : 0.99;
          settings.nesterov = nesterov;
          settings.lars_coefficient = lars;
          settings.searched = number++ % 2 ? kSearched : 0;
          for (const auto& sizes : shapes) {
            for (int offset : {0, 1}) Run<T>(settings, sizes, offset, offset == 1);
          }
        }
      }
    }
  }
}

// A variable of more than 2^31 elements whose bulk is zero and lies, for each array, in one block of
// memory mapped over and over: zeros stay zeros, whoever writes them. The last block is its own.
// Its elements must get the bits that they get without the bulk.
struct LongArray {
  static constexpr int64_t kBlock = int64_t{1} << 24;  // elements
  static constexpr int64_t kBlocks = 130;              // 2.18e9 elements in all
  static constexpr int64_t kSize = kBlock * kBlocks;
  float* p;
  int file;

  LongArray() {
    file = memfd_create("zeros", 0);
    CHECK(file >= 0 && ftruncate(file, 2 * kBlock * sizeof(float)) == 0);
    void* memory = mmap(nullptr, kSize * sizeof(float), PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    p = static_cast<float*>(memory);
    for (int64_t i = 0; i < kBlocks; ++i) {
      const int64_t offset = i == kBlocks - 1 ? kBlock * sizeof(float) : 0;
      CHECK(mmap(p + i * kBlock, kBlock * sizeof(float), PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_FIXED, file, offset) != MAP_FAILED);
    }
  }
  ~LongArray() {
    munmap(p, kSize * sizeof(float));
    close(file);
  }
  float* Last() { return p + kSize - kBlock; }
};

void RunLarge() {
  Settings settings = {};
  settings.preconditioner = nlcg::kBfgs;
  settings.rule = nlcg::kPolakRibiere;
  settings.epsilon = 1e-8;
  settings.decay = 1;
  LongArray w, d, h, g_prev, g;
  std::fill(h.p, h.p + LongArray::kBlock, 1.0f);
  Buffers<float> small({LongArray::kBlock}, 0);
  const float given[] = {0.05f, 0.05f, 1};
  float reals[nlcg::kReals] = {}, sums[4] = {0, 0, -1, 0};
  int64_t counts[4] = {};
  for (int update = 0; update < 3; ++update) {
    for (int64_t i = 0; i < LongArray::kBlock; ++i) {
      if (update == 0) {
        w.Last()[i] = small.w[0][i];
        h.Last()[i] = 1;
      }
      small.g[0][i] = g.Last()[i] = small.w[0][i] * (1 + i % 3) + 0.1f * float(Random());
    }
    const nlcg::Variable<float> v = {w.p,     d.p,     h.p,  g_prev.p,         g_prev.p, g.p,
                                     nullptr, nullptr, sums, LongArray::kSize, 0.0};
    CHECK(nlcg::UpdateOnCpu<float>(settings, {v}, given, reals, counts, Threads(2)));
    CHECK(nlcg::UpdateOnCpu<float>(settings, small.Variables(settings, false), given,
                                   small.reals.data(), small.counts.data(), Threads(2)));
    const auto same = [](const std::vector<float>& a, const float* b) {
      return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
    };
    CHECK(same(small.w[0], w.Last()) && same(small.d[0], d.Last()));
    CHECK(same(small.h[0], h.Last()) && same(small.g_prev[0], g_prev.Last()));
    CHECK(counts[nlcg::kRejectedCurvatures] == 0 &&
          reals[nlcg::kDelta] == small.reals[nlcg::kDelta]);
    CHECK(w.p[0] == 0 && w.p[LongArray::kSize - LongArray::kBlock - 1] == 0);
  }
}

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "--large") == 0) {
    RunLarge();
    std::printf("%lld elements passed\n", static_cast<long long>(LongArray::kSize));
    return 0;
  }
  RunAll<float>();
  RunAll<double>();
  std::puts("kernel test passed");
}

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

uint32_t random_state = 1;
double Random() {  // in [-1, 1)
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) / 8388608.0 - 1.0;
}

// Exactly as many bytes as there are elements, so that the sanitizer sees a step beyond; `offset`
// elements make the pointers unaligned to vectors.
template <typename T>
struct Buffers {
  std::vector<std::vector<T>> w, d, h, g_prev, g;
  std::vector<T> ratios;
  std::vector<T> sums;  // of BFGS, for each variable four
  std::vector<T> reals;
  std::vector<int64_t> counts;
  int offset;

  Buffers(const std::vector<int64_t>& sizes, int offset) : offset(offset) {
    for (int64_t size : sizes) {
      for (auto* buffers : {&w, &d, &h, &g_prev, &g}) {
        buffers->emplace_back(size + offset);
        for (T& x : buffers->back()) x = T(buffers == &h ? 1.0 : Random());
      }
      for (T& x : d.back()) x = 0;
      for (T& x : g_prev.back()) x = 0;
    }
    ratios.assign(sizes.size(), T(1));
    sums.assign(4 * sizes.size(), T(-1));
    reals.assign(nlcg::kComparedLoss + 1, T(0));
    reals[nlcg::kScale] = 1;
    counts.assign(4, 0);
  }

  std::vector<nlcg::Variable<T>> Variables(const Settings& settings, bool adopt) {
    std::vector<nlcg::Variable<T>> variables;
    for (size_t i = 0; i < w.size(); ++i) {
      nlcg::Variable<T> v;
      v.w = w[i].data() + offset;
      v.d = d[i].data() + offset;
      const bool keeps_gradient = nlcg::KeepsGradient(settings);
      v.h = settings.preconditioner != nlcg::kIdentity ? h[i].data() + offset : nullptr;
      v.g_prev = keeps_gradient ? g_prev[i].data() + offset : nullptr;
      v.g_prev_out = keeps_gradient && !adopt ? g_prev[i].data() + offset : nullptr;
      v.g = g[i].data() + offset;
      v.trust_ratio = settings.lars_coefficient > 0 ? &ratios[i] : nullptr;
      v.curvature_sums = nlcg::KeepsSums(settings) ? &sums[4 * i] : nullptr;
      v.size = w[i].size() - offset;
      v.weight_decay = i % 2 ? 0.01 : 0.0;
      variables.push_back(v);
    }
    return variables;
  }

  std::vector<T> All() const {
    std::vector<T> all(reals);
    for (const auto* buffers : {&w, &d, &h, &g_prev}) {
      for (const auto& buffer : *buffers) all.insert(all.end(), buffer.begin(), buffer.end());
    }
    all.insert(all.end(), ratios.begin(), ratios.end());
    for (int64_t count : counts) all.push_back(T(count));
    return all;
  }
};

// Section 2 of the paper and what was added to it, one element after another in double.
template <typename T>
void Reference(const Settings& s, Buffers<T>* b, double rate, double loss) {
  const double eps = s.epsilon;
  const bool first = b->counts[0] == 0, bfgs = nlcg::UsesBfgs(s),
             rms = s.preconditioner == nlcg::kRms;
  const bool scaled = s.preconditioner == nlcg::kNormalizedBfgs || rms;
  const double scale_prev = scaled ? b->reals[nlcg::kMean] : 1, beta_prev = b->reals[nlcg::kBeta];
  const double cap_prev = b->reals[nlcg::kCap];
  const double ahead_prev = s.nesterov ? 1 - b->reals[nlcg::kKappa] : 0;
  const size_t n = b->w.size();
  double elements = 0;
  const auto each = [&](auto body) {
    for (size_t v = 0; v < n; ++v) {
      for (size_t i = b->offset; i < b->w[v].size(); ++i) body(v, i);
    }
  };
  const auto divisor = [&](size_t v, size_t i) {
    return rms ? std::sqrt(double(b->h[v][i])) + eps : bfgs ? b->h[v][i] + eps : 1 + eps;
  };
  const auto last_step = [&](size_t v, size_t i) {
    const double d = b->d[v][i], z = -scale_prev * b->g_prev[v][i] / divisor(v, i);
    const double ahead = cap_prev * z + beta_prev * d - d;
    return b->reals[nlcg::kStepSize] * b->ratios[v] * (d + ahead_prev * ahead);
  };
  double ys = 0, shs = 0, mid = 0, fresh = 0, squares = 0, inverses = 0;
  double gd = 0, gg = 0, slope = 0, old_slope = 0, dd = 0, length = 0;
  each([&](size_t v, size_t i) {
    const double g = b->g[v][i], p = b->g_prev[v][i], step = last_step(v, i);
    ys += (g - p) * step;
    shs += step * b->h[v][i] * step;
    mid += g * p / divisor(v, i);
    gg += g * g;
    slope += g * step;
    old_slope += p * step;
    elements += 1;
  });
  T* reals = b->reals.data();
  double kappa = 0, factor = 1;
  if (s.rule == nlcg::kBlended) {
    const double error = (loss - reals[nlcg::kTestedLoss] - (slope + old_slope) / 2) / loss;
    if (!first) {
      const double old = b->counts[0] > 1 ? 0.9 : 0;
      const double left = std::fmax(std::abs(error) - 1e-6, 0);
      const double foretold = (std::abs(slope) + std::abs(old_slope)) / 2 / std::abs(loss);
      reals[nlcg::kLeftOver] = T(old * reals[nlcg::kLeftOver] + (1 - old) * left);
      reals[nlcg::kForetold] = T(old * reals[nlcg::kForetold] + (1 - old) * foretold);
      if (reals[nlcg::kForetold] > 0) {
        kappa = 1 - double(reals[nlcg::kLeftOver]) / reals[nlcg::kForetold];
      }
      kappa = std::fmin(std::fmax(kappa, 0), 1);
    }
    reals[nlcg::kTestedLoss] = T(loss);
    if (first) reals[nlcg::kMeanSquare] = reals[nlcg::kFirstSquare] = T(gg);
    if (!first) reals[nlcg::kMeanSquare] = T(0.99 * reals[nlcg::kMeanSquare] + 0.01 * gg);
    if (gg > 0) {
      factor = std::pow(reals[nlcg::kFirstSquare] / reals[nlcg::kMeanSquare], (1 - kappa) / 2);
    }
  }
  const bool resolved = ys > 1e-4 * (std::abs(slope) + std::abs(old_slope));
  const bool accepted = bfgs && !first && resolved && ys > 1e-30 && shs > 1e-30;
  each([&](size_t v, size_t i) {
    const double g = b->g[v][i], y = g - b->g_prev[v][i], step = last_step(v, i);
    double h = b->h[v][i];
    if (accepted) h = std::abs(h - h * step * h * step / shs + y * y / ys);
    if (bfgs) h += (1 - s.decay) * (1 - kappa) * (1 - h);
    if (rms) h = s.decay * h + (1 - s.decay) * g * g;
    b->h[v][i] = T(h);
    fresh += g * g / divisor(v, i);
    squares += g / divisor(v, i) * g / divisor(v, i);
    inverses += 1 / divisor(v, i);
  });
  double mean = bfgs && elements > 0 ? elements / inverses : 1;
  if (rms) mean = squares > 0 ? std::sqrt(gg / squares) : 0;
  const double scale = scaled ? mean : 1;
  const double top = scale * fresh - (s.rule == nlcg::kPolakRibiere ? scale_prev * mid : 0);
  double beta = std::fmin(std::fmax(top / (b->reals[nlcg::kDelta] + 1e-30), 0), 1);
  if (s.rule == nlcg::kBlended) beta = kappa * beta + (1 - kappa) * s.momentum;
  if (first) beta = 0;
  double search = b->reals[nlcg::kScale];
  if (s.line_search == nlcg::kOnline) {
    const double previous = b->reals[nlcg::kLoss];
    if (!first && loss > previous + s.decrease_threshold * std::abs(previous)) {
      search = std::fmax(search * s.decrease_factor, s.minimum_scale);
    } else if (!first && loss < previous + s.increase_threshold * std::abs(previous)) {
      search = std::fmin(search * s.increase_factor, 1);
    }
    b->reals[nlcg::kScale] = T(search);
    b->reals[nlcg::kLoss] = T(loss);
  }
  const double alpha = factor * rate * (s.line_search == nlcg::kNoLineSearch ? 1 : search);
  const double ahead = s.nesterov ? 1 - kappa : 0;
  each([&](size_t v, size_t i) {
    const double z = -scale * b->g[v][i] / divisor(v, i), d = beta * b->d[v][i] + z;
    const double step = factor * (d + ahead * (z + beta * d - d));
    length += step * step;
  });
  length = std::sqrt(length);
  const double mean_length = reals[nlcg::kMeanLength];
  double cap = 1;
  if (s.rule == nlcg::kBlended && mean_length == 0) {
    reals[nlcg::kMeanLength] = T(length / (1 - s.momentum));
  } else if (s.rule == nlcg::kBlended) {
    cap = std::fmin(1, 2 * mean_length / length);
    reals[nlcg::kMeanLength] = T(0.9 * mean_length + 0.1 * cap * length);
  }
  for (size_t v = 0; v < n; ++v) {
    double ww = 0, norm = 0;
    std::vector<double> steps(b->w[v].size());
    for (size_t i = b->offset; i < b->w[v].size(); ++i) {
      const double z = -scale * b->g[v][i] / divisor(v, i), d = beta * b->d[v][i] + z;
      steps[i] = cap * (d + ahead * (z + beta * d - d));
      b->d[v][i] = T(cap * d);
      gd += b->g[v][i] * steps[i];
      dd += steps[i] * steps[i];
      norm += steps[i] * steps[i];
      ww += double(b->w[v][i]) * b->w[v][i];
    }
    if (s.lars_coefficient > 0) {
      b->ratios[v] =
          ww > 0 ? T(s.lars_coefficient * std::sqrt(ww) / (std::sqrt(norm) + eps)) : T(1);
    }
    for (size_t i = b->offset; i < b->w[v].size(); ++i) {
      const double w = b->w[v][i], decay = v % 2 ? 0.01 : 0.0;
      b->w[v][i] = T(w - w * decay * rate + alpha * b->ratios[v] * steps[i]);
      if (nlcg::KeepsGradient(s)) b->g_prev[v][i] = b->g[v][i];
    }
  }
  b->reals[nlcg::kDelta] = T(scale * fresh);
  b->reals[nlcg::kStepSize] = T(alpha);
  b->reals[nlcg::kBeta] = T(beta);
  b->reals[nlcg::kCurvature] = bfgs ? T(ys) : T(0);
  b->reals[nlcg::kCosine] = gg > 0 && dd > 0 ? T(-gd / std::sqrt(gg) / std::sqrt(dd)) : T(0);
  b->reals[nlcg::kKappa] = T(kappa);
  b->reals[nlcg::kMean] = T(mean);
  b->reals[nlcg::kCap] = T(cap);
  b->counts[nlcg::kUpdates] += 1;
  b->counts[nlcg::kRejected] += bfgs && !first && !accepted;
  b->counts[nlcg::kLastApplied] = 1;
}

nlcg::ParallelFor Threads(int threads) {
  return [threads](int64_t count, const std::function<void(int64_t, int64_t)>& work) {
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([=] { work(count * t / threads, count * (t + 1) / threads); });
    }
    for (auto& worker : workers) worker.join();
  };
}

template <typename T>
void Run(const Settings& settings, const std::vector<int64_t>& sizes, int offset, bool adopt) {
  const double bound = sizeof(T) == 4 ? 2e-4 : 1e-11;
  const uint32_t seed = random_state;
  Buffers<T> expected(sizes, offset);
  std::vector<Buffers<T>> actual;
  for (int i = 0; i < 3; ++i) {
    random_state = seed;
    actual.emplace_back(sizes, offset);
  }
  const int threads[] = {1, 2, 7};
  for (int update = 0; update < kUpdates; ++update) {
    const double loss = 2 + Random(), rate = 0.05;
    const uint32_t gradients = random_state;
    for (int i = -1; i < 3; ++i) {
      Buffers<T>& b = i < 0 ? expected : actual[i];
      random_state = gradients;
      for (size_t v = 0; v < sizes.size(); ++v) {
        for (size_t j = 0; j < b.g[v].size(); ++j) {
          b.g[v][j] = T(expected.w[v][j] * (1 + v) + 0.1 * Random());
        }
      }
      if (i < 0) continue;
      b.reals[nlcg::kScale] = settings.line_search ? b.reals[nlcg::kScale] : T(1);
      const bool done =
          nlcg::UpdateOnCpu<T>(settings, b.Variables(settings, adopt), T(rate), T(loss),
                               b.reals.data(), b.counts.data(), Threads(threads[i]));
      CHECK(done);
      for (size_t v = 0; adopt && nlcg::KeepsGradient(settings) && v < sizes.size(); ++v) {
        std::copy(b.g[v].begin() + offset, b.g[v].end(), b.g_prev[v].begin() + offset);
      }
    }
    Reference(settings, &expected, rate, loss);
    CHECK(actual[0].All() == actual[1].All());  // the same bits for any number of threads
    CHECK(actual[0].All() == actual[2].All());
    for (int i = 1; i < 3; ++i) {
      const size_t bytes = actual[0].sums.size() * sizeof(T);
      CHECK(std::memcmp(actual[0].sums.data(), actual[i].sums.data(), bytes) == 0);
    }
    const std::vector<T> a = actual[0].All(), e = expected.All();
    double difference = 0, norm = 0;
    for (size_t i = expected.reals.size(); i < a.size(); ++i) {
      difference += (a[i] - e[i]) * (a[i] - e[i]);
      norm += double(e[i]) * e[i];
    }
    CHECK(std::sqrt(difference) <= bound * std::sqrt(norm));
  }

  // A gradient or loss that is not finite: no byte changes but two counts.
  Buffers<T>& b = actual[0];
  for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    for (int where = 0; where < 2; ++where) {
      if (where == 1 && !nlcg::UsesLoss(settings)) continue;
      size_t v = 0;
      while (v < sizes.size() && sizes[v] == 0) ++v;
      if (v == sizes.size()) continue;
      T& element = b.g[v].back();
      const T good = element;
      if (where == 0) element = T(bad);
      std::vector<T> before = b.All();
      const bool done = nlcg::UpdateOnCpu<T>(settings, b.Variables(settings, false), T(0.05),
                                             T(where == 1 ? bad : 1.0), b.reals.data(),
                                             b.counts.data(), Threads(2));
      CHECK(!done);
      std::vector<T> after = b.All();
      before.resize(before.size() - 4);
      after.resize(after.size() - 4);
      CHECK(std::memcmp(before.data(), after.data(), before.size() * sizeof(T)) == 0);
      element = good;
    }
  }
}

template <typename T>
void RunAll() {
  Settings settings = {};
  settings.epsilon = 1e-8;
  settings.decrease_threshold = 0.02;
  settings.increase_threshold = 0.01;
  settings.decrease_factor = 0.975;
  settings.increase_factor = 1.025;
  settings.minimum_scale = 1e-4;
#ifdef __SANITIZE_THREAD__
  const std::vector<std::vector<int64_t>> shapes = {{63, 64, 65}, {0, 40000, 3}, {70001}};
#else
  const std::vector<std::vector<int64_t>> shapes = {
      {0}, {1}, {63, 64, 65}, {0, 7, 0, 16384, 1}, {16385, 3, 33000}, {100003}};
#endif
  settings.momentum = 0.9;
  int number = 0;
  for (int preconditioner : {nlcg::kIdentity, nlcg::kBfgs, nlcg::kNormalizedBfgs, nlcg::kRms}) {
    for (int rule : {nlcg::kFletcherReeves, nlcg::kPolakRibiere, nlcg::kBlended}) {
      for (bool nesterov : {false, true}) {
        for (double lars : {0.0, 0.02}) {
          settings.preconditioner = preconditioner;
          settings.decay = preconditioner == nlcg::kBfgs ? 1 : 0.99;
          settings.rule = rule;
          settings.nesterov = nesterov;
          settings.lars_coefficient = lars;
          settings.line_search = number++ % 2 ? nlcg::kOnline : nlcg::kNoLineSearch;
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
  float reals[nlcg::kComparedLoss + 1] = {}, sums[4] = {0, 0, -1, 0};
  int64_t counts[4] = {};
  for (int update = 0; update < 3; ++update) {
    for (int64_t i = 0; i < LongArray::kBlock; ++i) {
      if (update == 0) {
        w.Last()[i] = small.w[0][i];
        h.Last()[i] = 1;
      }
      small.g[0][i] = g.Last()[i] = small.w[0][i] * (1 + i % 3) + 0.1f * float(Random());
    }
    const nlcg::Variable<float> v = {w.p, d.p,     h.p,  g_prev.p,         g_prev.p,
                                     g.p, nullptr, sums, LongArray::kSize, 0.0};
    CHECK(nlcg::UpdateOnCpu<float>(settings, {v}, 0.05f, 1, reals, counts, Threads(2)));
    CHECK(nlcg::UpdateOnCpu<float>(settings, small.Variables(settings, false), 0.05f, 1,
                                   small.reals.data(), small.counts.data(), Threads(2)));
    const auto same = [](const std::vector<float>& a, const float* b) {
      return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
    };
    CHECK(same(small.w[0], w.Last()) && same(small.d[0], d.Last()));
    CHECK(same(small.h[0], h.Last()) && same(small.g_prev[0], g_prev.Last()));
    CHECK(counts[nlcg::kRejected] == 0 && reals[nlcg::kDelta] == small.reals[nlcg::kDelta]);
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

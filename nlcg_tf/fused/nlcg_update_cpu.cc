// The CPU kernel: three sweeps over chunks of all variables.

#include "nlcg_update.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// One library for every x86-64: each sweep is compiled for AVX-512, AVX2 and the baseline, and the
// loader picks one. The width of the vectors below is fixed, so that all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(NLCG_NO_CLONES)
#define NLCG_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define NLCG_CLONES
#endif

namespace nlcg {
namespace {

constexpr int64_t kChunk = 16384;
constexpr int64_t kStreamed = 65536;

typedef float FloatVector __attribute__((vector_size(64)));
typedef double DoubleVector __attribute__((vector_size(64)));

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  using Vector = FloatVector;
};
template <>
struct Simd<double> {
  using Vector = DoubleVector;
};

template <typename T>
constexpr int64_t Lanes() {
  return 64 / sizeof(T);
}

// The first `count` elements at p, the rest zero.
template <typename T>
NLCG_HOST_DEVICE typename Simd<T>::Vector Load(const T* p, int64_t count) {
  typename Simd<T>::Vector x = {};
  std::memcpy(&x, p, count * sizeof(T));
  return x;
}

template <typename T>
NLCG_HOST_DEVICE void Store(T* p, typename Simd<T>::Vector x, int64_t count) {
  std::memcpy(p, &x, count * sizeof(T));
}

// A store that goes past the caches: memory that is only written need not be read first.
template <typename T>
NLCG_HOST_DEVICE void Stream(T* p, typename Simd<T>::Vector x) {
#if defined(__SSE2__)
  FloatVector bits;
  std::memcpy(&bits, &x, sizeof(bits));
  float* to = reinterpret_cast<float*>(p);
  for (int i = 0; i < 4; ++i) {
    __m128 part;
    std::memcpy(&part, reinterpret_cast<const char*>(&bits) + 16 * i, sizeof(part));
    _mm_stream_ps(to + 4 * i, part);
  }
#else
  Store(p, x, Lanes<T>());
#endif
}

template <typename T>
NLCG_HOST_DEVICE double Sum(typename Simd<T>::Vector x) {
  double sum = 0;
  for (int64_t i = 0; i < Lanes<T>(); ++i) sum += x[i];
  return sum;
}

// Calls body(i, count) for the elements [begin, end), a whole vector at a time and then the rest.
template <typename T, typename Body>
NLCG_HOST_DEVICE void ForVectors(int64_t begin, int64_t end, Body& body) {
  constexpr int64_t kLanes = Lanes<T>();
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
  if (i < end) body(i, end - i);
}

// What a sweep adds up over a chunk.
struct Sums {
  double a = 0, b = 0, c = 0, d = 0;
  void Add(const Sums& other) {
    a += other.a;
    b += other.b;
    c += other.c;
    d += other.d;
  }
};

// The bodies are functors, not lambdas: a lambda would not be compiled for its caller's instructions.

template <typename T>
struct CurvatureBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T epsilon, step;
  const bool middle;
  V check = {}, ys = {}, shs = {}, mid = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), g_prev = Load(v.g_prev + i, n), h = Load(v.h + i, n);
    const V s = step * Load(v.d + i, n);
    check += g - g;
    ys += (g - g_prev) * s;
    shs += s * (h * s);
    if (middle) mid += g * (g_prev / (h + epsilon));
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {Sum<T>(check), Sum<T>(ys), Sum<T>(shs), Sum<T>(mid)};
  }
};

// Without preconditioner: h = 1, and delta_new needs no second sweep.
template <typename T>
struct PlainBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T epsilon;
  const bool middle;
  V check = {}, fresh = {}, mid = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n);
    check += g - g;
    fresh += g * (g / (T(1) + epsilon));
    if (middle) mid += g * (Load(v.g_prev + i, n) / (T(1) + epsilon));
  }
  NLCG_HOST_DEVICE Sums Result() const { return {Sum<T>(check), Sum<T>(fresh), 0, Sum<T>(mid)}; }
};

template <typename T>
struct HessianBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T epsilon, step, inv_shs, inv_ys;
  V fresh = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), y = g - Load(v.g_prev + i, n), s = step * Load(v.d + i, n);
    const V h = HessianDiagonal(Load(v.h + i, n), s, y, inv_shs, inv_ys);
    Store(v.h + i, h, n);
    fresh += g * (g / (h + epsilon));
  }
  NLCG_HOST_DEVICE Sums Result() const { return {Sum<T>(fresh), 0, 0, 0}; }
};

// Where the curvature was rejected h stays.
template <typename T>
struct RejectedBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T epsilon;
  V fresh = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n);
    fresh += g * (g / (Load(v.h + i, n) + epsilon));
  }
  NLCG_HOST_DEVICE Sums Result() const { return {Sum<T>(fresh), 0, 0, 0}; }
};

template <typename T, bool kPreconditioner, bool kLars>
struct StepBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T epsilon, beta, alpha, decay_rate;
  const bool stream;
  V gd = {}, gg = {}, dd = {}, ww = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), w = Load(v.w + i, n);
    V h = V{} + T(1);
    if (kPreconditioner) h = Load(v.h + i, n);
    const V d = Direction(g, h, Load(v.d + i, n), epsilon, beta);
    Store(v.d + i, d, n);
    if (stream && n == Lanes<T>()) {
      Stream(v.g_prev_out + i, g);
    } else if (v.g_prev_out != nullptr) {
      Store(v.g_prev_out + i, g, n);
    }
    if (kLars) {
      ww += w * w;
    } else {
      Store(v.w + i, Weight(w, d, decay_rate, alpha), n);
    }
    gd += g * d;
    gg += g * g;
    dd += d * d;
  }
  NLCG_HOST_DEVICE Sums Result() const { return {Sum<T>(gd), Sum<T>(gg), Sum<T>(dd), Sum<T>(ww)}; }
};

template <typename T>
struct LarsBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T decay_rate, step;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    Store(v.w + i, Weight(Load(v.w + i, n), Load(v.d + i, n), decay_rate, step), n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return {}; }
};

template <typename T, typename Body>
NLCG_HOST_DEVICE Sums Run(Body body, int64_t begin, int64_t end) {
  ForVectors<T>(begin, end, body);
  return body.Result();
}

enum Sweep { kSweepCurvature, kSweepHessian, kSweepStep, kSweepLars };

template <typename T>
NLCG_HOST_DEVICE Sums RunSweep(Sweep sweep, const Settings& settings, const Stage<T>& stage,
                               const Variable<T>& v, int64_t begin, int64_t end) {
  const T epsilon = T(settings.epsilon);
  const bool middle = settings.rule == kPolakRibiere;
  const T ratio = v.trust_ratio != nullptr ? *v.trust_ratio : T(1);
  const T decay_rate = T(v.weight_decay) * stage.learning_rate;
  // Only variables that do not stay in a cache until the next update gain by it.
  const bool stream = v.g_prev_out != nullptr && v.size >= kStreamed &&
                      reinterpret_cast<uintptr_t>(v.g_prev_out) % 16 == 0;
  switch (sweep) {
    case kSweepCurvature:
      if (!settings.preconditioner) return Run<T>(PlainBody<T>{v, epsilon, middle}, begin, end);
      return Run<T>(CurvatureBody<T>{v, epsilon, stage.step_prev * ratio, middle}, begin, end);
    case kSweepHessian:
      if (!stage.accepted) return Run<T>(RejectedBody<T>{v, epsilon}, begin, end);
      return Run<T>(HessianBody<T>{v, epsilon, stage.step_prev * ratio, stage.inv_shs, stage.inv_ys},
                    begin, end);
    case kSweepStep:
#define NLCG_STEP(preconditioner, lars)                                                          \
  return Run<T>(                                                                                 \
      StepBody<T, preconditioner, lars>{v, epsilon, stage.beta, stage.alpha, decay_rate, stream}, \
      begin, end)
      if (settings.preconditioner && settings.lars_coefficient > 0) NLCG_STEP(true, true);
      if (settings.preconditioner) NLCG_STEP(true, false);
      if (settings.lars_coefficient > 0) NLCG_STEP(false, true);
      NLCG_STEP(false, false);
#undef NLCG_STEP
    default:
      return Run<T>(LarsBody<T>{v, decay_rate, stage.alpha * ratio}, begin, end);
  }
}

NLCG_CLONES Sums SweepChunk(Sweep sweep, const Settings& settings, const Stage<float>& stage,
                            const Variable<float>& v, int64_t begin, int64_t end) {
  return RunSweep(sweep, settings, stage, v, begin, end);
}

NLCG_CLONES Sums SweepChunk(Sweep sweep, const Settings& settings, const Stage<double>& stage,
                            const Variable<double>& v, int64_t begin, int64_t end) {
  return RunSweep(sweep, settings, stage, v, begin, end);
}

struct Chunk {
  int variable;
  int64_t begin, end;
};

}  // namespace

template <typename T>
bool UpdateOnCpu(const Settings& settings, const std::vector<Variable<T>>& variables,
                 T learning_rate, T loss, T* reals, int64_t* counts,
                 const ParallelFor& parallel_for) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < variables.size(); ++i) {
    for (int64_t begin = 0; begin < variables[i].size; begin += kChunk) {
      chunks.push_back({int(i), begin, std::min(begin + kChunk, variables[i].size)});
    }
  }
  std::vector<Sums> sums(chunks.size());
  Stage<T> stage;
  const auto sweep = [&](Sweep kind) {
    parallel_for(chunks.size(), [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        // Each sweep begins where the one before ended: there the caches still hold its data.
        const int64_t i = kind == kSweepHessian ? int64_t(chunks.size()) - 1 - j : j;
        const Chunk& chunk = chunks[i];
        sums[i] = SweepChunk(kind, settings, stage, variables[chunk.variable], chunk.begin,
                             chunk.end);
      }
#if defined(__SSE2__)
      _mm_sfence();  // what was streamed must be there when the thread says that it is done
#endif
    });
    Sums total;
    for (const Sums& sum : sums) total.Add(sum);
    return total;
  };

  Begin(settings, reals, counts, learning_rate, loss, &stage);
  if (!stage.skip) {
    Sums total = sweep(kSweepCurvature);
    const bool plain = !settings.preconditioner;
    FinishCurvature(settings, total.a, plain ? 0 : total.b, plain ? 0 : total.c, total.d, &stage);
    if (!stage.skip) {
      FinishDirection(settings, reals, plain ? total.b : sweep(kSweepHessian).a, &stage);
      total = sweep(kSweepStep);
      if (settings.lars_coefficient > 0) {
        std::vector<Sums> norms(variables.size());
        for (size_t i = 0; i < chunks.size(); ++i) norms[chunks[i].variable].Add(sums[i]);
        for (size_t i = 0; i < variables.size(); ++i) {
          *variables[i].trust_ratio = TrustRatio<T>(settings, norms[i].d, norms[i].c);
        }
        sweep(kSweepLars);
      }
      FinishStep(settings, RealCount(settings), total.a, total.b, total.c, &stage, reals, counts);
      return true;
    }
  }
  FinishStep(settings, 0, 0, 0, 0, &stage, reals, counts);
  return false;
}

template bool UpdateOnCpu<float>(const Settings&, const std::vector<Variable<float>>&, float, float,
                                 float*, int64_t*, const ParallelFor&);
template bool UpdateOnCpu<double>(const Settings&, const std::vector<Variable<double>>&, double,
                                  double, double*, int64_t*, const ParallelFor&);

}  // namespace nlcg

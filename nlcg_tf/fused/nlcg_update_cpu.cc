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

typedef float HalfVector __attribute__((vector_size(32)));

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  using Vector = FloatVector;
  using Half = HalfVector;  // as many elements as a DoubleVector
};
template <>
struct Simd<double> {
  using Vector = DoubleVector;
  using Half = DoubleVector;
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

void Add(const Sums& from, Sums* to) {
  for (int i = 0; i < kSums; ++i) to->of[i] += from.of[i];
}

// A sum in double of products of single elements, which are exact where T is float: of two such sums
// the difference is taken.
template <typename T>
struct ExactSum {
  using Half = typename Simd<T>::Half;
  DoubleVector sum = {};
  NLCG_HOST_DEVICE static DoubleVector Part(typename Simd<T>::Vector x, int i) {
    Half half;
    std::memcpy(&half, reinterpret_cast<const char*>(&x) + i * sizeof(Half), sizeof(Half));
    return __builtin_convertvector(half, DoubleVector);
  }
  static constexpr int kParts = sizeof(DoubleVector) / sizeof(Half);
  NLCG_HOST_DEVICE void Add(typename Simd<T>::Vector x, typename Simd<T>::Vector y) {
    for (int i = 0; i < kParts; ++i) sum += Part(x, i) * Part(y, i);
  }
  NLCG_HOST_DEVICE void Add(typename Simd<T>::Vector x, typename Simd<T>::Vector y,
                            typename Simd<T>::Vector z) {
    for (int i = 0; i < kParts; ++i) sum += Part(x, i) * Part(y, i) * Part(z, i);
  }
  NLCG_HOST_DEVICE double Result() const { return nlcg::Sum<double>(sum); }
};

// The bodies are functors, not lambdas: a lambda would not be compiled for its caller's instructions.

// The last step s, of `step` times the direction, on the elements from i on.
template <typename T>
NLCG_HOST_DEVICE typename Simd<T>::Vector LastStep(const Variable<T>& v,
                                                   const Previous<T>& previous, T step,
                                                   bool nesterov, typename Simd<T>::Vector g_prev,
                                                   typename Simd<T>::Vector old_divisor, int64_t i,
                                                   int64_t n) {
  typename Simd<T>::Vector d = Load(v.d + i, n);
  if (nesterov) d = Direction(g_prev, old_divisor, d, previous.ahead, previous.kept);
  return step * d;
}

// BFGS: y's and s'hs, from all that they are made of.
template <typename T>
struct CurvatureBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const Previous<T>& previous;
  const T epsilon, step;
  const bool nesterov;
  V check = {}, ys = {}, shs = {}, slope = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), g_prev = Load(v.g_prev + i, n), h = Load(v.h + i, n);
    const V s = LastStep(v, previous, step, nesterov, g_prev, h + epsilon, i, n);
    check += g - g;
    ys += (g - g_prev) * s;
    shs += s * (h * s);
    slope += g * s;
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {{Sum<T>(check), Sum<T>(ys), Sum<T>(shs), Sum<T>(slope)}};
  }
};

// The same where sweep 3 left the sums over the old gradient.
template <typename T>
struct ProductBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  V check = {};
  ExactSum<T> gd = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n);
    check += g - g;
    gd.Add(g, Load(v.d + i, n));
  }
  NLCG_HOST_DEVICE Sums Result() const { return {{Sum<T>(check), gd.Result()}}; }
};

// What beta needs, and for the blended rule the step's length and, without BFGS, the trapezoid test.
template <typename T>
struct DirectionSums {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const Previous<T>& previous;
  const int rule;
  const bool nesterov;
  V check = {}, fresh = {}, inverse = {}, mid = {}, gg = {}, new_slope = {}, old_slope = {};
  V qq = {}, qd = {}, dd = {};
  NLCG_HOST_DEVICE void Add(V g, V quotient, int64_t i, int64_t n) {
    check += g - g;
    fresh += g * quotient;
    gg += g * g;
    qq += quotient * quotient;
    if (rule != kBlended) return;
    const V d = Load(v.d + i, n);
    qd += quotient * d;
    dd += d * d;
  }
  NLCG_HOST_DEVICE void AddMid(V g, V old_divisor, int64_t i, int64_t n) {
    if (rule == kPolakRibiere) mid += g * (Load(v.g_prev + i, n) / old_divisor);
  }
  NLCG_HOST_DEVICE void AddSlopes(V g, V old_divisor, T step, int64_t i, int64_t n) {
    if (rule != kBlended) return;
    const V g_prev = Load(v.g_prev + i, n);
    const V s = LastStep(v, previous, step, nesterov, g_prev, old_divisor, i, n);
    new_slope += g * s;
    old_slope += g_prev * s;
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {{Sum<T>(check), Sum<T>(fresh), Sum<T>(inverse), Sum<T>(mid), Sum<T>(gg),
             Sum<T>(new_slope), Sum<T>(old_slope), Sum<T>(qq), Sum<T>(qd), Sum<T>(dd)}};
  }
};

template <typename T, bool kAccepted>
struct HessianBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const Stage<T>& stage;
  const T epsilon, step;
  DirectionSums<T> sums;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), h_before = Load(v.h + i, n);
    V h = h_before;
    if (kAccepted) {
      const V g_prev = Load(v.g_prev + i, n);
      const V s = LastStep(v, sums.previous, step, sums.nesterov, g_prev, h + epsilon, i, n);
      h = HessianDiagonal(h, s, g - g_prev, stage.inv_shs, stage.inv_ys);
    }
    if (stage.forget != 0) h = Forget(h, stage.forget);
    if (kAccepted || stage.forget != 0) Store(v.h + i, h, n);
    V inverse = T(1) / (h + epsilon);
    sums.Add(g, g * inverse, i, n);
    // Elements that are not there have no part in the sum over 1 / h.
    for (int64_t j = n; j < Lanes<T>(); ++j) inverse[j] = 0;
    sums.inverse += inverse;
    sums.AddMid(g, h_before + epsilon, i, n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return sums.Result(); }
};

// Without preconditioner: h = 1.
template <typename T>
struct PlainBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T epsilon, step;
  DirectionSums<T> sums;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), divisor = V{} + (T(1) + epsilon);
    sums.Add(g, g / divisor, i, n);
    sums.AddMid(g, divisor, i, n);
    sums.AddSlopes(g, divisor, step, i, n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return sums.Result(); }
};

template <typename T>
struct RmsBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const T epsilon, step, forget;
  DirectionSums<T> sums;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), before = Load(v.h + i, n);
    sums.Add(g, g / (Sqrt(SecondMoment(before, g, forget)) + epsilon), i, n);
    if (sums.rule == kFletcherReeves) return;
    const V old_divisor = Sqrt(before) + epsilon;
    sums.AddMid(g, old_divisor, i, n);
    sums.AddSlopes(g, old_divisor, step, i, n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return sums.Result(); }
};

template <typename T, int kPreconditioner, bool kLars>
struct StepBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const Stage<T>& stage;
  const T epsilon, decay_rate, forget;
  const bool nesterov, stream;
  V gd = {}, gg = {}, dd = {}, ww = {};
  ExactSum<T> next_gd = {}, next_shs = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), w = Load(v.w + i, n);
    V h = V{} + T(1);
    if (kPreconditioner != kIdentity) h = Load(v.h + i, n);
    V divisor = h;
    if (kPreconditioner == kRms) {
      const V moment = SecondMoment(h, g, forget);
      Store(v.h + i, moment, n);
      divisor = Sqrt(moment);
    }
    divisor += epsilon;
    const V d = Direction(g, divisor, Load(v.d + i, n), stage.scale, stage.beta);
    V step = d;
    if (nesterov) step = Direction(g, divisor, d, stage.ahead, stage.kept);
    Store(v.d + i, d, n);
    if (stream && n == Lanes<T>()) {
      Stream(v.g_prev_out + i, g);
    } else if (v.g_prev_out != nullptr) {
      Store(v.g_prev_out + i, g, n);
    }
    if (kLars) {
      ww += w * w;
    } else {
      Store(v.w + i, Weight(w, step, decay_rate, stage.alpha), n);
    }
    gd += g * step;
    gg += g * g;
    dd += step * step;
    if (kPreconditioner == kBfgs && !nesterov) {
      next_gd.Add(g, d);
      next_shs.Add(d, h, d);
    }
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {{Sum<T>(gd), Sum<T>(gg), Sum<T>(dd), Sum<T>(ww), next_gd.Result(), next_shs.Result()}};
  }
};

// LARS: the step, once its size is known. With the look-ahead g and its divisor make it anew.
template <typename T>
struct LarsBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const Stage<T>& stage;
  const T epsilon, decay_rate, step;
  const int preconditioner;
  const bool nesterov;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    V d = Load(v.d + i, n);
    if (nesterov) {
      V h = V{} + T(1);
      if (preconditioner != kIdentity) h = Load(v.h + i, n);
      if (preconditioner == kRms) h = Sqrt(h);
      d = Direction(Load(v.g + i, n), h + epsilon, d, stage.ahead, stage.kept);
    }
    Store(v.w + i, Weight(Load(v.w + i, n), d, decay_rate, step), n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return {}; }
};

template <typename T, typename Body>
NLCG_HOST_DEVICE Sums Run(Body body, int64_t begin, int64_t end) {
  ForVectors<T>(begin, end, body);
  return body.Result();
}

template <typename T>
NLCG_HOST_DEVICE Sums RunCurvature(const Settings& settings, const Previous<T>& previous,
                                   const Variable<T>& v, T step, int64_t begin, int64_t end) {
  if (!SumsAreKept(v)) {
    const T epsilon = T(settings.epsilon);
    return Run<T>(CurvatureBody<T>{v, previous, epsilon, step, settings.nesterov}, begin, end);
  }
  Sums sums = Run<T>(ProductBody<T>{v}, begin, end);
  sums.of[kSlope] = sums.of[kYs] * step;
  if (begin == 0) sums.of[kYs] -= KeptSum(v, 0);
  sums.of[kYs] *= step;
  sums.of[kShs] = begin == 0 ? KeptSum(v, 1) * step * step : 0;
  return sums;
}

template <typename T>
NLCG_HOST_DEVICE Sums RunDirection(const Settings& settings, const Stage<T>& stage,
                                   const Previous<T>& previous, const Variable<T>& v, T step,
                                   int64_t begin, int64_t end) {
  const T epsilon = T(settings.epsilon), forget = T(1 - settings.decay);
  const DirectionSums<T> sums{v, previous, settings.rule, settings.nesterov};
  if (settings.preconditioner == kIdentity) {
    return Run<T>(PlainBody<T>{v, epsilon, step, sums}, begin, end);
  }
  if (settings.preconditioner == kRms) {
    return Run<T>(RmsBody<T>{v, epsilon, step, forget, sums}, begin, end);
  }
  if (stage.accepted) {
    return Run<T>(HessianBody<T, true>{v, stage, epsilon, step, sums}, begin, end);
  }
  return Run<T>(HessianBody<T, false>{v, stage, epsilon, step, sums}, begin, end);
}

template <typename T, int kPreconditioner>
NLCG_HOST_DEVICE Sums RunStep(const Settings& settings, const Stage<T>& stage, const Variable<T>& v,
                              T decay_rate, int64_t begin, int64_t end) {
  const T epsilon = T(settings.epsilon), forget = T(1 - settings.decay);
  const bool nesterov = settings.nesterov;
  // Only variables that do not stay in a cache until the next update gain by it.
  const bool stream = v.g_prev_out != nullptr && v.size >= kStreamed &&
                      reinterpret_cast<uintptr_t>(v.g_prev_out) % 16 == 0;
  if (settings.lars_coefficient > 0) {
    using Body = StepBody<T, kPreconditioner, true>;
    return Run<T>(Body{v, stage, epsilon, decay_rate, forget, nesterov, stream}, begin, end);
  }
  using Body = StepBody<T, kPreconditioner, false>;
  return Run<T>(Body{v, stage, epsilon, decay_rate, forget, nesterov, stream}, begin, end);
}

template <typename T>
NLCG_HOST_DEVICE Sums RunSweep(Sweep sweep, const Settings& settings, const Stage<T>& stage,
                               const Previous<T>& previous, const Variable<T>& v, int64_t begin,
                               int64_t end) {
  const T ratio = v.trust_ratio != nullptr ? *v.trust_ratio : T(1), step = previous.size * ratio;
  const T decay_rate = T(v.weight_decay) * stage.learning_rate;
  const int preconditioner = settings.preconditioner;
  if (sweep == kSweepCurvature) return RunCurvature(settings, previous, v, step, begin, end);
  if (sweep == kSweepDirection) {
    return RunDirection(settings, stage, previous, v, step, begin, end);
  }
  if (sweep == kSweepStep) {
    if (preconditioner == kIdentity) {
      return RunStep<T, kIdentity>(settings, stage, v, decay_rate, begin, end);
    }
    if (preconditioner == kRms) return RunStep<T, kRms>(settings, stage, v, decay_rate, begin, end);
    return RunStep<T, kBfgs>(settings, stage, v, decay_rate, begin, end);
  }
  return Run<T>(LarsBody<T>{v, stage, T(settings.epsilon), decay_rate, stage.alpha * ratio,
                            preconditioner, settings.nesterov},
                begin, end);
}

NLCG_CLONES Sums SweepChunk(Sweep sweep, const Settings& settings, const Stage<float>& stage,
                            const Previous<float>& previous, const Variable<float>& v,
                            int64_t begin, int64_t end) {
  return RunSweep(sweep, settings, stage, previous, v, begin, end);
}

NLCG_CLONES Sums SweepChunk(Sweep sweep, const Settings& settings, const Stage<double>& stage,
                            const Previous<double>& previous, const Variable<double>& v,
                            int64_t begin, int64_t end) {
  return RunSweep(sweep, settings, stage, previous, v, begin, end);
}

struct Chunk {
  int variable;
  int64_t begin, end;
};

}  // namespace

template <typename T>
bool UpdateOnCpu(const Settings& settings, const std::vector<Variable<T>>& variables,
                 T learning_rate, T loss, T* reals, int64_t* counts,
                 const ParallelFor& parallel_for, const Turn& turn) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < variables.size(); ++i) {
    for (int64_t begin = 0; begin < variables[i].size; begin += kChunk) {
      chunks.push_back({int(i), begin, std::min(begin + kChunk, variables[i].size)});
    }
  }
  std::vector<Sums> sums(chunks.size());
  const Previous<T> previous(settings, reals);
  Stage<T> stage;
  const auto sweep = [&](Sweep kind) {
    parallel_for(chunks.size(), [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        // Each sweep begins where the one before ended: there the caches still hold its data.
        const int64_t i = kind == kSweepDirection ? int64_t(chunks.size()) - 1 - j : j;
        const Chunk& chunk = chunks[i];
        sums[i] = SweepChunk(kind, settings, stage, previous, variables[chunk.variable],
                             chunk.begin, chunk.end);
      }
#if defined(__SSE2__)
      _mm_sfence();  // what was streamed must be there when the thread says that it is done
#endif
    });
    Sums total = {};
    for (const Sums& sum : sums) Add(sum, &total);
    return total;
  };

  double elements = turn.elements;
  if (turn.sweep == kAllSweeps) {
    for (const Variable<T>& v : variables) elements += v.size;
  }
  Begin(settings, reals, counts, learning_rate, loss, &stage);
  for (int kind = FirstSweep(settings); kind <= kSweepStep; ++kind) {
    Sums total = {};
    if (kind < turn.sweep) {
      std::memcpy(&total, turn.known[kind], sizeof(total));
    } else if (!stage.skip) {
      total = sweep(Sweep(kind));
    }
    if (kind == turn.sweep) std::memcpy(turn.sums, &total, sizeof(total));
    if (kind == turn.sweep && kind != kSweepStep) return false;
    Finish(settings, kind, elements, total, &stage, reals, counts);
  }
  if (stage.skip) return false;
  if (settings.lars_coefficient > 0 || KeepsSums(settings)) {
    std::vector<Sums> own(variables.size());
    for (size_t i = 0; i < chunks.size(); ++i) Add(sums[i], &own[chunks[i].variable]);
    for (size_t i = 0; i < variables.size(); ++i) FinishVariable(settings, own[i], variables[i]);
  }
  if (settings.lars_coefficient > 0) sweep(kSweepLars);
  return true;
}

template bool UpdateOnCpu<float>(const Settings&, const std::vector<Variable<float>>&, float, float,
                                 float*, int64_t*, const ParallelFor&, const Turn&);
template bool UpdateOnCpu<double>(const Settings&, const std::vector<Variable<double>>&, double,
                                  double, double*, int64_t*, const ParallelFor&, const Turn&);

}  // namespace nlcg

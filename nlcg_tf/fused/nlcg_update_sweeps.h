// The inner loops of the CPU kernel, a vector of elements at a time.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_SWEEPS_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_SWEEPS_H_

#include <cstdint>
#include <cstring>

#include "nlcg_update.h"
#include "nlcg_update_formulas.h"
#include "nlcg_update_stages.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace nlcg {
namespace {

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
  if (nesterov)
    d = Direction(g_prev, old_divisor, d, previous.gradient_factor, previous.direction_factor);
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
  V check = {}, gq = {}, inverse = {}, gq_previous = {}, gg = {}, new_slope = {}, old_slope = {};
  V qq = {}, qd = {}, dd = {};
  NLCG_HOST_DEVICE void Add(V g, V quotient, int64_t i, int64_t n) {
    check += g - g;
    gq += g * quotient;
    gg += g * g;
    qq += quotient * quotient;
    if (rule != kBlended) return;
    const V d = Load(v.d + i, n);
    qd += quotient * d;
    dd += d * d;
  }
  NLCG_HOST_DEVICE void AddGqPrevious(V g, V old_divisor, int64_t i, int64_t n) {
    if (rule == kPolakRibiere) gq_previous += g * (Load(v.g_prev + i, n) / old_divisor);
  }
  NLCG_HOST_DEVICE void AddSlopes(V g, V old_divisor, T step, int64_t i, int64_t n) {
    if (rule != kBlended) return;
    const V g_prev = Load(v.g_prev + i, n);
    const V s = LastStep(v, previous, step, nesterov, g_prev, old_divisor, i, n);
    new_slope += g * s;
    old_slope += g_prev * s;
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {{Sum<T>(check), Sum<T>(gq), Sum<T>(inverse), Sum<T>(gq_previous), Sum<T>(gg),
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
    sums.AddGqPrevious(g, h_before + epsilon, i, n);
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
    sums.AddGqPrevious(g, divisor, i, n);
    sums.AddSlopes(g, divisor, step, i, n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return sums.Result(); }
};

// P g, where the caller computes it.
template <typename T>
struct GivenBody {
  const Variable<T>& v;
  DirectionSums<T> sums;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    sums.Add(Load(v.g + i, n), Load(v.preconditioned + i, n), i, n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return sums.Result(); }
};

template <typename T, int kPreconditioner, bool kLars>
struct StepBody {
  using V = typename Simd<T>::Vector;
  const Variable<T>& v;
  const Stage<T>& stage;
  const T epsilon, decay_rate;
  const bool nesterov, stream;
  V gd = {}, gg = {}, dd = {}, ww = {};
  ExactSum<T> next_gd = {}, next_shs = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = Load(v.g + i, n), w = Load(v.w + i, n);
    V h = V{} + T(1);
    if (kPreconditioner == kBfgs) h = Load(v.h + i, n);
    V divided = g, divisor = h;
    if (kPreconditioner == kGiven) {
      divided = Load(v.preconditioned + i, n);
    } else {
      divisor += epsilon;
    }
    const V d = Direction(divided, divisor, Load(v.d + i, n), stage.scale, stage.beta);
    V step = d;
    if (nesterov)
      step = Direction(divided, divisor, d, stage.gradient_factor, stage.direction_factor);
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
      const bool is_given = preconditioner == kGiven;
      if (v.h != nullptr) h = Load(v.h + i, n);
      if (!is_given) h += epsilon;
      const V divided = Load((is_given ? v.preconditioned : v.g) + i, n);
      d = Direction(divided, h, d, stage.gradient_factor, stage.direction_factor);
    }
    Store(v.w + i, Weight(Load(v.w + i, n), d, decay_rate, step), n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return {}; }
};

}  // namespace
}  // namespace nlcg

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_SWEEPS_H_

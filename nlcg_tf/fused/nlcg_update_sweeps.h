// The formulas of elements and the loops over them, shared by CPU and CUDA.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_SWEEPS_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_SWEEPS_H_

#include <cstdint>

#include "nlcg_update.h"
#include "nlcg_update_stages.h"

namespace nlcg {
namespace {

// The elements V that are taken at a time, a vector on the CPU and one in a thread of CUDA, and what is
// done with them. Defined by each of the two.
template <typename T>
struct Lanes;

template <typename V, typename T>
NLCG_HOST_DEVICE V HessianDiagonal(V h, V s, V y, T inv_shs, T inv_ys) {
  const V hs = h * s;
  // Each square is scaled as it is formed: y^2 alone overflows float32 beyond 1.8e19. An element that
  // overflows all the same keeps its value: an infinite h would never come back.
  const V updated = h - hs * (hs * inv_shs) + y * (y * inv_ys);
  return updated - updated == 0 ? (updated < 0 ? -updated : updated) : h;
}

// The direction, from the gradient and what it is divided by; and with other factors the look-ahead.
template <typename V, typename T>
NLCG_HOST_DEVICE V Direction(V g, V divisor, V d, T scale, T beta) {
  // What is clipped to 0 may be infinite.
  return scale == T(0) ? beta * d : beta * d - scale * (g / divisor);
}

// The bodies are functors, not lambdas: a lambda would not be compiled for its caller's instructions.

// The last step s, of `step` times the direction, on the elements from i on.
template <typename T, typename V>
NLCG_HOST_DEVICE V LastStep(const Variable<T>& v, const Previous<T>& previous, T step,
                            bool nesterov, V g_prev, V old_divisor, int64_t i, int64_t n) {
  V d = Lanes<T>::Load(v.d + i, n);
  if (nesterov)
    d = Direction(g_prev, old_divisor, d, previous.gradient_factor, previous.direction_factor);
  return step * d;
}

// BFGS: y's and s'hs, from all that they are made of.
template <typename T>
struct CurvatureBody {
  using L = Lanes<T>;
  using V = typename L::V;
  const Variable<T>& v;
  const Previous<T>& previous;
  const T epsilon, step;
  const bool nesterov;
  V check = {}, ys = {}, shs = {}, slope = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = L::Load(v.g + i, n), g_prev = L::Load(v.g_prev + i, n), h = L::Load(v.h + i, n);
    const V s = LastStep<T, V>(v, previous, step, nesterov, g_prev, h + epsilon, i, n);
    check += g - g;
    ys += (g - g_prev) * s;
    shs += s * (h * s);
    slope += g * s;
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {{L::Sum(check), L::Sum(ys), L::Sum(shs), L::Sum(slope)}};
  }
};

// The same where sweep 3 left the sums over the old gradient.
template <typename T>
struct ProductBody {
  using L = Lanes<T>;
  using V = typename L::V;
  const Variable<T>& v;
  V check = {};
  typename L::ExactSum gd = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = L::Load(v.g + i, n);
    check += g - g;
    gd.Add(g, L::Load(v.d + i, n));
  }
  NLCG_HOST_DEVICE Sums Result() const { return {{L::Sum(check), gd.Result()}}; }
};

// What beta needs, and for the blended rule the step's length and, without BFGS, the trapezoid test.
// BFGS: the new h.
template <typename T, int kPreconditioner>
struct DirectionBody {
  using L = Lanes<T>;
  using V = typename L::V;
  const Variable<T>& v;
  const Stage<T>& stage;
  const Previous<T>& previous;
  const T epsilon, step;
  const int rule;
  const bool nesterov;
  V check = {}, gq = {}, inverses = {}, gq_previous = {}, gg = {}, new_slope = {}, old_slope = {};
  V qq = {}, qd = {}, dd = {};
  int64_t elements = 0;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = L::Load(v.g + i, n);
    V q, old_divisor = V{} + (T(1) + epsilon);
    if (kPreconditioner == kBfgs) {
      V h = L::Load(v.h + i, n);
      old_divisor = h + epsilon;
      if (stage.accepted) {
        const V g_prev = L::Load(v.g_prev + i, n);
        const V s = LastStep<T, V>(v, previous, step, nesterov, g_prev, old_divisor, i, n);
        h = HessianDiagonal<V, T>(h, s, g - g_prev, stage.inv_shs, stage.inv_ys);
      }
      if (stage.forget != 0) h = h + stage.forget * (T(1) - h);
      if (stage.accepted || stage.forget != 0) L::Store(v.h + i, h, n);
      const V inverse = T(1) / (h + epsilon);
      q = g * inverse;
      // Elements that are not there have no part in the sum over 1 / h.
      inverses += L::Load(reinterpret_cast<const T*>(&inverse), n);
    } else {
      q = kPreconditioner == kGiven ? L::Load(v.preconditioned + i, n) : g / old_divisor;
    }
    elements += n;
    check += g - g;
    gq += g * q;
    gg += g * g;
    qq += q * q;
    if (rule == kPolakRibiere) gq_previous += g * (L::Load(v.g_prev + i, n) / old_divisor);
    if (rule != kBlended) return;
    const V d = L::Load(v.d + i, n);
    qd += q * d;
    dd += d * d;
    if (kPreconditioner == kBfgs) return;
    const V g_prev = L::Load(v.g_prev + i, n);
    const V s = LastStep<T, V>(v, previous, step, nesterov, g_prev, old_divisor, i, n);
    new_slope += g * s;
    old_slope += g_prev * s;
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {{L::Sum(check), L::Sum(gq), L::Sum(inverses), L::Sum(gq_previous), L::Sum(gg),
             L::Sum(new_slope), L::Sum(old_slope), L::Sum(qq), L::Sum(qd), L::Sum(dd),
             double(elements)}};
  }
};

// The direction, or the look-ahead, that follows from d.
template <typename T, int kPreconditioner, typename V>
NLCG_HOST_DEVICE V Next(const Variable<T>& v, V d, T epsilon, T scale, T beta, int64_t i,
                        int64_t n) {
  using L = Lanes<T>;
  V divisor = V{} + T(1);
  if (kPreconditioner == kBfgs) divisor = L::Load(v.h + i, n);
  if (kPreconditioner != kGiven) divisor += epsilon;
  const T* const divided = kPreconditioner == kGiven ? v.preconditioned : v.g;
  return Direction(L::Load(divided + i, n), divisor, d, scale, beta);
}

// With LARS the weights wait for LarsBody.
template <typename T, int kPreconditioner, bool kLars>
struct StepBody {
  using L = Lanes<T>;
  using V = typename L::V;
  const Variable<T>& v;
  const Stage<T>& stage;
  const T epsilon, decay_rate;
  const bool nesterov, stream;
  V gd = {}, gg = {}, dd = {}, ww = {};
  typename L::ExactSum next_gd = {}, next_shs = {};
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V g = L::Load(v.g + i, n), w = L::Load(v.w + i, n), d_prev = L::Load(v.d + i, n);
    const V d = Next<T, kPreconditioner>(v, d_prev, epsilon, stage.scale, stage.beta, i, n);
    V step = d;
    if (nesterov)
      step = Next<T, kPreconditioner>(v, d, epsilon, stage.gradient_factor, stage.direction_factor,
                                      i, n);
    if (kPreconditioner == kBfgs && !nesterov) {
      next_gd.Add(g, d);
      next_shs.Add(d, L::Load(v.h + i, n), d);
    }
    L::Store(v.d + i, d, n);
    if (stream && n == L::kCount) {
      L::Stream(v.g_prev_out + i, g);
    } else if (v.g_prev_out != nullptr) {
      L::Store(v.g_prev_out + i, g, n);
    }
    if (kLars) {
      ww += w * w;
    } else {
      L::Store(v.w + i, w - w * decay_rate + stage.alpha * step, n);
    }
    gd += g * step;
    gg += g * g;
    dd += step * step;
  }
  NLCG_HOST_DEVICE Sums Result() const {
    return {{L::Sum(gd), L::Sum(gg), L::Sum(dd), L::Sum(ww), next_gd.Result(), next_shs.Result()}};
  }
};

// LARS: the step, once its size is known. With the look-ahead g and its divisor make it anew.
template <typename T, int kPreconditioner>
struct LarsBody {
  using L = Lanes<T>;
  using V = typename L::V;
  const Variable<T>& v;
  const Stage<T>& stage;
  const T epsilon, decay_rate, size;
  const bool nesterov;
  NLCG_HOST_DEVICE void operator()(int64_t i, int64_t n) {
    const V w = L::Load(v.w + i, n);
    V step = L::Load(v.d + i, n);
    if (nesterov)
      step = Next<T, kPreconditioner>(v, step, epsilon, stage.gradient_factor,
                                      stage.direction_factor, i, n);
    L::Store(v.w + i, w - w * decay_rate + size * step, n);
  }
  NLCG_HOST_DEVICE Sums Result() const { return {}; }
};

template <typename T, typename Body>
NLCG_HOST_DEVICE Sums Run(Body body, int64_t begin, int64_t end) {
  Lanes<T>::ForEach(begin, end, body);
  return body.Result();
}

template <typename T>
NLCG_HOST_DEVICE Sums RunCurvature(const Variable<T>& v, const Previous<T>& previous, T epsilon,
                                   T step, bool nesterov, int64_t begin, int64_t end) {
  if (!SumsAreKept(v)) {
    return Run<T>(CurvatureBody<T>{v, previous, epsilon, step, nesterov}, begin, end);
  }
  Sums sums = Run<T>(ProductBody<T>{v}, begin, end);
  sums.values[kSlope] = sums.values[kYs] * step;
  if (begin == 0) sums.values[kYs] -= KeptSum(v, 0);
  sums.values[kYs] *= step;
  sums.values[kShs] = begin == 0 ? KeptSum(v, 1) * step * step : 0;
  return sums;
}

// The sums of a sweep over the elements of a variable from `begin` on.
template <typename T, int kPreconditioner>
NLCG_HOST_DEVICE Sums RunSweep(Sweep sweep, const Settings& settings, const Stage<T>& stage,
                               const Previous<T>& previous, const Variable<T>& v, int64_t begin,
                               int64_t end) {
  const T epsilon = T(settings.epsilon), decay_rate = T(v.weight_decay) * stage.learning_rate;
  const T ratio = v.trust_ratio != nullptr ? *v.trust_ratio : T(1), step = previous.size * ratio;
  const bool nesterov = settings.nesterov;
  if (sweep == kSweepCurvature) {
    return RunCurvature(v, previous, epsilon, step, nesterov, begin, end);
  }
  if (sweep == kSweepDirection) {
    using Body = DirectionBody<T, kPreconditioner>;
    return Run<T>(Body{v, stage, previous, epsilon, step, settings.rule, nesterov}, begin, end);
  }
  if (sweep == kSweepLars) {
    using Body = LarsBody<T, kPreconditioner>;
    return Run<T>(Body{v, stage, epsilon, decay_rate, stage.alpha * ratio, nesterov}, begin, end);
  }
  // Only variables that do not stay in a cache until the next update gain by it.
  const bool stream = v.g_prev_out != nullptr && v.size >= 65536 &&
                      reinterpret_cast<uintptr_t>(v.g_prev_out) % 16 == 0;
  if (settings.lars_coefficient > 0) {
    using Body = StepBody<T, kPreconditioner, true>;
    return Run<T>(Body{v, stage, epsilon, decay_rate, nesterov, stream}, begin, end);
  }
  using Body = StepBody<T, kPreconditioner, false>;
  return Run<T>(Body{v, stage, epsilon, decay_rate, nesterov, stream}, begin, end);
}

}  // namespace
}  // namespace nlcg

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_SWEEPS_H_

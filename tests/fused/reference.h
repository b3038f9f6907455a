// The variables of a test, and an update of them by a plain double-precision loop.

#ifndef NLCG_TF_TESTS_FUSED_REFERENCE_H_
#define NLCG_TF_TESTS_FUSED_REFERENCE_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "nlcg_update.h"

inline uint32_t random_state = 1;
inline double Random() {  // in [-1, 1)
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) / 8388608.0 - 1.0;
}

constexpr int kSearched = 2;

// Exactly as many bytes as there are elements, so that the sanitizer sees a step beyond; `offset`
// elements make the pointers unaligned to vectors.
template <typename T>
struct Buffers {
  std::vector<std::vector<T>> w, d, h, g_prev, g, preconditioned;
  std::vector<T> ratios;
  std::vector<T> sums;  // of BFGS, for each variable four
  std::vector<T> reals;
  std::vector<int64_t> counts;
  int offset;

  Buffers(const std::vector<int64_t>& sizes, int offset) : offset(offset) {
    for (int64_t size : sizes) {
      for (auto* buffers : {&w, &d, &h, &g_prev, &g, &preconditioned}) {
        buffers->emplace_back(size + offset);
        for (T& x : buffers->back()) x = T(buffers == &h ? 1.0 : Random());
      }
      for (T& x : d.back()) x = 0;
      for (T& x : g_prev.back()) x = 0;
    }
    ratios.assign(sizes.size(), T(1));
    sums.assign(4 * sizes.size(), T(-1));
    reals.assign(nlcg::kReals + kSearched, T(0));
    counts.assign(4, 0);
  }

  std::vector<nlcg::Variable<T>> Variables(const nlcg::Settings& settings, bool adopt) {
    std::vector<nlcg::Variable<T>> variables;
    for (size_t i = 0; i < w.size(); ++i) {
      nlcg::Variable<T> v;
      v.w = w[i].data() + offset;
      v.d = d[i].data() + offset;
      const bool keeps_gradient = nlcg::KeepsGradient(settings);
      v.h = nlcg::UsesBfgs(settings) ? h[i].data() + offset : nullptr;
      const bool is_given = settings.preconditioner == nlcg::kGiven;
      v.preconditioned = is_given ? preconditioned[i].data() + offset : nullptr;
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
class Reference {
 public:
  Reference(const nlcg::Settings& settings, Buffers<T>* buffers, const std::vector<T>& given)
      : s(settings),
        b(buffers),
        reals(buffers->reals.data()),
        given(given),
        rate(given[0]),
        loss(given[2]) {
    first = b->counts[nlcg::kUpdates] == 0;
    bfgs = nlcg::UsesBfgs(s);
    scaled = s.preconditioner == nlcg::kNormalizedBfgs;
    scale_prev = scaled ? reals[nlcg::kPreconditionerMean] : 1;
    beta_prev = reals[nlcg::kBeta];
    cap_prev = reals[nlcg::kClipFactor];
    ahead_prev = s.nesterov ? 1 - reals[nlcg::kGainRatio] : 0;
  }

  void Update() {
    AddUp();
    if (s.rule == nlcg::kBlended) MeasureGainRatio();
    UpdateDiagonal();
    FindBeta();
    alpha = factor * given[1];
    if (s.rule == nlcg::kBlended) CapLength();
    for (size_t v = 0; v < b->w.size(); ++v) Step(v);
    WriteScalars();
  }

 private:
  template <typename Body>
  void Each(Body body) const {
    for (size_t v = 0; v < b->w.size(); ++v) {
      for (size_t i = b->offset; i < b->w[v].size(); ++i) body(v, i);
    }
  }

  double Divisor(size_t v, size_t i) const {
    const double eps = s.epsilon;
    return bfgs ? b->h[v][i] + eps : 1 + eps;
  }

  double Quotient(size_t v, size_t i) const {
    if (s.preconditioner == nlcg::kGiven) return b->preconditioned[v][i];
    return b->g[v][i] / Divisor(v, i);
  }

  double LastStep(size_t v, size_t i) const {
    const double d = b->d[v][i], z = -scale_prev * b->g_prev[v][i] / Divisor(v, i);
    const double ahead = cap_prev * z + beta_prev * d - d;
    return reals[nlcg::kStepSize] * b->ratios[v] * (d + ahead_prev * ahead);
  }

  void AddUp() {
    Each([&](size_t v, size_t i) {
      const double g = b->g[v][i], p = b->g_prev[v][i], step = LastStep(v, i);
      ys += (g - p) * step;
      shs += step * b->h[v][i] * step;
      mid += g * p / Divisor(v, i);
      gg += g * g;
      slope += g * step;
      old_slope += p * step;
      elements += 1;
    });
  }

  void MeasureGainRatio() {
    const double error = loss - reals[nlcg::kLastLoss] - (slope + old_slope) / 2;
    if (!first) {
      const double old = b->counts[nlcg::kUpdates] > 1 ? 0.9 : 0;
      const double left = std::fmax(std::abs(error) - 1e-6 * std::abs(loss), 0);
      const double predicted_change = (std::abs(slope) + std::abs(old_slope)) / 2;
      reals[nlcg::kPredictionError] = T(old * reals[nlcg::kPredictionError] + (1 - old) * left);
      reals[nlcg::kPredictedChange] =
          T(old * reals[nlcg::kPredictedChange] + (1 - old) * predicted_change);
      if (reals[nlcg::kPredictedChange] > 0) {
        gain_ratio = 1 - double(reals[nlcg::kPredictionError]) / reals[nlcg::kPredictedChange];
      }
      gain_ratio = std::fmin(std::fmax(gain_ratio, 0), 1);
    }
    reals[nlcg::kLastLoss] = T(loss);
    if (first) reals[nlcg::kMeanSquaredNorm] = reals[nlcg::kFirstSquaredNorm] = T(gg);
    if (!first)
      reals[nlcg::kMeanSquaredNorm] = T(0.99 * reals[nlcg::kMeanSquaredNorm] +
                                        0.01 * std::fmin(gg, 100 * reals[nlcg::kMeanSquaredNorm]));
    if (gg > 0) {
      factor = std::pow(reals[nlcg::kFirstSquaredNorm] / reals[nlcg::kMeanSquaredNorm],
                        (1 - gain_ratio) / 2);
    }
  }

  void UpdateDiagonal() {
    const bool resolved = ys > 1e-4 * (std::abs(slope) + std::abs(old_slope));
    accepted = bfgs && !first && resolved && ys > 1e-30 && shs > 1e-30;
    Each([&](size_t v, size_t i) {
      const double g = b->g[v][i], y = g - b->g_prev[v][i], step = LastStep(v, i);
      double h = b->h[v][i];
      if (accepted) h = std::abs(h - h * step * h * step / shs + y * y / ys);
      if (bfgs) h += (1 - s.decay) * (1 - gain_ratio) * (1 - h);
      b->h[v][i] = T(h);
      fresh += g * Quotient(v, i);
      inverses += 1 / Divisor(v, i);
    });
    mean = bfgs && elements > 0 ? elements / inverses : 1;
    scale = scaled ? mean : 1;
  }

  void FindBeta() {
    const double top = scale * fresh - (s.rule == nlcg::kPolakRibiere ? scale_prev * mid : 0);
    beta = std::fmin(std::fmax(top / (reals[nlcg::kDelta] + 1e-30), 0), 1);
    if (s.rule == nlcg::kBlended) beta = gain_ratio * beta + (1 - gain_ratio) * s.momentum;
    if (first) beta = 0;
    if (s.rule == nlcg::kMomentum) beta = s.momentum;
  }

  // The direction d, and what the look-ahead makes of it.
  struct Moved {
    double d, step;
  };
  Moved Move(size_t v, size_t i) const {
    const double ahead = s.nesterov ? 1 - gain_ratio : 0;
    const double z = -scale * Quotient(v, i), d = beta * b->d[v][i] + z;
    return {d, d + ahead * (z + beta * d - d)};
  }

  void CapLength() {
    double length = 0;
    Each([&](size_t v, size_t i) {
      const double step = factor * Move(v, i).step;
      length += step * step;
    });
    length = std::sqrt(length);
    const double mean_update_norm = reals[nlcg::kMeanUpdateNorm];
    if (mean_update_norm == 0) {
      reals[nlcg::kMeanUpdateNorm] = T(length / (1 - s.momentum));
    } else {
      cap = std::fmin(1, 2 * mean_update_norm / length);
      reals[nlcg::kMeanUpdateNorm] = T(0.9 * mean_update_norm + 0.1 * cap * length);
    }
  }

  void Step(size_t v) {
    double ww = 0, norm = 0;
    std::vector<double> steps(b->w[v].size());
    for (size_t i = b->offset; i < b->w[v].size(); ++i) {
      const Moved moved = Move(v, i);
      steps[i] = cap * moved.step;
      b->d[v][i] = T(cap * moved.d);
      gd += b->g[v][i] * steps[i];
      dd += steps[i] * steps[i];
      norm += steps[i] * steps[i];
      ww += double(b->w[v][i]) * b->w[v][i];
    }
    if (s.lars_coefficient > 0) {
      const double ratio = s.lars_coefficient * std::sqrt(ww) / (std::sqrt(norm) + s.epsilon);
      b->ratios[v] = ww > 0 ? T(ratio) : T(1);
    }
    for (size_t i = b->offset; i < b->w[v].size(); ++i) {
      const double w = b->w[v][i], decay = v % 2 ? 0.01 : 0.0;
      b->w[v][i] = T(w - w * decay * rate + alpha * b->ratios[v] * steps[i]);
      if (nlcg::KeepsGradient(s)) b->g_prev[v][i] = b->g[v][i];
    }
  }

  void WriteScalars() {
    reals[nlcg::kDelta] = T(scale * fresh);
    reals[nlcg::kStepSize] = T(alpha);
    reals[nlcg::kBeta] = T(beta);
    reals[nlcg::kCurvature] = bfgs ? T(ys) : T(0);
    reals[nlcg::kCosine] = gg > 0 && dd > 0 ? T(-gd / std::sqrt(gg) / std::sqrt(dd)) : T(0);
    reals[nlcg::kGainRatio] = T(gain_ratio);
    reals[nlcg::kPreconditionerMean] = T(mean);
    reals[nlcg::kClipFactor] = T(cap);
    for (int i = 0; i < s.searched; ++i) reals[nlcg::kReals + i] = given[3 + i];
    b->counts[nlcg::kUpdates] += 1;
    b->counts[nlcg::kRejectedCurvatures] += bfgs && !first && !accepted;
    b->counts[nlcg::kLastUpdateApplied] = 1;
  }

  const nlcg::Settings& s;
  Buffers<T>* const b;
  T* const reals;
  const std::vector<T> given;
  const double rate, loss;
  bool first, bfgs, scaled, accepted = false;
  double scale_prev, beta_prev, cap_prev, ahead_prev;
  double elements = 0, ys = 0, shs = 0, mid = 0, slope = 0, old_slope = 0, gg = 0;
  double fresh = 0, inverses = 0, gd = 0, dd = 0;
  double gain_ratio = 0, factor = 1, mean = 1, scale = 1, beta = 0, alpha = 0, cap = 1;
};

#endif  // NLCG_TF_TESTS_FUSED_REFERENCE_H_

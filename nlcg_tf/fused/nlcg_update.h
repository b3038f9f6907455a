// The NLCG update (Adya, Palakkode & Tuzel 2018, arXiv 1812.02886), section 2 and 3: what the CPU and
// the CUDA kernel share. No TensorFlow here: plain pointers, sizes, a stream.
//
// Three sweeps over the parameters are the least that the algorithm allows, since h needs y's and
// s'hs of all variables, and beta needs delta of the new h:
//
//   1. read g, g_prev, d, h             -> ys, shs, delta_mid, whether g is finite
//   2. read g, g_prev, d, h, write h    -> delta_new
//   3. read g, h, d, w, write d, w, g_prev -> the sums for the cosine
//
// Sums are taken over chunks of fixed size, in fixed order: the bits do not depend on the number of
// threads. Nothing is written before it is known whether the update is to be skipped.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_H_

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#if defined(__CUDACC__)
#define NLCG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NLCG_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace nlcg {

// Positions in the optimizer's two vectors of scalars; optimizer.py has the same lists.
enum Real { kDelta, kStepSize, kBeta, kCurvature, kCosine, kScale, kLoss, kComparedLoss };
enum Count { kUpdates, kSkipped, kRejected, kLastApplied, kCounts };

enum Rule { kFletcherReeves, kPolakRibiere };
enum LineSearch { kNoLineSearch, kOnline, kStep };

constexpr int kMaxLimits = 16;

struct Settings {
  bool preconditioner;
  int rule;
  int line_search;
  double epsilon;
  double lars_coefficient;  // 0: off
  // Online line search
  double decrease_threshold, increase_threshold, decrease_factor;
  // Step line search
  int period, limit_count;
  double smoothing, limits[kMaxLimits], factors[kMaxLimits];
  // Both
  double increase_factor, minimum_scale;
};

// The number of reals that the settings need.
inline int RealCount(const Settings& settings) {
  return settings.line_search == kNoLineSearch ? kScale
         : settings.line_search == kOnline     ? kLoss + 1
                                               : kComparedLoss + 1;
}

template <typename T>
struct Variable {
  T* w;
  T* d;
  T* h;             // null without preconditioner
  const T* g_prev;
  T* g_prev_out;    // null: the caller keeps the buffer of g as the next g_prev
  const T* g;
  T* trust_ratio;   // the LARS factor of this variable's last step; null: 1
  int64_t size;
  double weight_decay;
};

// What one sweep tells the next; the new scalars wait here until the update is known to be done.
template <typename T>
struct Stage {
  bool skip, first, accepted;
  T step_prev, inv_ys, inv_shs;
  T beta, alpha, learning_rate;
  double delta_mid;
  T reals[kComparedLoss + 1];
};

NLCG_HOST_DEVICE bool Finite(double x) { return x - x == 0; }

// The elementwise formulas, for a scalar or a vector of elements V and its scalar type T.

template <typename V>
NLCG_HOST_DEVICE V Abs(V x) {
  return x < 0 ? -x : x;
}

template <typename V, typename T>
NLCG_HOST_DEVICE V HessianDiagonal(V h, V s, V y, T inv_shs, T inv_ys) {
  const V hs = h * s;
  // Each square is scaled as it is formed: y^2 alone overflows float32 beyond 1.8e19. An element that
  // overflows all the same keeps its value: an infinite h would never come back.
  const V updated = h - hs * (hs * inv_shs) + y * (y * inv_ys);
  return updated - updated == 0 ? Abs(updated) : h;
}

template <typename V, typename T>
NLCG_HOST_DEVICE V Direction(V g, V h, V d, T epsilon, T beta) {
  return beta * d - g / (h + epsilon);
}

template <typename V, typename T>
NLCG_HOST_DEVICE V Weight(V w, V d, T decay_rate, T step) {
  return w - w * decay_rate + step * d;
}

// The scalar logic between the sweeps.

NLCG_HOST_DEVICE double Bounded(const Settings& settings, double scale) {
  return scale < settings.minimum_scale ? settings.minimum_scale : scale > 1 ? 1 : scale;
}

// The line search and the step size: section 3.2.2. Needs no sums, so that a loss that is not finite
// is known before anything is written.
template <typename T>
NLCG_HOST_DEVICE void Begin(const Settings& settings, const T* reals, const int64_t* counts,
                            T learning_rate, T loss, Stage<T>* stage) {
  const int64_t updates = counts[kUpdates];
  stage->first = updates == 0;
  stage->step_prev = reals[kStepSize];
  double scale = 1;
  if (settings.line_search != kNoLineSearch) scale = reals[kScale];
  if (settings.line_search == kOnline) {
    const double previous = reals[kLoss], magnitude = fabs(previous);
    if (!stage->first) {
      if (loss > previous + settings.decrease_threshold * magnitude) {
        scale = Bounded(settings, scale * settings.decrease_factor);
      } else if (loss < previous + settings.increase_threshold * magnitude) {
        scale = Bounded(settings, scale * settings.increase_factor);
      }
    }
    stage->reals[kLoss] = loss;
  } else if (settings.line_search == kStep) {
    double average = loss, compared = loss;
    if (!stage->first) {
      average = settings.smoothing * reals[kLoss] + (1 - settings.smoothing) * loss;
      compared = reals[kComparedLoss];
      if (updates % settings.period == 0) {
        const double ratio = compared == 0 ? 1 : average / compared;
        double factor = settings.increase_factor;
        for (int i = settings.limit_count - 1; i >= 0; --i) {
          if (ratio > settings.limits[i]) factor = settings.factors[i];
        }
        scale = Bounded(settings, scale * factor);
        compared = average;
      }
    }
    stage->reals[kLoss] = T(average);
    stage->reals[kComparedLoss] = T(compared);
  }
  stage->reals[kScale] = T(scale);
  stage->alpha = learning_rate * T(scale);
  stage->reals[kStepSize] = stage->alpha;
  stage->learning_rate = learning_rate;
  stage->skip = !Finite(stage->alpha) ||
                (settings.line_search != kNoLineSearch && !Finite(loss));
}

// After sweep 1. `gradient_check` is 0 where all gradients are finite, NaN otherwise.
template <typename T>
NLCG_HOST_DEVICE void FinishCurvature(const Settings& settings, double gradient_check, double ys,
                                      double shs, double delta_mid, Stage<T>* stage) {
  const T epsilon = T(settings.epsilon), curvature = T(ys), scaled = T(shs);
  stage->skip = stage->skip || gradient_check != 0;
  stage->accepted = settings.preconditioner && !stage->first && curvature > epsilon &&
                    scaled > epsilon && Finite(curvature) && Finite(scaled);
  stage->inv_ys = T(1) / (curvature + epsilon);
  stage->inv_shs = T(1) / (scaled + epsilon);
  stage->delta_mid = delta_mid;
  stage->reals[kCurvature] = settings.preconditioner ? curvature : T(0);
}

// After sweep 2.
template <typename T>
NLCG_HOST_DEVICE void FinishDirection(const Settings& settings, const T* reals, double delta_new,
                                      Stage<T>* stage) {
  const T delta = T(delta_new);
  double beta = delta;
  if (settings.rule == kPolakRibiere) beta = double(delta) - T(stage->delta_mid);
  beta = beta / (reals[kDelta] + T(settings.epsilon));
  // Where the sums overflowed the direction starts again from steepest descent.
  if (stage->first || !Finite(beta) || beta < 0) beta = 0;
  stage->beta = T(beta > 1 ? 1 : beta);
  stage->reals[kDelta] = delta;
  stage->reals[kBeta] = stage->beta;
}

// After sweep 3: the scalars are written.
template <typename T>
NLCG_HOST_DEVICE void FinishStep(const Settings& settings, int real_count, double gd, double gg,
                                 double dd, Stage<T>* stage, T* reals, int64_t* counts) {
  counts[kLastApplied] = stage->skip ? 0 : 1;
  if (stage->skip) {
    counts[kSkipped] += 1;
    return;
  }
  const double norms = sqrt(gg) * sqrt(dd);
  stage->reals[kCosine] = norms > 0 ? T(-gd / norms) : T(0);
  for (int i = 0; i < real_count; ++i) reals[i] = stage->reals[i];
  counts[kUpdates] += 1;
  if (settings.preconditioner && !stage->first && !stage->accepted) counts[kRejected] += 1;
}

template <typename T>
NLCG_HOST_DEVICE T TrustRatio(const Settings& settings, double ww, double dd) {
  const double norm = sqrt(ww);
  return norm > 0 ? T(settings.lars_coefficient * norm / (sqrt(dd) + settings.epsilon)) : T(1);
}

// Calls work(begin, end) on parts of [0, count), perhaps at the same time.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>&)>;

// One update on the CPU. All pointers but those that may be null point to `size` elements, no two of
// those that are written overlap. Returns whether the update was done, not skipped.
template <typename T>
bool UpdateOnCpu(const Settings& settings, const std::vector<Variable<T>>& variables,
                 T learning_rate, T loss, T* reals, int64_t* counts,
                 const ParallelFor& parallel_for);

}  // namespace nlcg

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_H_

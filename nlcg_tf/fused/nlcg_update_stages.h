// The scalar logic between the sweeps; reference.py has stages of the same names.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_STAGES_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_STAGES_H_

#include <cmath>
#include <cstdint>

#include "nlcg_update.h"

namespace nlcg {

NLCG_HOST_DEVICE double ClippedToOne(double x) {
  // Where the sums overflowed the direction starts again from steepest descent.
  return !Finite(x) || x < 0 ? 0 : x > 1 ? 1 : x;
}

// The step is (1 - a) d + a (z + beta d) with a = 1 - gain_ratio: the factors of d, and of the
// divided gradient.
template <typename T>
NLCG_HOST_DEVICE void LookAhead(T beta, T scale, T gain_ratio, T* direction_factor,
                                T* gradient_factor) {
  const T look_ahead = T(1) - gain_ratio;
  *direction_factor = T(1) - look_ahead + look_ahead * beta;
  *gradient_factor = look_ahead * scale;
}

// What made up the last step; the scalars still are those of the update before.
template <typename T>
struct Previous {
  T size, scale, direction_factor, gradient_factor;
  NLCG_HOST_DEVICE Previous(const Settings& settings, const T* reals)
      : size(reals[kStepSize]), scale(IsScaled(settings) ? reals[kPreconditionerMean] : T(1)) {
    LookAhead(reals[kBeta], scale * reals[kClipFactor], reals[kGainRatio], &direction_factor,
              &gradient_factor);
  }
};

// Needs no sums, so that a rate or a loss that is not finite is known before anything is written.
template <typename T>
NLCG_HOST_DEVICE void Begin(const T* reals, const int64_t* counts, const T* given,
                            Stage<T>* stage) {
  *stage = {};
  stage->first = counts[kUpdates] == 0;
  for (int i = kLastLoss; i <= kMeanUpdateNorm; ++i) stage->reals[i] = reals[i];
  stage->loss = given[kLoss];
  stage->learning_rate = given[kLearningRate];
  stage->alpha = stage->reals[kStepSize] = given[kScaledRate];
  stage->skip = !Finite(stage->alpha) || !Finite(stage->loss);
}

// The gain ratio (noise.py), from g's and g_prev's.
template <typename T>
NLCG_HOST_DEVICE void MeasureGainRatio(const T* reals, const int64_t* counts, double slope,
                                       double previous_slope, Stage<T>* stage) {
  const double loss = stage->loss;
  const double difference = loss - reals[kLastLoss] - (slope + previous_slope) / 2;
  double error = fabs(difference) - kRounding * fabs(loss);
  if (error < 0) error = 0;
  const double change = (fabs(slope) + fabs(previous_slope)) / 2;
  if (!stage->first && Finite(error) && Finite(change)) {
    const double memory = counts[kUpdates] > 1 ? kMemory : 0;
    stage->reals[kPredictionError] = T(memory * reals[kPredictionError] + (1 - memory) * error);
    stage->reals[kPredictedChange] = T(memory * reals[kPredictedChange] + (1 - memory) * change);
  }
  stage->reals[kLastLoss] = stage->loss;
  const double prediction_error = stage->reals[kPredictionError];
  stage->gain_ratio = ClippedToOne(1 - prediction_error / stage->reals[kPredictedChange]);
}

// Gradient-norm normalization (noise.py).
template <typename T>
NLCG_HOST_DEVICE double NormFactor(double square, const T* reals, Stage<T>* stage) {
  if (Finite(T(square))) {
    const double mean = reals[kMeanSquaredNorm];
    if (mean > 0) {
      if (square > kOutlier * mean) square = kOutlier * mean;
      square = kNormMemory * mean + (1 - kNormMemory) * square;
    }
    stage->reals[kMeanSquaredNorm] = T(square);
    if (reals[kFirstSquaredNorm] == 0) stage->reals[kFirstSquaredNorm] = T(square);
  }
  const double mean = stage->reals[kMeanSquaredNorm], first = stage->reals[kFirstSquaredNorm];
  const double factor = exp((1 - stage->gain_ratio) / 2 * (log(first) - log(mean)));
  return Finite(factor) ? factor : 1;
}

// Update clipping (noise.py).
template <typename T>
NLCG_HOST_DEVICE double UpdateClip(double norm, double momentum, const T* reals, Stage<T>* stage) {
  if (!Finite(T(norm))) return 0;
  const double mean = reals[kMeanUpdateNorm];
  if (!(mean > 0)) {
    stage->reals[kMeanUpdateNorm] = T(norm / (1 - momentum));
    return 1;
  }
  const double clip_factor = norm > kGrowth * mean ? kGrowth * mean / norm : 1;
  stage->reals[kMeanUpdateNorm] = T(kMemory * mean + (1 - kMemory) * clip_factor * norm);
  return clip_factor;
}

// After sweep 1 of BFGS.
template <typename T>
NLCG_HOST_DEVICE void FinishCurvature(const Settings& settings, const T* reals,
                                      const int64_t* counts, const Sums& sums, Stage<T>* stage) {
  const T curvature = T(sums.values[kYs]), scaled = T(sums.values[kShs]);
  const double slope = sums.values[kSlope], previous_slope = slope - sums.values[kYs];
  stage->skip = stage->skip || sums.values[kCheck] != 0;
  stage->accepted = !stage->first && curvature > T(kTiny) && scaled > T(kTiny) &&
                    curvature > kResolution * (fabs(slope) + fabs(previous_slope)) &&
                    Finite(curvature) && Finite(scaled);
  stage->inv_ys = T(1) / curvature;
  stage->inv_shs = T(1) / scaled;
  stage->reals[kCurvature] = curvature;
  if (settings.rule == kBlended) {
    MeasureGainRatio(reals, counts, slope, previous_slope, stage);
  }
  stage->forget = T((1 - settings.decay) * (1 - stage->gain_ratio));
}

// After sweep 2, or the first one without BFGS.
template <typename T>
NLCG_HOST_DEVICE void FinishDirection(const Settings& settings, const T* reals,
                                      const int64_t* counts, const Sums& sums, Stage<T>* stage) {
  stage->skip = stage->skip || sums.values[kCheck] != 0;
  double mean = 1;
  if (UsesBfgs(settings)) {
    const double elements = sums.values[kElements];
    if (elements > 0) mean = elements / sums.values[kInverse];
  } else {
    stage->reals[kCurvature] = 0;
    if (settings.rule == kBlended) {
      MeasureGainRatio(reals, counts, sums.values[kNewSlope], sums.values[kOldSlope], stage);
    }
  }
  stage->reals[kPreconditionerMean] = T(mean);
  stage->scale = IsScaled(settings) ? T(mean) : T(1);
  const T delta = T(stage->scale * sums.values[kGq]);
  double top = delta;
  if (settings.rule == kPolakRibiere)
    top -= T(Previous<T>(settings, reals).scale * sums.values[kGqPrevious]);
  double beta = ClippedToOne(top / (reals[kDelta] + T(kTiny)));
  if (settings.rule == kBlended) {
    beta = stage->gain_ratio * beta + (1 - stage->gain_ratio) * settings.momentum;
  }
  if (stage->first) beta = 0;
  if (settings.rule == kMomentum) beta = settings.momentum;
  stage->beta = T(beta);
  stage->reals[kDelta] = delta;
  stage->reals[kBeta] = stage->beta;
  stage->reals[kGainRatio] = T(stage->gain_ratio);
  LookAhead(stage->beta, stage->scale, T(stage->gain_ratio), &stage->direction_factor,
            &stage->gradient_factor);
  stage->reals[kClipFactor] = 1;
  if (settings.rule != kBlended) return;
  // The step is of_d d - of_q q.
  double of_d = stage->beta, of_q = stage->scale;
  if (settings.nesterov) {
    of_d *= stage->direction_factor;
    of_q = stage->direction_factor * of_q + stage->gradient_factor;
  }
  double square = of_d * of_d * sums.values[kDd] + of_q * of_q * sums.values[kQq];
  square -= 2 * of_d * of_q * sums.values[kQd];
  const double factor = NormFactor(sums.values[kGg], reals, stage);
  const double norm = factor * sqrt(square < 0 ? 0 : square);
  const T clip_factor = T(UpdateClip(norm, settings.momentum, reals, stage));
  stage->reals[kClipFactor] = clip_factor;
  for (T* x : {&stage->beta, &stage->scale, &stage->gradient_factor}) *x *= clip_factor;
  // Sweep 2 has written h: it is too late to skip the update where the factor overflows.
  const T alpha = stage->alpha * T(factor);
  if (Finite(alpha)) stage->alpha = stage->reals[kStepSize] = alpha;
}

// After sweep 3: the scalars are written.
template <typename T>
NLCG_HOST_DEVICE void FinishStep(const Settings& settings, const T* given, const Sums& sums,
                                 Stage<T>* stage, T* reals, int64_t* counts) {
  counts[kLastUpdateApplied] = stage->skip ? 0 : 1;
  if (stage->skip) {
    counts[kSkippedUpdates] += 1;
    return;
  }
  const double norms = sqrt(sums.values[kStepGg]) * sqrt(sums.values[kStepDd]);
  const double cosine = -sums.values[kStepGd] / norms;  // sums may overflow
  stage->reals[kCosine] = norms > 0 && Finite(cosine) ? T(cosine) : T(0);
  for (int i = 0; i < kReals; ++i) reals[i] = stage->reals[i];
  for (int i = 0; i < settings.searched; ++i) reals[kReals + i] = given[kSearched + i];
  counts[kUpdates] += 1;
  if (UsesBfgs(settings) && !stage->first && !stage->accepted) counts[kRejectedCurvatures] += 1;
}

// After any sweep.
template <typename T>
NLCG_HOST_DEVICE void Finish(const Settings& settings, int sweep, const T* given, const Sums& sums,
                             Stage<T>* stage, T* reals, int64_t* counts) {
  if (sweep == kSweepStep) {
    FinishStep(settings, given, sums, stage, reals, counts);
  } else if (!stage->skip && sweep == kSweepCurvature) {
    FinishCurvature(settings, reals, counts, sums, stage);
  } else if (!stage->skip) {
    FinishDirection(settings, reals, counts, sums, stage);
  }
}

// After sweep 3, for one variable and the sums over it alone: what its next step and the next sweep 1
// need. A double is kept as two numbers of type T.
template <typename T>
NLCG_HOST_DEVICE void FinishVariable(const Settings& settings, const Sums& sums,
                                     const Variable<T>& v) {
  if (v.trust_ratio != nullptr) {
    const double norm = sqrt(sums.values[kStepWw]);
    const double ratio =
        settings.lars_coefficient * norm / (sqrt(sums.values[kStepDd]) + settings.epsilon);
    *v.trust_ratio = norm > 0 ? T(ratio) : T(1);
  }
  if (v.curvature_sums != nullptr) {
    for (int i = 0; i < 2; ++i) {
      const double sum = sums.values[kNextGd + i];
      v.curvature_sums[2 * i] = T(sum);
      v.curvature_sums[2 * i + 1] = T(sum - T(sum));
    }
  }
}

// sum(g_prev d) and sum(d h d) of a variable as sweep 3 left them; the latter is -1, which no such sum
// is, where they are not known.
template <typename T>
NLCG_HOST_DEVICE double KeptSum(const Variable<T>& v, int i) {
  if (v.curvature_sums == nullptr) return -1;
  return double(v.curvature_sums[2 * i]) + v.curvature_sums[2 * i + 1];
}

template <typename T>
NLCG_HOST_DEVICE bool SumsAreKept(const Variable<T>& v) {
  return Finite(KeptSum(v, 0)) && Finite(KeptSum(v, 1)) && KeptSum(v, 1) >= 0;
}

}  // namespace nlcg

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_STAGES_H_

// The NLCG update (Adya, Palakkode & Tuzel 2018, arXiv 1812.02886), section 2 and 3: what the CPU and
// the CUDA kernel share. No TensorFlow here: plain pointers, sizes, a stream.
//
// Sweeps over the parameters; each name is one transfer of a vector as long as they are:
//
//   1. BFGS: read g, d             -> y's, s'hs, whether g is finite. The sums over the old gradient
//      come from sweep 3 of the update before; where they are not known, or with Nesterov's
//      look-ahead, g_prev and h are read as well.
//   2. BFGS: read g, g_prev, d, h, write h  -> delta of the new h, which beta needs of all variables
//   1+2. No preconditioner: read g; P g given: read g, P g. Polak-Ribiere: g_prev too; blended: g_prev
//      and d
//   3. read g, d, w (h or P g), write d, w, g_prev -> the sums for the cosine and for the next 1
//
// That is 14 transfers of the parameter vector with BFGS, 16 with the look-ahead too; without
// preconditioner 6, blended 9; with one that the caller computes 8.
//
// Sums are taken over chunks of fixed size, in fixed order: the bits do not depend on the number of
// threads. Nothing is written before it is known whether the update is to be skipped.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_H_

#include <cstdint>
#include <functional>
#include <vector>

#if defined(__CUDACC__)
#define NLCG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NLCG_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace nlcg {

// Positions in the optimizer's two vectors of scalars; reference.py has the same lists. What the line
// search keeps follows the reals.
enum Real {
  kDelta,
  kStepSize,
  kBeta,
  kCurvature,
  kCosine,
  kGainRatio,
  kPreconditionerMean,
  kLastLoss,
  kPredictionError,
  kPredictedChange,
  kMeanSquaredNorm,
  kFirstSquaredNorm,
  kMeanUpdateNorm,
  kClipFactor,
  kReals
};
enum Count { kUpdates, kSkippedUpdates, kRejectedCurvatures, kLastUpdateApplied, kCounts };

// kGiven: the caller computes P g.
enum Preconditioner { kIdentity, kBfgs, kNormalizedBfgs, kGiven };
enum Rule { kFletcherReeves, kPolakRibiere, kBlended, kMomentum };
// What the caller gives for an update, in one vector: the learning rate, which weight decay follows;
// the same times the line search's scale; the loss, or 0; and what the line search keeps of it.
enum Given { kLearningRate, kScaledRate, kLoss, kSearched };

// The constants of reductions.py, preconditioner.py and noise.py.
constexpr double kTiny = 1e-30, kResolution = 1e-4;
constexpr double kMemory = 0.9, kNormMemory = 0.99, kOutlier = 100, kRounding = 1e-6, kGrowth = 2;

struct Settings {
  int preconditioner;
  int rule;
  int searched;  // scalars that the line search keeps
  bool nesterov;
  double epsilon;
  double lars_coefficient;  // 0: off
  double momentum;          // of the rules kBlended and kMomentum
  double decay;             // of the preconditioner
};

NLCG_HOST_DEVICE bool UsesBfgs(const Settings& settings) {
  return settings.preconditioner == kBfgs || settings.preconditioner == kNormalizedBfgs;
}

// Whether the diagonal divides a gradient that is scaled afterwards by its mean.
NLCG_HOST_DEVICE bool IsScaled(const Settings& settings) {
  return settings.preconditioner == kNormalizedBfgs;
}

// Whether the rule looks at the previous gradient, or at the step made of it.
NLCG_HOST_DEVICE bool LooksBack(const Settings& settings) {
  return settings.rule == kPolakRibiere || settings.rule == kBlended;
}

// Whether there is a slot for the previous gradient.
NLCG_HOST_DEVICE bool KeepsGradient(const Settings& settings) {
  return UsesBfgs(settings) || LooksBack(settings);
}

// Whether sweep 3 leaves sums for the next sweep 1. The look-ahead's step has none: its product with
// the coming gradient takes all that is read.
NLCG_HOST_DEVICE bool KeepsSums(const Settings& settings) {
  return UsesBfgs(settings) && !settings.nesterov;
}

template <typename T>
struct Variable {
  T* w;
  T* d;
  T* h;             // BFGS: h; otherwise null
  const T* g_prev;  // null where it is not kept
  T* g_prev_out;    // null: not kept, or the caller keeps the buffer of g as the next g_prev
  const T* g;
  const T* preconditioned;  // kGiven: P g; otherwise null
  T* trust_ratio;           // the LARS factor of this variable's last step; null: 1
  T* curvature_sums;        // sum(g_prev d) and sum(d h d), each in two parts; null where not kept
  int64_t size;
  double weight_decay;
};

// What the sweeps add up over a chunk.
constexpr int kSums = 11;
struct Sums {
  double values[kSums];
};
// kCheck: 0 where all gradients are finite, NaN otherwise; kSlope: g's
enum CurvatureSum { kCheck, kYs, kShs, kSlope };
// Of the divisor x and the quotient q = g/x: kGq: g'q; kInverse: 1/x; kGqPrevious: g'(g_prev/x_prev)
enum DirectionSum {
  kGq = 1,
  kInverse,
  kGqPrevious,
  kGg,
  kNewSlope,
  kOldSlope,
  kQq,
  kQd,
  kDd,
  kElements
};
enum StepSum { kStepGd, kStepGg, kStepDd, kStepWw, kNextGd, kNextShs };

// `kSweepDirection` is the second sweep of BFGS, and otherwise the first.
enum Sweep { kSweepCurvature, kSweepDirection, kSweepStep, kSweepLars };

NLCG_HOST_DEVICE int FirstSweep(const Settings& settings) {
  return UsesBfgs(settings) ? kSweepCurvature : kSweepDirection;
}

// What one sweep tells the next; the new scalars wait here until the update is known to be done. Numbers
// only: a caller may hand any bytes over.
template <typename T>
struct Stage {
  int skip, first, accepted;  // 0 or 1
  T inv_ys, inv_shs, forget;
  T scale, beta, direction_factor, gradient_factor, alpha, learning_rate;
  T loss;
  double gain_ratio;
  T reals[kReals];
};

// Which call this is. Where each worker has a shard of the parameters, the sums of a sweep must be added
// up over all workers before the next sweep. So a call does one sweep, and hands its sums and its stage
// over to the next call. The pointers are like the others of the update; those of the stage may be
// unaligned.
constexpr int kAllSweeps = -1;
struct Call {
  int sweep = kAllSweeps;
  const double* totals = nullptr;  // the sums of the call before over all shards; null: the first
  const void* stage_before = nullptr;  // its stage
  double* sums = nullptr;              // where the sums over this shard go
  void* stage = nullptr;               // where the stage goes; the last call has none
};

NLCG_HOST_DEVICE bool Finite(double x) { return x - x == 0; }

// Calls work(begin, end) on parts of [0, count), perhaps at the same time.
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>&)>;

// One update on the CPU, or a sweep of one. All pointers but those that may be null point to `size`
// elements, no two of those that are written overlap. Returns whether the weights were updated: not
// skipped, and not left to a later call. The cosine of a single sweep is that of its own shard.
template <typename T>
bool UpdateOnCpu(const Settings& settings, const std::vector<Variable<T>>& variables,
                 const T* given, T* reals, int64_t* counts, const ParallelFor& parallel_for,
                 const Call& call = {});

}  // namespace nlcg

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_H_

// The CPU kernel: three sweeps over chunks of all variables.

#include "nlcg_update.h"

#include <algorithm>
#include <cstring>

#include "nlcg_update_stages.h"
#include "nlcg_update_sweeps.h"

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

void Add(const Sums& from, Sums* to) {
  for (int i = 0; i < kSums; ++i) to->values[i] += from.values[i];
}

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
  sums.values[kSlope] = sums.values[kYs] * step;
  if (begin == 0) sums.values[kYs] -= KeptSum(v, 0);
  sums.values[kYs] *= step;
  sums.values[kShs] = begin == 0 ? KeptSum(v, 1) * step * step : 0;
  return sums;
}

template <typename T>
NLCG_HOST_DEVICE Sums RunDirection(const Settings& settings, const Stage<T>& stage,
                                   const Previous<T>& previous, const Variable<T>& v, T step,
                                   int64_t begin, int64_t end) {
  const T epsilon = T(settings.epsilon);
  const DirectionSums<T> sums{v, previous, settings.rule, settings.nesterov};
  if (settings.preconditioner == kIdentity) {
    return Run<T>(PlainBody<T>{v, epsilon, step, sums}, begin, end);
  }
  if (settings.preconditioner == kGiven) return Run<T>(GivenBody<T>{v, sums}, begin, end);
  if (stage.accepted) {
    return Run<T>(HessianBody<T, true>{v, stage, epsilon, step, sums}, begin, end);
  }
  return Run<T>(HessianBody<T, false>{v, stage, epsilon, step, sums}, begin, end);
}

template <typename T, int kPreconditioner>
NLCG_HOST_DEVICE Sums RunStep(const Settings& settings, const Stage<T>& stage, const Variable<T>& v,
                              T decay_rate, int64_t begin, int64_t end) {
  const T epsilon = T(settings.epsilon);
  const bool nesterov = settings.nesterov;
  // Only variables that do not stay in a cache until the next update gain by it.
  const bool stream = v.g_prev_out != nullptr && v.size >= kStreamed &&
                      reinterpret_cast<uintptr_t>(v.g_prev_out) % 16 == 0;
  if (settings.lars_coefficient > 0) {
    using Body = StepBody<T, kPreconditioner, true>;
    return Run<T>(Body{v, stage, epsilon, decay_rate, nesterov, stream}, begin, end);
  }
  using Body = StepBody<T, kPreconditioner, false>;
  return Run<T>(Body{v, stage, epsilon, decay_rate, nesterov, stream}, begin, end);
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
    if (preconditioner == kGiven) {
      return RunStep<T, kGiven>(settings, stage, v, decay_rate, begin, end);
    }
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
                 const T* given, T* reals, int64_t* counts, const ParallelFor& parallel_for,
                 const Portion& portion) {
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

  double elements = portion.elements;
  if (portion.sweep == kAllSweeps) {
    for (const Variable<T>& v : variables) elements += v.size;
  }
  Begin(reals, counts, given, &stage);
  for (int kind = FirstSweep(settings); kind <= kSweepStep; ++kind) {
    Sums total = {};
    if (kind < portion.sweep) {
      std::memcpy(&total, portion.known[kind], sizeof(total));
    } else if (!stage.skip) {
      total = sweep(Sweep(kind));
    }
    if (kind == portion.sweep) std::memcpy(portion.sums, &total, sizeof(total));
    if (kind == portion.sweep && kind != kSweepStep) return false;
    Finish(settings, kind, elements, given, total, &stage, reals, counts);
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

template bool UpdateOnCpu<float>(const Settings&, const std::vector<Variable<float>>&, const float*,
                                 float*, int64_t*, const ParallelFor&, const Portion&);
template bool UpdateOnCpu<double>(const Settings&, const std::vector<Variable<double>>&,
                                  const double*, double*, int64_t*, const ParallelFor&,
                                  const Portion&);

}  // namespace nlcg

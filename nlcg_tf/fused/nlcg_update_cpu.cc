// The CPU kernel: three sweeps over chunks of all variables.

#include "nlcg_update.h"

#include <immintrin.h>

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

NLCG_HOST_DEVICE void StreamPart(float* p, const float* x) { _mm_stream_ps(p, _mm_loadu_ps(x)); }
NLCG_HOST_DEVICE void StreamPart(double* p, const double* x) { _mm_stream_pd(p, _mm_loadu_pd(x)); }

// A vector of elements at a time.
template <typename T>
struct Lanes {
  typedef T V __attribute__((vector_size(64)));
  static constexpr int64_t kCount = 64 / sizeof(T);

  // The first `n` elements at p, the rest zero.
  NLCG_HOST_DEVICE static V Load(const T* p, int64_t n) {
    V x = {};
    std::memcpy(&x, p, n * sizeof(T));
    return x;
  }
  NLCG_HOST_DEVICE static void Store(T* p, V x, int64_t n) { std::memcpy(p, &x, n * sizeof(T)); }

  // A store that goes past the caches: memory that is only written need not be read first.
  NLCG_HOST_DEVICE static void Stream(T* p, const V& x) {
    const T* parts = reinterpret_cast<const T*>(&x);
    for (size_t i = 0; i < kCount; i += 16 / sizeof(T)) StreamPart(p + i, parts + i);
  }

  NLCG_HOST_DEVICE static double Sum(V x) {
    double sum = 0;
    for (int64_t i = 0; i < kCount; ++i) sum += x[i];
    return sum;
  }

  // A sum in double of products of single elements, which are exact where T is float: of two such sums
  // the difference is taken.
  struct ExactSum {
    typedef double Doubles __attribute__((vector_size(64)));
    typedef T Part __attribute__((vector_size(8 * sizeof(T))));  // as many elements
    Doubles sum = {};
    template <typename... X>
    NLCG_HOST_DEVICE void Add(X... x) {
      for (size_t i = 0; i < sizeof(V) / sizeof(Part); ++i) sum += (... * Widened(x, i));
    }
    NLCG_HOST_DEVICE static Doubles Widened(const V& x, int i) {
      Part part;
      std::memcpy(&part, reinterpret_cast<const char*>(&x) + i * sizeof(Part), sizeof(Part));
      return __builtin_convertvector(part, Doubles);
    }
    NLCG_HOST_DEVICE double Result() const { return Lanes<double>::Sum(sum); }
  };

  // Calls body(i, n) for the elements [begin, end), a whole vector at a time and then the rest.
  template <typename Body>
  NLCG_HOST_DEVICE static void ForEach(int64_t begin, int64_t end, Body& body) {
    int64_t i = begin;
    for (; i + kCount <= end; i += kCount) body(i, kCount);
    if (i < end) body(i, end - i);
  }
};

void Add(const Sums& from, Sums* to) {
  for (int i = 0; i < kSums; ++i) to->values[i] += from.values[i];
}

template <typename T>
NLCG_HOST_DEVICE Sums RunSweep(Sweep sweep, const Settings& settings, const Stage<T>& stage,
                               const Previous<T>& previous, const Variable<T>& v, int64_t begin,
                               int64_t end) {
  if (settings.preconditioner == kIdentity) {
    return RunSweep<T, kIdentity>(sweep, settings, stage, previous, v, begin, end);
  }
  if (settings.preconditioner == kGiven) {
    return RunSweep<T, kGiven>(sweep, settings, stage, previous, v, begin, end);
  }
  return RunSweep<T, kBfgs>(sweep, settings, stage, previous, v, begin, end);
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
                 const Call& call) {
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
      _mm_sfence();  // what was streamed must be there when the thread says that it is done
    });
    Sums total = {};
    for (const Sums& sum : sums) Add(sum, &total);
    return total;
  };

  int kind = FirstSweep(settings);
  if (call.totals == nullptr) {
    Begin(reals, counts, given, &stage);
  } else {
    Sums totals;
    std::memcpy(&totals, call.totals, sizeof(totals));
    std::memcpy(&stage, call.stage_before, sizeof(stage));
    kind = call.sweep;
    Finish(settings, kind - 1, given, totals, &stage, reals, counts);
  }
  for (; kind <= kSweepStep; ++kind) {
    const Sums total = stage.skip ? Sums{} : sweep(Sweep(kind));
    if (kind == call.sweep) std::memcpy(call.sums, &total, sizeof(total));
    if (kind == call.sweep && kind != kSweepStep) {
      std::memcpy(call.stage, &stage, sizeof(stage));
      return false;
    }
    Finish(settings, kind, given, total, &stage, reals, counts);
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
                                 float*, int64_t*, const ParallelFor&, const Call&);
template bool UpdateOnCpu<double>(const Settings&, const std::vector<Variable<double>>&,
                                  const double*, double*, int64_t*, const ParallelFor&, const Call&);

}  // namespace nlcg

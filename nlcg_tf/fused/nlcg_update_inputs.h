// What a caller of the op passes: where it stands, and what it must be. The caller is not trusted.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_INPUTS_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_INPUTS_H_

#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlcg_update.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_var.h"

namespace tensorflow {
namespace nlcg_op {

// The order of the inputs, and that of the variables behind their handles.
struct Layout {
  int n;        // weights; as many of each kind of slot
  int slots;    // of all kinds
  int singles;  // variables that there are once, not for each of the weights
  bool keeps_gradient, has_diagonal, is_given, has_ratios, has_sums, resumes;
  struct {
    int slots, gradients, preconditioned, given, settings, weight_decays, totals, stage_before;
  } input;
  struct {
    int directions, previous, diagonals, reals, counts, ratios, sums, end;
  } variable;  // the weights are the first

  Layout() = default;
  Layout(const nlcg::Settings& settings, int n, bool has_ratios, bool has_sums, bool resumes)
      : n(n), has_ratios(has_ratios), has_sums(has_sums), resumes(resumes) {
    keeps_gradient = nlcg::KeepsGradient(settings);
    has_diagonal = nlcg::UsesBfgs(settings);
    is_given = settings.preconditioner == nlcg::kGiven;
    slots = (1 + keeps_gradient + has_diagonal) * n;
    singles = 2 + has_ratios + has_sums;
    input.slots = n;
    input.gradients = n + 1 + singles;
    input.preconditioned = input.gradients + n;
    input.given = input.preconditioned + (is_given ? n : 0);
    input.settings = input.given + 1;
    input.weight_decays = input.settings + 1;
    input.totals = input.weight_decays + 1;
    input.stage_before = input.totals + 1;
    variable.directions = n;
    variable.previous = 2 * n;
    variable.diagonals = (2 + keeps_gradient) * n;
    variable.reals = n + slots;
    variable.counts = variable.reals + 1;
    variable.ratios = variable.counts + 1;
    variable.sums = variable.ratios + has_ratios;
    variable.end = n + slots + singles;
  }

  // What to call a variable before `reals`.
  const char* Role(int i) const {
    return i < variable.directions  ? "weights"
           : i < variable.previous  ? "directions"
           : i < variable.diagonals ? "previous_gradients"
                                    : "diagonals";
  }
};

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

// T is the type of the weights.
template <typename T>
absl::Status CheckRanges(const nlcg::Settings& s) {
  if (!(s.epsilon >= std::numeric_limits<T>::min() && s.epsilon < 1e30)) {
    return Invalid("NlcgUpdate: epsilon must be a normal positive number, is ", s.epsilon);
  }
  if (!(s.lars_coefficient >= 0 && nlcg::Finite(s.lars_coefficient))) {
    return Invalid("NlcgUpdate: lars_coefficient must be a number from 0 on, is ", s.lars_coefficient);
  }
  if (!(s.momentum >= 0 && s.momentum < 1)) {
    return Invalid("NlcgUpdate: momentum must lie in [0, 1), is ", s.momentum);
  }
  if (!(s.decay > 0 && s.decay <= 1)) {
    return Invalid("NlcgUpdate: decay must lie in (0, 1], is ", s.decay);
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status ReadSettings(const Tensor& tensor, nlcg::Settings* s) {
  const auto values = tensor.vec<double>();
  if (values.size() != 4) {
    return Invalid("NlcgUpdate: settings must have 4 elements, has ", values.size());
  }
  s->epsilon = values(0);
  s->lars_coefficient = values(1);
  s->momentum = values(2);
  s->decay = values(3);
  return CheckRanges<T>(*s);
}

// Everything but the variables: shapes, and the settings, which are read.
template <typename T>
absl::Status ReadInputs(OpKernelContext* ctx, const Layout& layout, nlcg::Settings* settings) {
  const auto& input = layout.input;
  for (int i : {input.given, input.settings, input.weight_decays}) {
    if (!TensorShapeUtils::IsVector(ctx->input(i).shape())) {
      return Invalid("NlcgUpdate: given, settings and weight_decays must be vectors, got ",
                     ctx->input(i).shape().DebugString());
    }
  }
  const int64_t given = ctx->input(input.given).NumElements();
  if (given < nlcg::kSearched || given > nlcg::kSearched + 1000) {
    return Invalid("NlcgUpdate: given must have 3 to 1,003 elements, has ", given);
  }
  settings->searched = static_cast<int>(given) - nlcg::kSearched;
  TF_RETURN_IF_ERROR(ReadSettings<T>(ctx->input(input.settings), settings));
  if ((settings->lars_coefficient > 0) != layout.has_ratios) {
    return Invalid("NlcgUpdate: a LARS coefficient needs trust_ratios, and the other way round");
  }
  const int64_t decays = ctx->input(input.weight_decays).NumElements();
  if (decays != layout.n) {
    return Invalid("NlcgUpdate: ", decays, " weight_decays for ", layout.n, " weights");
  }
  if (layout.resumes) {
    const TensorShape& totals = ctx->input(input.totals).shape();
    const TensorShape& stage = ctx->input(input.stage_before).shape();
    if (totals != TensorShape({nlcg::kSums}) || stage != TensorShape({sizeof(nlcg::Stage<T>)})) {
      return Invalid("NlcgUpdate: totals and stage_before must be vectors of ", nlcg::kSums, " and ",
                     sizeof(nlcg::Stage<T>), ", got ", totals.DebugString(), " and ",
                     stage.DebugString());
    }
  }
  for (int i = 0; layout.is_given && i < layout.n; ++i) {
    const TensorShape& own = ctx->input(input.preconditioned + i).shape();
    const TensorShape& gradient = ctx->input(input.gradients + i).shape();
    if (own != gradient) {
      return Invalid("NlcgUpdate: preconditioned[", i, "] must have shape ", gradient.DebugString(),
                     ", has ", own.DebugString());
    }
  }
  const Tensor& slots = ctx->input(input.slots);
  if (slots.dims() != 1 || slots.NumElements() != layout.slots) {
    return Invalid("NlcgUpdate: slots must hold ", layout.slots, " handles for ", layout.n,
                   " weights, has shape ", slots.shape().DebugString());
  }
  return absl::OkStatus();
}

inline absl::Status CheckVariable(Var* var, DataType dtype, const TensorShape& shape,
                                  const char* role, int index) {
  // The tensor of a variable that was never assigned has no buffer.
  if (!var->is_initialized || !var->tensor()->IsInitialized()) {
    return absl::FailedPreconditionError(
        absl::StrCat("NlcgUpdate: ", role, "[", index, "] is not initialized"));
  }
  if (var->tensor()->dtype() != dtype) {
    return Invalid("NlcgUpdate: ", role, "[", index, "] must have type ", DataTypeString(dtype),
                   ", has ", DataTypeString(var->tensor()->dtype()));
  }
  if (!var->tensor()->shape().IsSameSize(shape)) {
    return Invalid("NlcgUpdate: ", role, "[", index, "] must have shape ", shape.DebugString(),
                   ", has ", var->tensor()->shape().DebugString());
  }
  return absl::OkStatus();
}

// trust_ratios, a vector, or curvature_sums, a matrix: an element or a row for each position.
inline absl::Status CheckRows(Var* var, DataType dtype, bool is_ratios,
                              const std::vector<int64_t>& positions) {
  const char* const role = is_ratios ? "trust_ratios" : "curvature_sums";
  if (!var->is_initialized || var->tensor()->dims() != (is_ratios ? 1 : 2)) {
    return Invalid("NlcgUpdate: ", role, " must be a ", is_ratios ? "vector" : "matrix");
  }
  const int64_t size = var->tensor()->dim_size(0);
  const TensorShape shape = is_ratios ? TensorShape({size}) : TensorShape({size, 4});
  TF_RETURN_IF_ERROR(CheckVariable(var, dtype, shape, role, 0));
  std::vector<bool> taken(size, false);
  for (const int64_t position : positions) {
    if (position < 0 || position >= size || taken[position]) {
      return Invalid("NlcgUpdate: position ", position, " of ", role,
                     " is out of range or given twice, size is ", size);
    }
    taken[position] = true;
  }
  return absl::OkStatus();
}

// All variables, in the order of the layout; their mutexes are held.
template <typename T>
absl::Status CheckVariables(OpKernelContext* ctx, const Layout& layout,
                            const nlcg::Settings& settings, const std::vector<int64_t>& positions,
                            const std::vector<Var*>& vars) {
  const DataType dtype = DataTypeToEnum<T>::value;
  const auto& at = layout.variable;
  for (int i = 0; i < at.reals; ++i) {
    const int position = i % layout.n;
    const TensorShape& shape = ctx->input(layout.input.gradients + position).shape();
    TF_RETURN_IF_ERROR(CheckVariable(vars[i], dtype, shape, layout.Role(i), position));
  }
  const TensorShape reals({nlcg::kReals + settings.searched}), counts({nlcg::kCounts});
  TF_RETURN_IF_ERROR(CheckVariable(vars[at.reals], dtype, reals, "reals", 0));
  TF_RETURN_IF_ERROR(CheckVariable(vars[at.counts], DT_INT64, counts, "counts", 0));
  for (int i = at.ratios; i < at.end; ++i) {
    TF_RETURN_IF_ERROR(CheckRows(vars[i], dtype, i < at.sums, positions));
  }
  return absl::OkStatus();
}

}  // namespace nlcg_op
}  // namespace tensorflow

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_INPUTS_H_

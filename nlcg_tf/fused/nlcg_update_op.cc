// The TensorFlow op: registration, validation, locking. The arithmetic is in the functors.

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlcg_update.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/denormal.h"
#include "tensorflow/core/util/work_sharder.h"
#if NLCG_CUDA
#include "nlcg_update_cuda.h"
#endif

namespace tensorflow {

using shape_inference::InferenceContext;
using shape_inference::ShapeHandle;

REGISTER_OP("NlcgUpdate")
    .Input("weights: n * resource")
    .Input("slots: resource")
    .Input("reals: resource")
    .Input("counts: resource")
    .Input("trust_ratios: r * resource")
    .Input("curvature_sums: c * resource")
    .Input("gradients: n * T")
    .Input("learning_rate: T")
    .Input("loss: T")
    .Input("settings: double")
    .Input("weight_decays: double")
    .Attr("n: int >= 0")
    .Attr("r: int >= 0")
    .Attr("c: int >= 0")
    .Attr("preconditioner: {'none', 'bfgs', 'normalized_bfgs', 'rms'}")
    .Attr("T: {float, double}")
    .Attr("positions: list(int)")
    .Attr("keep_slots: bool")
    .Attr("update_rule: {'fletcher_reeves', 'polak_ribiere', 'blended'}")
    .Attr("nesterov: bool")
    .Attr("line_search: {'none', 'online', 'step'}")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle unused;
      for (const char* name : {"learning_rate", "loss"}) {
        std::vector<ShapeHandle> shapes;
        TF_RETURN_IF_ERROR(c->input(name, &shapes));
        TF_RETURN_IF_ERROR(c->WithRank(shapes[0], 0, &unused));
      }
      for (const char* name : {"slots", "settings", "weight_decays"}) {
        std::vector<ShapeHandle> shapes;
        TF_RETURN_IF_ERROR(c->input(name, &shapes));
        TF_RETURN_IF_ERROR(c->WithRank(shapes[0], 1, &unused));
      }
      return absl::OkStatus();
    })
    .Doc(R"doc(
One NLCG update of all variables of a model. See nlcg_update.py for the Python interface.

weights: float variables of the shapes of `gradients`.
slots: handles from NlcgPackHandles, n of each: the directions; with BFGS, or another rule than
  Fletcher-Reeves, the previous gradients; with a preconditioner its diagonal (Hessian or second moment).
reals: vector variable of type T: what the enum Real in nlcg_update.h lists.
counts: int64 vector variable: updates, skipped, rejected, last update applied.
trust_ratios: one vector variable of type T with LARS scaling, otherwise none.
curvature_sums: one variable of type T and shape (variables, 4) with BFGS and without `nesterov`,
  otherwise none.
settings: epsilon, LARS coefficient, momentum of the blended rule, decay of the preconditioner, then
  the line search's settings.
weight_decays: one for each variable.
positions: where each variable stands in `trust_ratios` and `curvature_sums`.
keep_slots: whether the kernel remembers the slots, for a graph that is run again and again.
)doc");

// A graph pays some microseconds for each handle that it captures, more than the arithmetic of a small
// variable. Weights must come one by one, for TensorFlow orders the op among their other uses; the
// slots, which nothing else in a training step touches, come as one tensor of handles. So a function
// that updates and also reads or writes a slot may do so before or after the update; outside the
// function all is in order.
REGISTER_OP("NlcgPackHandles")
    .Input("handles: n * resource")
    .Output("packed: resource")
    .Attr("n: int >= 1")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->Vector(c->num_inputs()));
      return absl::OkStatus();
    })
    .Doc(R"doc(
Packs the handles of variables into one vector of handles, which keeps them alive.
)doc");

namespace {

class NlcgPackHandlesOp : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* ctx) override {
    Tensor* packed = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape({ctx->num_inputs()}), &packed));
    for (int i = 0; i < ctx->num_inputs(); ++i) {
      OP_REQUIRES(ctx, ctx->input(i).NumElements() == 1,
                  absl::InvalidArgumentError("NlcgPackHandles: each input must be one handle"));
      packed->vec<ResourceHandle>()(i) = ctx->input(i).flat<ResourceHandle>()(0);
    }
  }
};
REGISTER_KERNEL_BUILDER(Name("NlcgPackHandles").Device(DEVICE_CPU), NlcgPackHandlesOp);
#if NLCG_CUDA
REGISTER_KERNEL_BUILDER(
    Name("NlcgPackHandles").Device(DEVICE_GPU).HostMemory("handles").HostMemory("packed"),
    NlcgPackHandlesOp);
#endif

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

using VarPtr = core::RefCountPtr<Var>;

absl::Status CheckVariable(Var* var, DataType dtype, const TensorShape& shape, const char* role,
                           int index) {
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

// Reads the vector of settings; optimizer settings come first, the line search's follow.
template <typename T>
absl::Status ParseSettings(const Tensor& tensor, nlcg::Settings* s) {
  const auto values = tensor.vec<double>();
  const int64_t size = values.size();
  const auto wrong = [&](int64_t expected) {
    return Invalid("NlcgUpdate: settings must have ", expected, " elements, has ", size);
  };
  constexpr int kOwn = 4;
  if (size < kOwn || (s->line_search == nlcg::kNoLineSearch && size != kOwn)) return wrong(kOwn);
  s->epsilon = values(0);
  s->lars_coefficient = values(1);
  s->momentum = values(2);
  s->decay = values(3);
  const auto search = [&](int64_t i) { return values(kOwn + i); };
  if (s->line_search == nlcg::kOnline) {
    if (size != kOwn + 5) return wrong(kOwn + 5);
    s->increase_factor = search(0);
    s->minimum_scale = search(1);
    s->decrease_threshold = search(2);
    s->increase_threshold = search(3);
    s->decrease_factor = search(4);
  } else if (s->line_search == nlcg::kStep) {
    if (size < kOwn + 4 || size % 2 != 0) return wrong(kOwn + 18);
    if (size > kOwn + 4 + 2 * nlcg::kMaxLimits) return Invalid("NlcgUpdate: too many limits");
    s->increase_factor = search(0);
    s->minimum_scale = search(1);
    s->smoothing = search(3);
    if (!(search(2) >= 1 && search(2) <= 1e9)) {
      return Invalid("NlcgUpdate: the period must lie in [1, 1e9], is ", search(2));
    }
    s->period = static_cast<int>(search(2));
    s->limit_count = static_cast<int>((size - kOwn - 4) / 2);
    for (int i = 0; i < s->limit_count; ++i) {
      s->limits[i] = search(4 + i);
      s->factors[i] = search(4 + s->limit_count + i);
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    if (!nlcg::Finite(values(i))) {
      return Invalid("NlcgUpdate: settings[", i, "] is not finite");
    }
  }
  if (!(s->epsilon >= std::numeric_limits<T>::min() && s->epsilon < 1e30)) {
    return Invalid("NlcgUpdate: epsilon must be a normal positive number, is ", s->epsilon);
  }
  if (!(s->lars_coefficient >= 0)) {
    return Invalid("NlcgUpdate: lars_coefficient must not be negative, is ", s->lars_coefficient);
  }
  if (!(s->momentum >= 0 && s->momentum < 1)) {
    return Invalid("NlcgUpdate: momentum must lie in [0, 1), is ", s->momentum);
  }
  if (!(s->decay > 0 && s->decay <= 1)) {
    return Invalid("NlcgUpdate: decay must lie in (0, 1], is ", s->decay);
  }
  return absl::OkStatus();
}

// The mutexes of all variables, taken in the order of their addresses.
class Locks {
 public:
  explicit Locks(std::vector<Var*> vars) : vars_(std::move(vars)) {
    std::sort(vars_.begin(), vars_.end(), [](Var* a, Var* b) { return a->mu() < b->mu(); });
  }
  bool HasDuplicates() const {
    return std::adjacent_find(vars_.begin(), vars_.end()) != vars_.end();
  }
  void Acquire() {
    for (Var* var : vars_) var->mu()->lock();
    held_ = true;
  }
  ~Locks() {
    if (!held_) return;
    for (auto it = vars_.rbegin(); it != vars_.rend(); ++it) (*it)->mu()->unlock();
  }

 private:
  std::vector<Var*> vars_;
  bool held_ = false;
};

template <typename T>
struct CpuDevice {
  static absl::Status Copy(OpKernelContext*, void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    return absl::OkStatus();
  }
  // Returns whether the update was done, which the CPU knows and a GPU does not without waiting.
  static bool Update(OpKernelContext* ctx, const nlcg::Settings& settings,
                     const std::vector<nlcg::Variable<T>>& variables, const T* learning_rate,
                     const T* loss, T* reals, int64_t* counts) {
    auto* workers = ctx->device()->tensorflow_cpu_worker_threads();
    int64_t size = 0;
    for (const nlcg::Variable<T>& v : variables) size += v.size;
    const auto parallel_for = [workers, size](int64_t count,
                                              const std::function<void(int64_t, int64_t)>& work) {
      // A quarter of a cycle an element: below about a million elements, as in ResNet-32, waking
      // another thread takes longer than the sweep. Longer sweeps are bound by memory anyway.
      const int64_t cycles_per_chunk = count == 0 ? 1 : size / 4 / count + 1;
      Shard(workers->num_threads, workers->workers, count, cycles_per_chunk,
            [&work](int64_t begin, int64_t end) {
              // TensorFlow's threads flush denormals, the caller's may not: all must do alike.
              port::ScopedFlushDenormal flush;
              work(begin, end);
            });
    };
    return nlcg::UpdateOnCpu<T>(settings, variables, *learning_rate, *loss, reals, counts,
                                parallel_for);
  }
  static constexpr bool kKnowsOutcome = true;
};

#if NLCG_CUDA
absl::Status GpuStatus(const char* error) {
  return error == nullptr ? absl::OkStatus()
                          : absl::InternalError(absl::StrCat("NlcgUpdate: ", error));
}

template <typename T>
struct GpuDevice {
  static void* Stream(OpKernelContext* ctx) {
    return ctx->eigen_device<Eigen::GpuDevice>().stream();
  }
  static absl::Status Copy(OpKernelContext* ctx, void* to, const void* from, size_t bytes) {
    return GpuStatus(nlcg::CopyOnGpu(to, from, bytes, Stream(ctx)));
  }
  static bool Update(OpKernelContext* ctx, const nlcg::Settings& settings,
                     const std::vector<nlcg::Variable<T>>& variables, const T* learning_rate,
                     const T* loss, T* reals, int64_t* counts) {
    Tensor scratch;
    const int64_t bytes = nlcg::GpuScratchBytes(variables);
    absl::Status status = ctx->allocate_temp(DT_INT8, TensorShape({bytes}), &scratch);
    if (status.ok()) {
      status = GpuStatus(nlcg::UpdateOnGpu(settings, variables, learning_rate, loss, reals, counts,
                                           scratch.data(), Stream(ctx)));
    }
    if (!status.ok()) ctx->SetStatus(status);
    return false;
  }
  static constexpr bool kKnowsOutcome = false;
};
#endif

template <typename Device, typename T>
class NlcgUpdateOp : public OpKernel {
 public:
  explicit NlcgUpdateOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    std::string preconditioner, rule, line_search;
    settings_ = {};
    OP_REQUIRES_OK(ctx, ctx->GetAttr("n", &n_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("preconditioner", &preconditioner));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("r", &r_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("c", &c_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("nesterov", &settings_.nesterov));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("positions", &positions_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("keep_slots", &keep_slots_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_rule", &rule));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("line_search", &line_search));
    settings_.preconditioner = preconditioner == "bfgs"              ? nlcg::kBfgs
                               : preconditioner == "normalized_bfgs" ? nlcg::kNormalizedBfgs
                               : preconditioner == "rms"             ? nlcg::kRms
                                                                     : nlcg::kIdentity;
    settings_.rule = rule == "polak_ribiere" ? nlcg::kPolakRibiere
                     : rule == "blended"     ? nlcg::kBlended
                                             : nlcg::kFletcherReeves;
    settings_.line_search = line_search == "online" ? nlcg::kOnline
                            : line_search == "step" ? nlcg::kStep
                                                    : nlcg::kNoLineSearch;
    OP_REQUIRES(ctx, n_ >= 1, Invalid("NlcgUpdate: there is no variable"));
    OP_REQUIRES(ctx, r_ <= 1, Invalid("NlcgUpdate: at most one trust_ratios, got ", r_));
    OP_REQUIRES(ctx, c_ == nlcg::KeepsSums(settings_),
                Invalid("NlcgUpdate: curvature_sums must be one variable with BFGS and without "
                        "nesterov, otherwise none, got ",
                        c_));
    OP_REQUIRES(ctx, static_cast<int>(positions_.size()) == n_,
                Invalid("NlcgUpdate: ", positions_.size(), " positions for ", n_, " weights"));
  }

  void Compute(OpKernelContext* ctx) override {
    // The order of the inputs, and that of the variables behind them.
    const int singles = 2 + r_ + c_;  // variables that there are once, not for each of the weights
    const int slots_input = n_, gradients = n_ + 1 + singles, learning_rate = gradients + n_;
    const int loss = learning_rate + 1, settings_input = loss + 1, decays = settings_input + 1;
    const bool keeps_gradient = nlcg::KeepsGradient(settings_);
    const bool has_diagonal = settings_.preconditioner != nlcg::kIdentity;
    const int slots = (1 + keeps_gradient + has_diagonal) * n_;
    const int directions = n_, previous = 2 * n_, diagonals = (2 + keeps_gradient) * n_;
    const int reals_at = n_ + slots, counts_at = reals_at + 1, ratios_at = counts_at + 1;
    const int sums_at = ratios_at + r_, variable_count = n_ + slots + singles;

    nlcg::Settings settings = settings_;
    for (int input : {learning_rate, loss}) {
      OP_REQUIRES(ctx, TensorShapeUtils::IsScalar(ctx->input(input).shape()),
                  Invalid("NlcgUpdate: learning_rate and loss must be scalars, got ",
                          ctx->input(input).shape().DebugString()));
    }
    for (int input : {settings_input, decays}) {
      OP_REQUIRES(ctx, TensorShapeUtils::IsVector(ctx->input(input).shape()),
                  Invalid("NlcgUpdate: settings and weight_decays must be vectors, "
                          "got ",
                          ctx->input(input).shape().DebugString()));
    }
    OP_REQUIRES_OK(ctx, ParseSettings<T>(ctx->input(settings_input), &settings));
    OP_REQUIRES(ctx, (settings.lars_coefficient > 0) == (r_ == 1),
                Invalid("NlcgUpdate: a LARS coefficient needs trust_ratios, and "
                        "the other way round"));
    const auto weight_decays = ctx->input(decays).vec<double>();
    OP_REQUIRES(
        ctx, weight_decays.size() == n_,
        Invalid("NlcgUpdate: ", weight_decays.size(), " weight_decays for ", n_, " weights"));

    const Tensor& slot_handles = ctx->input(slots_input);
    OP_REQUIRES(ctx, slot_handles.dims() == 1 && slot_handles.NumElements() == slots,
                Invalid("NlcgUpdate: slots must hold ", slots, " handles for ", n_,
                        " weights, has shape ", slot_handles.shape().DebugString()));
    std::vector<VarPtr> owned(n_ + singles);
    std::vector<Var*> vars(variable_count);
    for (int i = 0; i < n_ + singles; ++i) {
      // The caller is not trusted: a handle may be empty, deleted or of another type.
      const Tensor& handle = ctx->input(i < n_ ? i : i + 1);
      OP_REQUIRES(ctx, handle.NumElements() == 1,
                  Invalid("NlcgUpdate: each of weights, reals, counts, trust_ratios and "
                          "curvature_sums must be the handle of one variable, got shape ",
                          handle.shape().DebugString()));
      OP_REQUIRES_OK(ctx, LookupResource(ctx, handle.flat<ResourceHandle>()(0), &owned[i]));
      vars[i < n_ ? i : i + slots] = owned[i].get();
    }
    const std::shared_ptr<Slots> slot_vars = GetSlots(ctx, slot_handles);
    if (slot_vars == nullptr) return;
    for (int i = 0; i < slots; ++i) vars[n_ + i] = slot_vars->vars[i].get();
    Locks locks(vars);
    OP_REQUIRES(ctx, !locks.HasDuplicates(),
                Invalid("NlcgUpdate: the same variable was given twice"));
    locks.Acquire();

    const DataType dtype = DataTypeToEnum<T>::value;
    for (int i = 0; i < reals_at; ++i) {
      const int position = i % n_;
      const char* const role = i < directions  ? "weights"
                               : i < previous  ? "directions"
                               : i < diagonals ? "previous_gradients"
                                               : "diagonals";
      OP_REQUIRES_OK(ctx, CheckVariable(vars[i], dtype, ctx->input(gradients + position).shape(),
                                        role, position));
    }
    OP_REQUIRES_OK(ctx, CheckVariable(vars[reals_at], dtype,
                                      TensorShape({nlcg::RealCount(settings)}), "reals", 0));
    OP_REQUIRES_OK(
        ctx, CheckVariable(vars[counts_at], DT_INT64, TensorShape({nlcg::kCounts}), "counts", 0));
    for (int i = ratios_at; i < variable_count; ++i) {
      const bool is_ratios = i < sums_at;
      const char* const role = is_ratios ? "trust_ratios" : "curvature_sums";
      OP_REQUIRES(ctx, vars[i]->is_initialized && vars[i]->tensor()->dims() == (is_ratios ? 1 : 2),
                  Invalid("NlcgUpdate: ", role, " must be a ", is_ratios ? "vector" : "matrix"));
      const int64_t size = vars[i]->tensor()->dim_size(0);
      const TensorShape shape = is_ratios ? TensorShape({size}) : TensorShape({size, 4});
      OP_REQUIRES_OK(ctx, CheckVariable(vars[i], dtype, shape, role, 0));
      std::vector<bool> taken(size, false);
      for (const int64_t position : positions_) {
        OP_REQUIRES(ctx, position >= 0 && position < size && !taken[position],
                    Invalid("NlcgUpdate: position ", position, " of ", role,
                            " is out of range or given twice, size is ", size));
        taken[position] = true;
      }
    }

    // A gradient that nobody else holds becomes the next previous gradient without being copied.
    std::vector<std::unique_ptr<Tensor>> adopted(n_);
    for (int i = 0; Device::kKnowsOutcome && keeps_gradient && i < n_; ++i) {
      adopted[i] = ctx->forward_input(gradients + i, OpKernelContext::Params::kNoReservation, dtype,
                                      ctx->input(gradients + i).shape(), DEVICE_MEMORY,
                                      AllocatorAttributes());
    }

    // All memory is there before anything is written: an update is done as a whole or not at all.
    std::vector<std::pair<Var*, Tensor>> copies;
    for (int i = 0; i < variable_count; ++i) {
      if (i >= previous && i < diagonals && adopted[i - previous] != nullptr) continue;
      OP_REQUIRES_OK(ctx, CopyIfShared(ctx, vars[i], &copies));
    }
    for (auto& copy : copies) *copy.first->tensor() = std::move(copy.second);

    const auto data = [&vars](int i) { return vars[i]->tensor()->template flat<T>().data(); };
    std::vector<nlcg::Variable<T>> variables(n_);
    for (int i = 0; i < n_; ++i) {
      nlcg::Variable<T>& v = variables[i];
      v.w = data(i);
      v.d = data(directions + i);
      v.h = has_diagonal ? data(diagonals + i) : nullptr;
      v.g_prev = keeps_gradient ? data(previous + i) : nullptr;
      v.g_prev_out = keeps_gradient && adopted[i] == nullptr ? data(previous + i) : nullptr;
      v.g = ctx->input(gradients + i).flat<T>().data();
      v.trust_ratio = r_ == 1 ? data(ratios_at) + positions_[i] : nullptr;
      v.curvature_sums = c_ == 1 ? data(sums_at) + 4 * positions_[i] : nullptr;
      v.size = ctx->input(gradients + i).NumElements();
      v.weight_decay = weight_decays(i);
    }
    const bool applied =
        Device::Update(ctx, settings, variables, ctx->input(learning_rate).flat<T>().data(),
                       ctx->input(loss).flat<T>().data(), data(reals_at),
                       vars[counts_at]->tensor()->flat<int64_t>().data());
    for (int i = 0; applied && i < n_; ++i) {
      if (adopted[i] != nullptr) *vars[previous + i]->tensor() = std::move(*adopted[i]);
    }
  }

 private:
  // The variables behind a tensor of handles, which is held so that its address means this tensor.
  struct Slots {
    Tensor handles;
    std::vector<VarPtr> vars;
  };

  // Looks the slots up, unless they are those of the last call: hundreds of look-ups take longer than
  // the arithmetic of a small model. Returns null after a failure.
  std::shared_ptr<Slots> GetSlots(OpKernelContext* ctx, const Tensor& handles) {
    mutex_lock lock(mu_);
    if (slots_ != nullptr && slots_->handles.data() == handles.data()) return slots_;
    auto found = std::make_shared<Slots>();
    found->handles = handles;
    found->vars.resize(handles.NumElements());
    // A name may come to mean another variable; a counted reference may not.
    bool stable = true;
    for (int64_t i = 0; i < handles.NumElements(); ++i) {
      const absl::Status status =
          LookupResource(ctx, handles.flat<ResourceHandle>()(i), &found->vars[i]);
      if (!status.ok()) {
        ctx->CtxFailure(status);
        return nullptr;
      }
      stable &= handles.flat<ResourceHandle>()(i).IsRefCounting();
    }
    if (keep_slots_ && stable) slots_ = found;
    return found;
  }

  // TensorFlow's rule for updating a variable in place: a buffer that a read still holds is copied.
  static absl::Status CopyIfShared(OpKernelContext* ctx, Var* var,
                                   std::vector<std::pair<Var*, Tensor>>* copies) {
    Tensor* tensor = var->tensor();
    if (tensor->TotalBytes() == 0) return absl::OkStatus();
    if (tensor->RefCountIsOne() && !var->copy_on_read_mode.load()) return absl::OkStatus();
    AllocatorAttributes attributes;
    attributes.set_gpu_compatible(true);
    attributes.set_nic_compatible(true);
    Tensor copy;
    TF_RETURN_IF_ERROR(ctx->allocate_temp(tensor->dtype(), tensor->shape(), &copy, attributes));
    TF_RETURN_IF_ERROR(Device::Copy(ctx, copy.data(), tensor->data(), tensor->TotalBytes()));
    copies->emplace_back(var, std::move(copy));
    return absl::OkStatus();
  }

  int n_, r_, c_;
  bool keep_slots_;
  std::vector<int64_t> positions_;
  nlcg::Settings settings_;
  mutex mu_;
  std::shared_ptr<Slots> slots_;
};

#define NLCG_REGISTER_CPU(T)                                                            \
  REGISTER_KERNEL_BUILDER(Name("NlcgUpdate").Device(DEVICE_CPU).TypeConstraint<T>("T"), \
                          NlcgUpdateOp<CpuDevice<T>, T>)
NLCG_REGISTER_CPU(float);
NLCG_REGISTER_CPU(double);
#undef NLCG_REGISTER_CPU

#if NLCG_CUDA
#define NLCG_REGISTER_GPU(T)                                \
  REGISTER_KERNEL_BUILDER(Name("NlcgUpdate")                \
                              .Device(DEVICE_GPU)           \
                              .HostMemory("weights")        \
                              .HostMemory("slots")          \
                              .HostMemory("reals")          \
                              .HostMemory("counts")         \
                              .HostMemory("trust_ratios")   \
                              .HostMemory("curvature_sums") \
                              .HostMemory("settings")       \
                              .HostMemory("weight_decays")  \
                              .TypeConstraint<T>("T"),      \
                          NlcgUpdateOp<GpuDevice<T>, T>)
NLCG_REGISTER_GPU(float);
NLCG_REGISTER_GPU(double);
#undef NLCG_REGISTER_GPU
#endif

}  // namespace
}  // namespace tensorflow

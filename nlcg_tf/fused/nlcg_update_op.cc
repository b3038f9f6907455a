// The kernels of the ops: around an update the look-up and locking of the variables.

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "nlcg_update.h"
#include "nlcg_update_devices.h"
#include "nlcg_update_inputs.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace tensorflow {
namespace nlcg_op {

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

// `kSweep`: the one that the call does, or all.
template <typename Device, typename T, int kSweep>
class NlcgUpdateOp : public OpKernel {
 public:
  explicit NlcgUpdateOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    int n, p, r = 0, c = 0;
    std::string preconditioner, rule;
    settings_ = {};
    OP_REQUIRES_OK(ctx, ctx->GetAttr("n", &n));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("preconditioner", &preconditioner));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("p", &p));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("nesterov", &settings_.nesterov));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("keep_slots", &keep_slots_));
    if (kSweep == nlcg::kAllSweeps) {
      OP_REQUIRES_OK(ctx, ctx->GetAttr("r", &r));
      OP_REQUIRES_OK(ctx, ctx->GetAttr("c", &c));
      OP_REQUIRES_OK(ctx, ctx->GetAttr("positions", &positions_));
      OP_REQUIRES(ctx, static_cast<int>(positions_.size()) == n,
                  Invalid("NlcgUpdate: ", positions_.size(), " positions for ", n, " weights"));
    }
    OP_REQUIRES_OK(ctx, ctx->GetAttr("update_rule", &rule));
    const auto place = [](const std::string& name, const std::vector<std::string>& names) {
      return static_cast<int>(std::find(names.begin(), names.end(), name) - names.begin());
    };  // the order is that of the enums
    settings_.preconditioner = place(preconditioner, {"none", "bfgs", "normalized_bfgs", "given"});
    settings_.rule = place(rule, {"fletcher_reeves", "polak_ribiere", "blended", "momentum"});
    OP_REQUIRES(ctx, n >= 1, Invalid("NlcgUpdate: there is no variable"));
    const bool is_given = settings_.preconditioner == nlcg::kGiven;
    OP_REQUIRES(ctx, p == (is_given ? n : 0),
                Invalid("NlcgUpdate: preconditioned must be one tensor for each of the weights "
                        "with preconditioner 'given', otherwise none, got ",
                        p));
    OP_REQUIRES(ctx, !is_given || !nlcg::LooksBack(settings_),
                Invalid("NlcgUpdate: preconditioner 'given' does not go with rule '", rule, "'"));
    OP_REQUIRES(ctx, r <= 1, Invalid("NlcgUpdate: at most one trust_ratios, got ", r));
    OP_REQUIRES(ctx, c <= nlcg::KeepsSums(settings_),
                Invalid("NlcgUpdate: curvature_sums must be at most one variable with BFGS and "
                        "without nesterov, otherwise none, got ",
                        c));
    OP_REQUIRES(ctx, kSweep == nlcg::kAllSweeps || kSweep >= nlcg::FirstSweep(settings_),
                Invalid("NlcgCurvature: preconditioner '", preconditioner, "' has no such call"));
    const bool resumes = kSweep > nlcg::FirstSweep(settings_);
    if (kSweep == nlcg::kSweepDirection) {
      int k;
      OP_REQUIRES_OK(ctx, ctx->GetAttr("k", &k));
      OP_REQUIRES(ctx, k == resumes,
                  Invalid("NlcgDirection: preconditioner '", preconditioner, "' needs ",
                          resumes ? "one" : "no", " totals and stage_before, got ", k));
    }
    layout_ = Layout(settings_, n, r == 1, c == 1, resumes);
  }

  void Compute(OpKernelContext* ctx) override {
    nlcg::Settings settings = settings_;
    OP_REQUIRES_OK(ctx, ReadInputs<T>(ctx, layout_, &settings));
    Variables found;
    OP_REQUIRES_OK(ctx, LookUpVariables(ctx, &found));
    const std::vector<Var*>& vars = found.all;
    // Locked in the order of their addresses, so that two updates cannot wait for each other.
    std::vector<Var*> ordered = vars;
    std::sort(ordered.begin(), ordered.end());
    OP_REQUIRES(ctx, std::adjacent_find(ordered.begin(), ordered.end()) == ordered.end(),
                Invalid("NlcgUpdate: the same variable was given twice"));
    std::vector<mutex_lock> locks;
    locks.reserve(ordered.size());
    for (Var* var : ordered) locks.emplace_back(*var->mu());
    OP_REQUIRES_OK(ctx, CheckVariables<T>(ctx, layout_, settings, positions_, vars));
    Adopted adopted = AdoptGradients(ctx);
    OP_REQUIRES_OK(ctx, CopyShared(ctx, vars, adopted));
    nlcg::Call call;
    OP_REQUIRES_OK(ctx, MakeCall(ctx, &call));
    const bool applied = Device::Update(
        ctx, settings, KernelVariables(ctx, vars, adopted), Input(ctx, layout_.input.given),
        Data<T>(vars[layout_.variable.reals]), Data<int64_t>(vars[layout_.variable.counts]), call);
    if (applied) KeepAdopted(vars, &adopted);
  }

 private:
  using VarPtr = core::RefCountPtr<Var>;

  // The variables behind a tensor of handles, which is held so that its address means this tensor.
  struct Slots {
    Tensor handles;
    std::vector<VarPtr> vars;
  };

  // What is held of the variables, and all of them in the order of the layout.
  struct Variables {
    std::vector<VarPtr> owned;
    std::shared_ptr<Slots> slots;
    std::vector<Var*> all;
  };

  // For each of the weights the gradient that becomes its next previous gradient without being
  // copied, for nobody else holds it; otherwise null.
  using Adopted = std::vector<std::unique_ptr<Tensor>>;

  absl::Status LookUpVariables(OpKernelContext* ctx, Variables* found) {
    const int n = layout_.n, slots = layout_.slots;
    found->owned.resize(n + layout_.singles);
    found->all.resize(layout_.variable.end);
    for (int i = 0; i < n + layout_.singles; ++i) {
      // The caller is not trusted: a handle may be empty, deleted or of another type.
      const Tensor& handle = ctx->input(i < n ? i : i + 1);
      if (handle.NumElements() != 1) {
        return Invalid(
            "NlcgUpdate: each of weights, reals, counts, trust_ratios and curvature_sums must be "
            "the handle of one variable, got shape ",
            handle.shape().DebugString());
      }
      TF_RETURN_IF_ERROR(LookupResource(ctx, handle.flat<ResourceHandle>()(0), &found->owned[i]));
      found->all[i < n ? i : i + slots] = found->owned[i].get();
    }
    TF_RETURN_IF_ERROR(LookUpSlots(ctx, ctx->input(layout_.input.slots), &found->slots));
    for (int i = 0; i < slots; ++i) found->all[n + i] = found->slots->vars[i].get();
    return absl::OkStatus();
  }

  // Looks the slots up, unless they are those of the last call: hundreds of look-ups take longer than
  // the arithmetic of a small model.
  absl::Status LookUpSlots(OpKernelContext* ctx, const Tensor& handles,
                           std::shared_ptr<Slots>* slots) {
    mutex_lock lock(mu_);
    if (slots_ != nullptr && slots_->handles.data() == handles.data()) {
      *slots = slots_;
      return absl::OkStatus();
    }
    auto found = std::make_shared<Slots>();
    found->handles = handles;
    found->vars.resize(handles.NumElements());
    // A name may come to mean another variable; a counted reference may not.
    bool stable = true;
    for (int64_t i = 0; i < handles.NumElements(); ++i) {
      const ResourceHandle& handle = handles.flat<ResourceHandle>()(i);
      TF_RETURN_IF_ERROR(LookupResource(ctx, handle, &found->vars[i]));
      stable &= handle.IsRefCounting();
    }
    if (keep_slots_ && stable) slots_ = found;
    *slots = std::move(found);
    return absl::OkStatus();
  }

  // With the memory of the outputs.
  absl::Status MakeCall(OpKernelContext* ctx, nlcg::Call* call) const {
    if (kSweep == nlcg::kAllSweeps) return absl::OkStatus();
    call->sweep = kSweep;
    if (layout_.resumes) {
      call->totals = ctx->input(layout_.input.totals).flat<double>().data();
      call->stage_before = ctx->input(layout_.input.stage_before).data();
    }
    Tensor* sums = nullptr;
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, TensorShape({nlcg::kSums}), &sums));
    call->sums = sums->flat<double>().data();
    if (kSweep == nlcg::kSweepStep) return absl::OkStatus();
    Tensor* stage = nullptr;
    const TensorShape bytes({sizeof(nlcg::Stage<T>)});
    TF_RETURN_IF_ERROR(ctx->allocate_output(1, bytes, &stage));
    call->stage = stage->data();
    return absl::OkStatus();
  }

  Adopted AdoptGradients(OpKernelContext* ctx) const {
    Adopted adopted(layout_.n);
    const bool is_last = kSweep == nlcg::kAllSweeps || kSweep == nlcg::kSweepStep;
    if (!Device::kKnowsOutcome || !layout_.keeps_gradient || !is_last) return adopted;
    for (int i = 0; i < layout_.n; ++i) {
      const int gradient = layout_.input.gradients + i;
      adopted[i] = ctx->forward_input(gradient, OpKernelContext::Params::kNoReservation,
                                      DataTypeToEnum<T>::value, ctx->input(gradient).shape(),
                                      DEVICE_MEMORY, AllocatorAttributes());
    }
    return adopted;
  }

  // Gives each variable that will be written a buffer of its own. All memory is there before anything
  // is written: an update is done as a whole or not at all.
  absl::Status CopyShared(OpKernelContext* ctx, const std::vector<Var*>& vars,
                          const Adopted& adopted) const {
    const int previous = layout_.variable.previous, diagonals = layout_.variable.diagonals;
    std::vector<std::pair<Var*, Tensor>> copies;
    for (int i = 0; i < layout_.variable.end; ++i) {
      if (i >= previous && i < diagonals && adopted[i - previous] != nullptr) continue;
      TF_RETURN_IF_ERROR(CopyIfShared(ctx, vars[i], &copies));
    }
    for (auto& copy : copies) *copy.first->tensor() = std::move(copy.second);
    return absl::OkStatus();
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

  static const T* Input(OpKernelContext* ctx, int input) {
    return ctx->input(input).flat<T>().data();
  }

  template <typename Element>
  static Element* Data(Var* var) {
    return var->tensor()->template flat<Element>().data();
  }

  std::vector<nlcg::Variable<T>> KernelVariables(OpKernelContext* ctx,
                                                 const std::vector<Var*>& vars,
                                                 const Adopted& adopted) const {
    const auto& at = layout_.variable;
    const auto weight_decays = ctx->input(layout_.input.weight_decays).vec<double>();
    std::vector<nlcg::Variable<T>> variables(layout_.n);
    for (int i = 0; i < layout_.n; ++i) {
      const Tensor& gradient = ctx->input(layout_.input.gradients + i);
      T* const previous = layout_.keeps_gradient ? Data<T>(vars[at.previous + i]) : nullptr;
      nlcg::Variable<T>& v = variables[i];
      v.w = Data<T>(vars[i]);
      v.d = Data<T>(vars[at.directions + i]);
      v.h = layout_.has_diagonal ? Data<T>(vars[at.diagonals + i]) : nullptr;
      v.g_prev = previous;
      v.g_prev_out = adopted[i] == nullptr ? previous : nullptr;
      v.g = gradient.flat<T>().data();
      v.preconditioned = layout_.is_given ? Input(ctx, layout_.input.preconditioned + i) : nullptr;
      v.trust_ratio = layout_.has_ratios ? Data<T>(vars[at.ratios]) + positions_[i] : nullptr;
      v.curvature_sums = layout_.has_sums ? Data<T>(vars[at.sums]) + 4 * positions_[i] : nullptr;
      v.size = gradient.NumElements();
      v.weight_decay = weight_decays(i);
    }
    return variables;
  }

  void KeepAdopted(const std::vector<Var*>& vars, Adopted* adopted) const {
    for (int i = 0; i < layout_.n; ++i) {
      if ((*adopted)[i] == nullptr) continue;
      *vars[layout_.variable.previous + i]->tensor() = std::move(*(*adopted)[i]);
    }
  }

  Layout layout_;
  bool keep_slots_;
  std::vector<int64_t> positions_;
  nlcg::Settings settings_;
  mutex mu_;
  std::shared_ptr<Slots> slots_;
};

#define NLCG_CPU(name) Name(name).Device(DEVICE_CPU)
#define NLCG_GPU(name)        \
  Name(name)                  \
      .Device(DEVICE_GPU)     \
      .HostMemory("weights")  \
      .HostMemory("slots")    \
      .HostMemory("reals")    \
      .HostMemory("counts")   \
      .HostMemory("settings") \
      .HostMemory("weight_decays")
#define NLCG_REGISTER(kernel, Device, T, sweep) \
  REGISTER_KERNEL_BUILDER(kernel.TypeConstraint<T>("T"), NlcgUpdateOp<Device<T>, T, nlcg::sweep>)
#define NLCG_REGISTER_CALLS(ON_DEVICE, WHOLE, Device, T)                 \
  NLCG_REGISTER(WHOLE, Device, T, kAllSweeps);                           \
  NLCG_REGISTER(ON_DEVICE("NlcgCurvature"), Device, T, kSweepCurvature); \
  NLCG_REGISTER(ON_DEVICE("NlcgDirection"), Device, T, kSweepDirection); \
  NLCG_REGISTER(ON_DEVICE("NlcgStep"), Device, T, kSweepStep)

NLCG_REGISTER_CALLS(NLCG_CPU, NLCG_CPU("NlcgUpdate"), CpuDevice, float);
NLCG_REGISTER_CALLS(NLCG_CPU, NLCG_CPU("NlcgUpdate"), CpuDevice, double);
#if NLCG_CUDA
#define NLCG_WHOLE NLCG_GPU("NlcgUpdate").HostMemory("trust_ratios").HostMemory("curvature_sums")
NLCG_REGISTER_CALLS(NLCG_GPU, NLCG_WHOLE, GpuDevice, float);
NLCG_REGISTER_CALLS(NLCG_GPU, NLCG_WHOLE, GpuDevice, double);
#endif

}  // namespace
}  // namespace nlcg_op
}  // namespace tensorflow

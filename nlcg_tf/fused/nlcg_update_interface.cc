// What the TensorFlow ops take and give.

#include <string>
#include <vector>

#include "nlcg_update.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace tensorflow {
namespace nlcg_op {
namespace {

using shape_inference::InferenceContext;
using shape_inference::ShapeHandle;

absl::Status InferShapes(InferenceContext* c) {
  ShapeHandle unused;
  for (const char* name : {"slots", "given", "settings", "weight_decays"}) {
    std::vector<ShapeHandle> shapes;
    TF_RETURN_IF_ERROR(c->input(name, &shapes));
    TF_RETURN_IF_ERROR(c->WithRank(shapes[0], 1, &unused));
  }
  if (c->num_outputs() > 0) c->set_output(0, c->Vector(nlcg::kSums));
  if (c->num_outputs() > 1) c->set_output(1, c->UnknownShapeOfRank(1));  // the bytes of a stage
  return absl::OkStatus();
}

// What all calls take before and after what only some take.
#define NLCG_VARIABLES            \
  .Input("weights: n * resource") \
      .Input("slots: resource")   \
      .Input("reals: resource")   \
      .Input("counts: resource")  \
      .SetIsStateful()            \
      .SetShapeFn(InferShapes)

#define NLCG_VALUES                                                                     \
  .Input("gradients: n * T")                                                            \
      .Input("preconditioned: p * T")                                                   \
      .Input("given: T")                                                                \
      .Input("settings: double")                                                        \
      .Input("weight_decays: double")                                                   \
      .Attr("n: int >= 0")                                                              \
      .Attr("p: int >= 0")                                                              \
      .Attr("T: {float, double}")                                                       \
      .Attr("preconditioner: {'none', 'bfgs', 'normalized_bfgs', 'given'}")             \
      .Attr("update_rule: {'fletcher_reeves', 'polak_ribiere', 'blended', 'momentum'}") \
      .Attr("nesterov: bool")                                                           \
      .Attr("keep_slots: bool")

REGISTER_OP("NlcgUpdate")
NLCG_VARIABLES.Input("trust_ratios: r * resource")
    .Input("curvature_sums: c * resource") NLCG_VALUES.Attr("r: int >= 0")
    .Attr("c: int >= 0")
    .Attr("positions: list(int)")
    .Doc(R"doc(
One NLCG update of all variables of a model. See nlcg_update.py for the Python interface.

weights: float variables of the shapes of `gradients`.
slots: handles from NlcgPackHandles, n of each: the directions; with BFGS, or the rules
  'polak_ribiere' and 'blended', the previous gradients; with BFGS the diagonal of the Hessian.
reals: vector variable of type T: what the enum Real in nlcg_update.h lists, and the line search's.
counts: int64 vector variable: updates, skipped, rejected, last update applied.
trust_ratios: one vector variable of type T with LARS scaling, otherwise none.
curvature_sums: one variable of type T and shape (variables, 4) with BFGS and without `nesterov`, or
  none; otherwise none.
preconditioned: with the preconditioner 'given' what it made of each gradient, otherwise none. Such a
  one goes with the rules 'fletcher_reeves' and 'momentum'.
given: the learning rate; that times the line search's scale; the loss, or 0 where the settings need
  none; and what the line search keeps, which is written behind the reals.
settings: epsilon, LARS coefficient, momentum of the rules that have one, decay of the preconditioner.
weight_decays: one for each variable.
positions: where each variable stands in `trust_ratios` and `curvature_sums`.
keep_slots: whether the kernel remembers the slots, for a graph that is run again and again.
)doc");

// The same in calls, for workers of which each has a shard of the parameters.
REGISTER_OP("NlcgCurvature")
NLCG_VARIABLES NLCG_VALUES.Output("sums: double").Output("stage: int8").Doc(R"doc(
With BFGS the first call of an update of shards: the sums that the new diagonal needs.

The other inputs of all three calls are those of NlcgUpdate, and the same each time.

sums: over this worker's shards; to be added up over all workers, for the next call.
stage: for the next call.
)doc");

REGISTER_OP("NlcgDirection")
NLCG_VARIABLES NLCG_VALUES.Input("totals: k * double")
    .Input("stage_before: k * int8")
    .Attr("k: int >= 0")
    .Output("sums: double")
    .Output("stage: int8")
    .Doc(R"doc(
With BFGS the second call, otherwise the first: updates the diagonal; the sums that beta needs.

totals: with BFGS the sums of NlcgCurvature, added up over all workers; otherwise none.
stage_before: with BFGS the stage of NlcgCurvature, otherwise none.
sums: over this worker's shards; to be added up over all workers, for the next call.
stage: for the next call.
)doc");

REGISTER_OP("NlcgStep")
NLCG_VARIABLES NLCG_VALUES.Input("totals: double")
    .Input("stage_before: int8")
    .Output("sums: double")
    .Doc(R"doc(
The last call: updates directions, weights and scalars.

totals: the sums of NlcgDirection, added up over all workers.
stage_before: the stage of NlcgDirection.
sums: over this worker's shards, for the cosine; what the call leaves in `reals` is theirs alone.
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

}  // namespace
}  // namespace nlcg_op
}  // namespace tensorflow

"""The flags that all trainers share."""

import math

import keras
from absl import flags

from trainers.optimizers import DECAYING, NAMES, make_optimizer

FLAGS = flags.FLAGS

flags.DEFINE_string("data_dir", None, "Folder of the data; TensorFlow Datasets' own by default.")
flags.DEFINE_float("weight_decay", 1e-4, "Factor of sum(w^2) in the loss.", lower_bound=0)
flags.DEFINE_float(
    "learning_rate_factor", 1.0, "Factor on the schedule's peak rate.", lower_bound=1e-12
)
flags.DEFINE_integer("global_batch_size", 128, "Images in one update.", lower_bound=1)
flags.DEFINE_integer(
    "per_worker_batch_size",
    None,
    "Images in one micro-step of one worker. The number of micro-steps in an update follows: "
    "global batch / (workers * this). By default the global batch over the workers: one.",
    lower_bound=1,
)
flags.DEFINE_integer("epochs", 200, "Length of the run.", lower_bound=1)
flags.DEFINE_enum("optimizer", "nlcg", list(NAMES), "Optimizer.")
flags.DEFINE_enum(
    "update_rule",
    "blended",
    ["blended", "fletcher_reeves", "polak_ribiere"],
    "NLCG: rule for beta; the last two are the paper's.",
)
flags.DEFINE_enum(
    "preconditioner",
    "normalized_bfgs",
    ["normalized_bfgs", "bfgs", "rms", "none"],
    "NLCG: preconditioner; bfgs is the paper's.",
)
flags.DEFINE_bool("nesterov", True, "NLCG: Nesterov's look-ahead.")
flags.DEFINE_enum(
    "line_search",
    "auto",
    ["auto", "online", "step", "none"],
    "NLCG: line search. auto is the paper's choice for the data set and batch, and none with "
    "--update_rule=blended.",
)
flags.DEFINE_float(
    "lars_coefficient",
    None,
    "NLCG, LARS: trust coefficient. By default NLCG has none, and LARS 0.001.",
    lower_bound=1e-12,
)
flags.DEFINE_float(
    "label_smoothing",
    0.0,
    "How much of a label is spread over all classes.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_enum(
    "dtype_policy",
    "float32",
    ["float32", "mixed_bfloat16", "mixed_float16"],
    "Precision of the model's computation; weights and optimizer stay float32.",
)
flags.DEFINE_bool("jit_compile", False, "Compile the forward and backward pass with XLA.")
flags.DEFINE_integer(
    "seed",
    0,
    "Seed of weights, order and augmentation.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
flags.DEFINE_string("output_dir", None, "Run folder; by default one named by the flags in runs/.")
flags.DEFINE_integer(
    "checkpoint_steps",
    None,
    "Updates between two checkpoints, besides the one after each epoch. The same command started "
    "again goes on from the newest one.",
    lower_bound=1,
)
flags.DEFINE_integer("keep_checkpoints", 2, "How many of the newest stay.", lower_bound=1)
flags.DEFINE_integer(
    "commit_steps",
    10,
    "Elastic workers: updates between two commits, to which the others return when one is lost, "
    "and at which new ones join.",
    lower_bound=1,
)
flags.DEFINE_bool(
    "deterministic", False, "TensorFlow's deterministic operations: the same run has the same bits."
)
flags.DEFINE_enum(
    "compression", "none", ["none", "fp16", "bf16"], "Gradients between workers in 16 bits."
)
flags.DEFINE_bool("dry_run", False, "Print what the run would do and need, and end.")
flags.DEFINE_integer("workers", None, "With --dry_run: how many to assume.", lower_bound=1)
flags.DEFINE_integer(
    "evaluation_epochs",
    1,
    "Epochs between two evaluations on the test images; the last is always evaluated.",
    lower_bound=1,
)
flags.DEFINE_integer("log_steps", 10, "Updates between two logged steps.", lower_bound=1)


for _name in ("weight_decay", "learning_rate_factor", "lars_coefficient", "label_smoothing"):
    flags.register_validator(
        _name, lambda value: value is None or math.isfinite(value), "must be a finite number"
    )

# What decides the result of a run: none of these may change when it is resumed.
DECISIVE = (
    "weight_decay",
    "learning_rate_factor",
    "global_batch_size",
    "epochs",
    "optimizer",
    "update_rule",
    "preconditioner",
    "nesterov",
    "line_search",
    "lars_coefficient",
    "seed",
    "compression",
    "label_smoothing",
    "dtype_policy",
)


def configure_keras():
    """Makes Keras independent of the user's keras.json.

    Raises:
        SystemExit: if its backend is another than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise SystemExit(
            "error: the trainers need KERAS_BACKEND=tensorflow. Keras' backend is "
            f"{keras.backend.backend()}, by that variable or keras.json"
        )
    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")


def identity():
    """The shared flags that decide what a run computes, as a dict."""
    return {name: FLAGS[name].value for name in DECISIVE}


def optimizer(schedule, default_line_search):
    """The optimizer that the flags ask for."""
    line_search = FLAGS.line_search
    if line_search == "auto":
        line_search = "none" if FLAGS.update_rule == "blended" else default_line_search
    return make_optimizer(
        FLAGS.optimizer,
        schedule,
        FLAGS.weight_decay,
        FLAGS.lars_coefficient,
        update_rule=FLAGS.update_rule,
        preconditioner=None if FLAGS.preconditioner == "none" else FLAGS.preconditioner,
        nesterov=FLAGS.nesterov,
        line_search=None if line_search == "none" else line_search,
    )


def weight_decay():
    """The factor of sum(w^2) in the loss; some optimizers see to the decay themselves."""
    return 0.0 if FLAGS.optimizer in DECAYING else FLAGS.weight_decay

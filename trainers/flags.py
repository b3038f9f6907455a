"""The flags that all trainers share, each with its role, and what is made of them.

A flag decides the result of a run, and may not change when the run is resumed, or it is free: it
says where and how the work is done. To add one, define it here, or in a trainer that alone has it.
"""

import math
import sys

from absl import flags

from trainers.engine.files import path_of
from trainers.optimizers.choice import OPTIMIZERS, from_flags, trained

FLAGS = flags.FLAGS
DECISIVE = []
# Of these two, which one program has each, older run folders do not say that they are free.
FREE = ["download", "max_corrupt_examples"]


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path"

    def parse(self, argument):
        return str(path_of(argument))


class _PreconditionerParser(flags.ArgumentParser):
    syntactic_help = "a string"

    def parse(self, argument):
        if argument != "rms":
            return argument
        # Commands of before that go on; a run folder of theirs does not.
        print(
            "warning: --preconditioner=rms is no longer there: spectral, which took its place, is "
            "used. Its rate is a fraction of each kernel's norm",
            file=sys.stderr,
        )
        return "spectral"


def define_path(name, help):
    """Defines a flag whose value is a path, `None` by default."""
    flags.DEFINE(_PathParser(), name, None, help, serializer=flags.ArgumentSerializer())


def decides(name):
    """Notes that the flag decides the result."""
    DECISIVE.append(name)
    return name


def free(name):
    """Notes that the flag may change between two parts of a run."""
    if name not in FREE:
        FREE.append(name)
    return name


define_path(free("data_dir"), "Folder of the data; TensorFlow Datasets' own by default.")
flags.DEFINE_float(decides("weight_decay"), 1e-4, "Factor of sum(w^2) in the loss.", lower_bound=0)
flags.DEFINE_float(
    decides("learning_rate_factor"), 1.0, "Factor on the schedule's peak rate.", lower_bound=1e-12
)
flags.DEFINE_enum(
    decides("decay"),
    "paper",
    ["paper", "cosine"],
    "How the rate falls: as the paper's, or by a cosine to 0.",
)
flags.DEFINE_float(
    decides("peak_learning_rate"),
    None,
    "The schedule's peak rate as a number, in place of the paper's, which grows with the batch.",
    lower_bound=1e-12,
)
flags.DEFINE_integer(
    decides("global_batch_size"),
    128,
    "Images in one update.",
    lower_bound=1,
    upper_bound=2**24,  # the images of an epoch are counted in 32 bits
)
flags.DEFINE_integer(
    free("per_worker_batch_size"),
    None,
    "Images in one micro-step of one worker. The number of micro-steps in an update follows: "
    "global batch / (workers * this). By default the global batch over the workers: one.",
    lower_bound=1,
)
flags.DEFINE_integer(decides("epochs"), 200, "Length of the run.", lower_bound=1)
flags.DEFINE_string(decides("optimizer"), "nlcg", f"Optimizer: {', '.join(trained())}.")
flags.DEFINE_enum(
    decides("update_rule"),
    "momentum",
    ["momentum", "blended", "fletcher_reeves", "polak_ribiere"],
    "NLCG: rule for beta; the last two are the paper's.",
)
flags.DEFINE(
    _PreconditionerParser(),
    decides("preconditioner"),
    "spectral",
    "NLCG: preconditioner: spectral, normalized_bfgs, bfgs (the paper's) or none.",
    serializer=flags.ArgumentSerializer(),
)
flags.DEFINE_bool(decides("nesterov"), True, "NLCG: Nesterov's look-ahead.")
flags.DEFINE_enum(
    decides("line_search"),
    "auto",
    ["auto", "online", "step", "none"],
    "NLCG: line search. auto is the paper's choice for the data set and batch, and none with "
    "--update_rule=momentum and blended.",
)
flags.DEFINE_float(
    decides("lars_coefficient"),
    None,
    "NLCG, LARS: trust coefficient. By default NLCG has none, and LARS 0.001.",
    lower_bound=1e-12,
)
flags.DEFINE_float(
    decides("label_smoothing"),
    0.0,
    "How much of a label is spread over all classes.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_enum(
    decides("dtype_policy"),
    "float32",
    ["float32", "mixed_bfloat16", "mixed_float16"],
    "Precision of the model's computation; weights and optimizer stay float32.",
)
flags.DEFINE_bool(free("jit_compile"), False, "Compile the forward and backward pass with XLA.")
flags.DEFINE_integer(
    decides("seed"),
    0,
    "Seed of weights, order and augmentation.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
define_path(free("output_dir"), "Run folder; by default one named by the flags in runs/.")
flags.DEFINE_integer(
    free("checkpoint_steps"),
    None,
    "Updates between two checkpoints, besides the one after each epoch. The same command started "
    "again goes on from the newest one.",
    lower_bound=1,
)
flags.DEFINE_integer(free("keep_checkpoints"), 2, "How many of the newest stay.", lower_bound=1)
flags.DEFINE_integer(
    free("commit_steps"),
    10,
    "Elastic workers: updates between two commits, to which the others return when one is lost, "
    "and at which new ones join.",
    lower_bound=1,
)
flags.DEFINE_bool(
    free("deterministic"),
    False,
    "TensorFlow's deterministic operations: the same run has the same bits.",
)
flags.DEFINE_enum(
    decides("compression"),
    "none",
    ["none", "fp16", "bf16"],
    "Gradients between workers in 16 bits.",
)
flags.DEFINE_bool(
    free("shard_optimizer"),
    False,
    "Each worker keeps and updates its part of the optimizer's state only.",
)
flags.DEFINE_bool(free("dry_run"), False, "Print what the run would do and need, and end.")
flags.DEFINE_integer(free("workers"), None, "With --dry_run: how many to assume.", lower_bound=1)
flags.DEFINE_integer(
    free("evaluation_epochs"),
    1,
    "Epochs between two evaluations on the test images; the last is always evaluated.",
    lower_bound=1,
)
flags.DEFINE_integer(free("log_steps"), 10, "Updates between two logged steps.", lower_bound=1)


_RATES = ("learning_rate_factor", "peak_learning_rate")
for _name in (*_RATES, "weight_decay", "lars_coefficient", "label_smoothing"):
    flags.register_validator(
        _name, lambda value: value is None or math.isfinite(value), "must be a finite number"
    )


def _check_preconditioner(name):
    from nlcg_tf import preconditioner  # not needed by those who read the flags' names alone

    return is_among(name, [*preconditioner.NAMES, "none"])


def is_among(value, choices):
    """Whether a flag's value is one of a table that may grow; otherwise absl's own message."""
    if value not in choices:
        raise flags.ValidationError(f"should be one of <{'|'.join(choices)}>")
    return True


flags.register_validator("preconditioner", _check_preconditioner)
flags.register_validator("optimizer", lambda name: is_among(name, trained()))


def own_flags():
    """The trainer's flags by their names, without those of absl and TensorFlow."""
    values = FLAGS.flag_values_dict()
    modules = {name: FLAGS.find_module_defining_flag(name) for name in values}
    own = [n for n in values if modules[n] == sys.argv[0] or modules[n].startswith("trainers.")]
    return {name: values[name] for name in own}


def defaults():
    """The shared flags as they are where none is given, as a dict."""
    return {name: FLAGS[name].default for name in (*DECISIVE, *FREE) if name in FLAGS}


def identity():
    """The flags that decide what a run computes, as a dict."""
    return {name: FLAGS[name].value for name in DECISIVE}


@flags.multi_flags_validator(
    ["learning_rate_factor", "peak_learning_rate"],
    "--peak_learning_rate replaces the rate that --learning_rate_factor is on: give one",
)
def _one_peak(values):
    return values["peak_learning_rate"] is None or values["learning_rate_factor"] == 1


def optimizer(schedule, paper_line_search):
    """The optimizer that the flags ask for."""
    return from_flags(FLAGS.flag_values_dict(), schedule, paper_line_search)


def weight_decay():
    """The factor of sum(w^2) in the loss; some optimizers see to the decay themselves."""
    return 0.0 if OPTIMIZERS[FLAGS.optimizer].decays else FLAGS.weight_decay

"""Python side of the fused op: loads the library once, when it is first needed."""

import functools
import json
import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from nlcg_tf import checked
from nlcg_tf.preconditioner import DiagonalBFGS, NormalizedBFGS, limited, norm_limits
from nlcg_tf.reference import COUNTS, OWN_SLOTS, REALS, cosine

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from nlcg_tf import replicas

LIBRARY = pathlib.Path(__file__).with_name("libnlcg_update.so")
BUILD_COMMAND = "python -m nlcg_tf.fused.build"
PRECONDITIONERS = {type(None): "none", DiagonalBFGS: "bfgs", NormalizedBFGS: "normalized_bfgs"}
# The rules that take P g as it is given.
LOOKS_AT_NO_STEP = ("fletcher_reeves", "momentum")
SLOTS = ("direction", "previous_gradient", "hessian_diagonal")


@functools.cache
def _load():
    """Returns `(module, None)`, or `(None, why the op is not available)`."""
    from nlcg_tf.fused.build import sources_digest  # it runs as a program too

    if not LIBRARY.is_file():
        return None, f"the fused op is not built. Run `{BUILD_COMMAND}`"
    built_for = _recorded().get("tensorflow")
    if built_for != tf.__version__:
        return None, (
            f"the fused op was built for TensorFlow {built_for}, found {tf.__version__}. "
            f"Run `{BUILD_COMMAND}`"
        )
    if sources_digest() not in (None, _recorded().get("sources")):
        return None, f"the fused op was built from other sources. Run `{BUILD_COMMAND}`"
    try:
        return tf.load_op_library(str(LIBRARY)), None
    except (tf.errors.OpError, OSError) as error:
        return None, f"the fused op cannot be loaded ({error}). Run `{BUILD_COMMAND}`"


@functools.cache
def _recorded():
    """What build.py wrote into the library; read from the file, for it may not load."""
    if not LIBRARY.is_file():
        return {}
    found = re.search(rb"nlcg_build_info:(\{.*?\})\0", LIBRARY.read_bytes())
    return json.loads(found[1]) if found else {}


def is_available() -> bool:
    """Whether the fused op is built for this TensorFlow and can be loaded."""
    return keras.backend.backend() == "tensorflow" and _load()[0] is not None


def build_info() -> dict[str, Any]:
    """What the op was built with.

    Returns:
        dict with "available", "reason" (why not, or `None`), "library" (its path), "tensorflow"
        (the version it was built for), "compiler", "flags", "cuda" (whether it has GPU kernels) and
        "sources" (their digest); the last five are missing where there is no library.
    """
    if keras.backend.backend() == "tensorflow":
        reason = _load()[1]
    else:
        reason = f"the Keras backend is {keras.backend.backend()}, not tensorflow"
    return {
        "available": reason is None,
        "reason": reason,
        "library": str(LIBRARY),
        **_recorded(),
    }


def why_not(optimizer: Any, weights: Sequence[Any]) -> str | None:
    """Why the op cannot do this update, in a sentence; `None` where it can.

    Args:
        optimizer: the `NLCG`.
        weights: list of variables to be updated. Of an optimizer that is not built, where the
            variables lie is not looked at.
    """
    if keras.backend.backend() != "tensorflow":
        return f"the Keras backend is {keras.backend.backend()}, not tensorflow"
    if tf.distribute.has_strategy():
        return "a tf.distribute strategy is active"
    if replicas.is_compiled_by_xla():
        return "XLA has no kernel for it: use jit_compile=False"
    dtypes = sorted({keras.backend.standardize_dtype(v.dtype) for v in weights})
    of_all = [optimizer.compute_dtype] if optimizer.built else dtypes
    if dtypes not in (["float32"], ["float64"]) or dtypes != of_all:
        return f"all variables must be float32 or all float64, they are {', '.join(dtypes)}"
    if type(optimizer.preconditioner) not in PRECONDITIONERS:
        name = f"the preconditioner {optimizer.preconditioner!r}"
        if optimizer.preconditioner.uses_steps:
            return f"{name} looks at steps"
        if optimizer.update_rule not in LOOKS_AT_NO_STEP:
            return f"with {name} it does not know the update rule {optimizer.update_rule!r}"
    module, reason = _load()
    if module is None:
        _warn_once(reason)
        return reason
    if not optimizer.built:
        return None
    slots = [v.value for v in _slots_of_the_op(optimizer, optimizer.slots)]
    devices = {v.device for v in [*weights, *slots, optimizer.reals.value, optimizer.counts.value]}
    if len(devices) > 1:
        return f"its variables lie on several devices: {', '.join(sorted(map(str, devices)))}"
    if any("GPU" in (device or "") for device in devices) and not _recorded()["cuda"]:
        return f"it was built without CUDA. Run `NLCG_CUDA=1 {BUILD_COMMAND}`"
    return None


@functools.cache
def _warn_once(reason):
    warnings.warn(f"NLCG uses the slower reference update: {reason}", stacklevel=2)


def update(optimizer, gradients, learning_rate, variables, positions, weight_decays):
    """One update by the op; the arguments are those of `nlcg_tf.reference.update`.

    Raises:
        tf.errors.OpError: where the variables do not fit each other; nothing is changed then.
    """
    dtype = tf.as_dtype(optimizer.compute_dtype)
    gradients = [tf.cast(g, dtype) for g in gradients]
    preconditioned, limits = [], None
    known = type(optimizer.preconditioner) in PRECONDITIONERS
    if not known:
        preconditioned, state, mean, limits = _precondition(optimizer, gradients, variables)
    slots = [v.handle for v in _slots_of_the_op(optimizer, variables["slots"])]
    module, _ = _load()
    # The handles are constants of a graph, packed once. Captured by it, so that SavedModels could
    # hold it, they would cost a quarter of an update of ResNet-32.
    with tf.init_scope():
        packed = module.nlcg_pack_handles(slots)
    with tf.device("CPU:0"):  # where the op reads them; on a GPU they would have to be fetched
        vector = tf.constant(_settings_vector(optimizer), tf.float64)
        weight_decays = tf.constant(weight_decays, tf.float64)
    arguments = {
        "weights": [v.handle for v in variables["weights"]],
        "slots": packed,
        "reals": variables["reals"].handle,
        "counts": variables["counts"].handle,
        "gradients": gradients,
        "preconditioned": preconditioned,
        "given": _given(optimizer, tf.cast(learning_rate, dtype), variables),
        "settings": vector,
        "weight_decays": weight_decays,
        "preconditioner": PRECONDITIONERS.get(type(optimizer.preconditioner), "given"),
        "update_rule": optimizer.update_rule,
        "nesterov": optimizer.nesterov,
        "keep_slots": not tf.executing_eagerly(),
    }
    if optimizer.sums.is_divided:
        _update_shards(module, arguments, optimizer, variables)
    else:
        module.nlcg_update(
            trust_ratios=[variables["trust_ratios"].handle] if optimizer.lars_coefficient else [],
            curvature_sums=[v.handle for v in (variables.get("curvature_sums"),) if v is not None],
            positions=positions,
            **arguments,
        )
    if not known:
        _set_real(variables, "preconditioner_mean", mean)
        _assign_state(variables, state)
    if limits is not None:
        weights = _values(variables["weights"])
        for variable, old, new in zip(
            variables["weights"], weights, limited(weights, limits, optimizer.sums)
        ):
            if new is not old:
                variable.assign(new)


def _values(variables):
    return [tf.convert_to_tensor(v) for v in variables]


def _given(optimizer, learning_rate, variables):
    """The op's input of that name: the scalars of this update, with the line search's new state."""
    loss = tf.cast(variables.get("loss", 0.0), learning_rate.dtype)
    search = optimizer.line_search
    if search is None:
        return tf.stack([learning_rate, learning_rate, loss])
    names = optimizer.real_names[len(REALS) :]
    state = dict(zip(names, tf.unstack(tf.convert_to_tensor(variables["reals"])[len(REALS) :])))
    updates = tf.convert_to_tensor(variables["counts"])[COUNTS.index("updates")]
    state = checked.update_line_search(search, state, loss, updates)
    scale = state["learning_rate_scale"]
    return tf.stack([learning_rate, learning_rate * scale, loss, *state.values()])


def _slots_of_the_op(optimizer, slots):
    """In the op's order; a state that Keras updates is not among them, whatever its name."""
    known = type(optimizer.preconditioner) in PRECONDITIONERS
    return [v for name in (SLOTS if known else OWN_SLOTS) for v in slots.get(name, [])]


def _precondition(optimizer, gradients, variables):
    """P g, the preconditioner's new state, the mean of its diagonal, and the limits of norms."""
    preconditioner, dtype = optimizer.preconditioner, optimizer.compute_dtype
    state = {
        name: [v if v is None else tf.cast(v, dtype) for v in slot]
        for name, slot in variables["slots"].items()
        if name not in OWN_SLOTS
    }
    weights = limits = None
    gain_ratio, sums = tf.zeros((), dtype), optimizer.sums
    if preconditioner.uses_weights or preconditioner.limits_norms:
        weights = _values(variables["weights"])  # read once: a graph then takes each norm once
    if preconditioner.limits_norms:
        limits = norm_limits(weights, sums)
    if not preconditioner.uses_weights:
        weights = None
    state, _ = checked.update_preconditioner(
        preconditioner, state, gradients, weights, None, None, gain_ratio, sums
    )
    preconditioned, mean = checked.apply_preconditioner(
        preconditioner, state, gradients, weights, optimizer.epsilon, sums
    )
    return preconditioned, state, mean, limits


def _assign_state(variables, state):
    """Keeps a preconditioner's new state, if the update was done."""
    applied = variables["counts"][COUNTS.index("last_update_applied")] == 1
    for name, values in state.items():
        for variable, value in zip(variables["slots"][name], values):
            if variable is not None:
                value = tf.cast(value, variable.dtype)
                variable.assign(tf.where(applied, value, tf.convert_to_tensor(variable)))


def _set_real(variables, name, value):
    """Sets a scalar that the op cannot tell, if the update was done."""
    reals = tf.convert_to_tensor(variables["reals"])
    applied = variables["counts"][COUNTS.index("last_update_applied")] == 1
    place = REALS.index(name)
    new = tf.where(applied, tf.cast(value, reals.dtype), reals[place])
    variables["reals"].assign(tf.tensor_scatter_nd_update(reals, [[place]], [new]))


def _update_shards(module, arguments, optimizer, variables):
    """In calls: between two of them this worker's sums become those over all shards."""
    over_workers = optimizer.sums.over_workers
    totals, stage = [], []
    if isinstance(optimizer.preconditioner, DiagonalBFGS):
        sums, stage = module.nlcg_curvature(**arguments)
        totals, stage = [over_workers(sums)], [stage]
    sums, stage = module.nlcg_direction(totals=totals, stage_before=stage, **arguments)
    sums = module.nlcg_step(totals=over_workers(sums), stage_before=stage, **arguments)
    # The op could tell the cosine over its own shards only.
    _set_real(variables, "cosine", cosine(*tf.unstack(over_workers(sums)[:3])))


def _settings_vector(optimizer):
    own = type(optimizer.preconditioner) in PRECONDITIONERS
    decay = getattr(optimizer.preconditioner, "decay", 1.0) if own else 1.0
    return [optimizer.epsilon, optimizer.lars_coefficient or 0.0, optimizer.momentum, decay]

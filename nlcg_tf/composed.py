"""The NLCG update composed of `keras.ops`: the specification, and the path for every backend.

Source: Adya, Palakkode & Tuzel 2018, arXiv 1812.02886, Algorithm 1 and section 3.2.
"""

import itertools

from keras import ops

from nlcg_tf import direction, noise
from nlcg_tf.preconditioner import Identity, uses_steps
from nlcg_tf.reductions import all_finite, dot, total

# What the optimizer's two vectors of scalars hold; in `reals` the line search's state follows.
REALS = ("delta", "step_size", "beta", "curvature", "cosine", "kappa", "preconditioner_mean")
REALS += ("tested_loss", "left_over", "foretold", "mean_square", "first_square")
REALS += ("mean_length", "cap")
COUNTS = ("updates", "skipped_updates", "rejected_curvatures", "last_update_applied")


def update(optimizer, gradients, learning_rate, variables, positions, weight_decays):
    """Reads the variables, computes one update, assigns.

    Args:
        optimizer: the `NLCG`, of which only the settings are read.
        gradients: list of tensors, one for each of the weights.
        learning_rate: scalar tensor.
        variables: dict of variables: lists "weights" and, by their names, "slots"; vectors "reals",
            "counts" and, with LARS scaling, "trust_ratios"; the scalar "loss" where the settings
            need it; "curvature_sums" where the fused op can make use of them.
        positions: list of ints, where each of the weights stands in "trust_ratios".
        weight_decays: list of floats.
    """
    dtype, blends = optimizer.compute_dtype, optimizer.update_rule == "blended"

    def read(xs):
        return [ops.cast(x, dtype) for x in xs]

    preconditioner = optimizer.preconditioner or Identity()
    old = dict(zip(optimizer.real_names, _unstack(variables["reals"])))
    old.update(zip(COUNTS, _unstack(variables["counts"])))
    first = old["updates"] == 0
    learning_rate = ops.cast(learning_rate, dtype)
    loss = ops.cast(variables["loss"], dtype) if "loss" in variables else None
    g, w = read(gradients), read(variables["weights"])
    slots = {name: read(slot) for name, slot in variables["slots"].items()}
    d, g_prev = slots["direction"], slots.get("previous_gradient")
    state_before = {name: slots[name] for name in preconditioner.initial_state()}
    new = {name: old[name] for name in REALS}
    new["cap"] = ops.ones_like(old["cap"])

    def step_direction(preconditioned, d, beta, kappa, cap=1.0):
        """d, or with Nesterov's look-ahead z + beta d, as far as gradients are noise."""
        if not optimizer.nesterov:
            return d
        look_ahead = 1 - kappa
        kept = 1 - look_ahead + look_ahead * beta
        return [kept * d_i - look_ahead * cap * z_i for z_i, d_i in zip(preconditioned, d)]

    # Line search
    line_search, searched, alpha = optimizer.line_search, {}, learning_rate
    if line_search is not None:
        searched = {name: old[name] for name in line_search.initial_state()}
        searched = line_search.update(searched, loss, old["updates"])
        alpha = learning_rate * searched["learning_rate_scale"]

    # Curvature
    y = s = preconditioned_before = None
    curvature, kappa = ops.zeros_like(alpha), ops.zeros_like(alpha)
    needs_step = uses_steps(optimizer.preconditioner) or blends
    if optimizer.update_rule == "polak_ribiere" or (needs_step and optimizer.nesterov):
        preconditioned_before, _ = preconditioner.apply(state_before, g_prev, optimizer.epsilon)
    if needs_step:
        step = step_direction(preconditioned_before, d, old["beta"], old["kappa"], old["cap"])
        sizes = [old["step_size"]] * len(w)
        if optimizer.lars_coefficient:
            rows = _unstack(variables["trust_ratios"])
            sizes = [old["step_size"] * rows[i] for i in positions]
        y = [g_i - p_i for g_i, p_i in zip(g, g_prev)]
        s = [size_i * step_i for size_i, step_i in zip(sizes, step)]
    if uses_steps(optimizer.preconditioner):
        curvature = dot(y, s)
    if blends:
        slopes = dot(g, s), dot(g_prev, s)
        means = old["left_over"], old["foretold"]
        kappa, left_over, foretold = noise.trapezoid_test(
            loss, old["tested_loss"], *slopes, *means, old["updates"]
        )
        new.update(tested_loss=loss, left_over=left_over, foretold=foretold)
    state, accepted = preconditioner.update(state_before, g, y, s, kappa)

    # Direction
    preconditioned, mean = preconditioner.apply(state, g, optimizer.epsilon)
    delta_new = dot(g, preconditioned)
    if blends:
        beta = direction.blended(delta_new, old["delta"], kappa, optimizer.momentum)
    elif optimizer.update_rule == "polak_ribiere":
        delta_mid = dot(g, preconditioned_before)
        beta = direction.polak_ribiere(delta_new, delta_mid, old["delta"])
    else:
        beta = direction.fletcher_reeves(delta_new, old["delta"])
    beta = ops.where(first, ops.zeros_like(beta), beta)
    d = [beta * d_i - z_i for z_i, d_i in zip(preconditioned, d)]

    # Step
    step = step_direction(preconditioned, d, beta, kappa)
    if blends:
        factor, *squares = noise.length_factor(
            dot(g, g), old["mean_square"], old["first_square"], kappa
        )
        length = factor * ops.sqrt(dot(step, step))
        cap, mean_length = noise.length_cap(length, old["mean_length"], optimizer.momentum)
        d, step = [cap * d_i for d_i in d], [cap * step_i for step_i in step]
        alpha = alpha * factor
        new.update(zip(("mean_square", "first_square"), squares))
        new.update(mean_length=mean_length, cap=cap)
    sizes = [alpha] * len(w)
    if optimizer.lars_coefficient:
        ratios = [_trust_ratio(optimizer, w_i, step_i) for w_i, step_i in zip(w, step)]
        sizes = [alpha * ratio for ratio in ratios]
    w = [
        (w_i - w_i * decay * learning_rate if decay else w_i) + size_i * step_i
        for w_i, step_i, size_i, decay in zip(w, step, sizes, weight_decays)
    ]
    new.update(delta=delta_new, step_size=alpha, beta=beta, curvature=curvature, **searched)
    new.update(cosine=_cosine(g, step), kappa=kappa, preconditioner_mean=mean)

    # Nothing changes if anything is not finite.
    applied = all_finite([*g, alpha] if loss is None else [*g, alpha, loss])

    def assign(variable, value):
        value = ops.cast(value, variable.dtype)
        variable.assign(ops.where(applied, value, ops.convert_to_tensor(variable)))

    values = {"direction": d, "previous_gradient": g, **state}
    pairs = [zip(variables["weights"], w)]
    pairs += [zip(slot, values[name]) for name, slot in variables["slots"].items()]
    for variable, value in itertools.chain(*pairs):
        assign(variable, value)
    if optimizer.lars_coefficient:
        rows = _unstack(variables["trust_ratios"])
        for position, ratio in zip(positions, ratios):
            rows[position] = ratio
        assign(variables["trust_ratios"], ops.stack(rows))
    if "curvature_sums" in variables:  # not kept here, and thereby said to be unknown
        sums = variables["curvature_sums"]
        assign(sums, ops.full(sums.shape, -1.0, sums.dtype))
    assign(variables["reals"], ops.stack([new[name] for name in optimizer.real_names]))
    rejected = applied & ops.logical_not(first | accepted)
    changes = [applied, ops.logical_not(applied), rejected]
    changes = [ops.cast(change, old["updates"].dtype) for change in changes]
    counts = [old[name] + change for name, change in zip(COUNTS, changes)]
    variables["counts"].assign(ops.stack([*counts, changes[0]]))


def _unstack(variable):
    return list(ops.unstack(ops.convert_to_tensor(variable), variable.shape[0]))


def _trust_ratio(optimizer, w, step):
    norm = ops.sqrt(total(w * w))
    ratio = optimizer.lars_coefficient * norm / (ops.sqrt(total(step * step)) + optimizer.epsilon)
    return ops.where(norm > 0, ratio, ops.ones_like(ratio))


def _cosine(g, step):
    norms = ops.sqrt(dot(g, g)) * ops.sqrt(dot(step, step))
    return ops.where(norms > 0, -dot(g, step) / norms, ops.zeros_like(norms))

"""The NLCG update composed of `keras.ops`: the specification, and the path for every backend.

Source: Adya, Palakkode & Tuzel 2018, arXiv 1812.02886, Algorithm 1 and section 3.2.
"""

from keras import ops

from nlcg_tf import direction, preconditioner
from nlcg_tf.reductions import all_finite, dot, total

# What the optimizer's two vectors of scalars hold; in `reals` the line search's state follows.
REALS = ("delta", "step_size", "beta", "curvature", "cosine")
COUNTS = ("updates", "skipped_updates", "rejected_curvatures", "last_update_applied")


def update(settings, gradients, learning_rate, variables, positions, weight_decays):
    """Reads the variables, computes one update, assigns.

    Args:
        settings: the optimizer, of which only the settings are read.
        gradients: list of tensors, one for each of the weights.
        learning_rate: scalar tensor.
        variables: dict of variables: lists "weights", "direction", "previous_gradient" and, with a
            preconditioner, "hessian_diagonal"; vectors "reals", "counts" and, with LARS scaling,
            "trust_ratios"; the scalar "loss" with a line search.
        positions: list of ints, where each of the weights stands in "trust_ratios".
        weight_decays: list of floats.
    """
    dtype, epsilon, line_search = settings.compute_dtype, settings.epsilon, settings.line_search

    def read(xs):
        return [ops.cast(x, dtype) for x in xs]

    g, w = read(gradients), read(variables["weights"])
    d, g_prev = read(variables["direction"]), read(variables["previous_gradient"])
    old = dict(zip(settings.real_names, _unstack(variables["reals"])))
    old.update(zip(COUNTS, _unstack(variables["counts"])))
    learning_rate = ops.cast(learning_rate, dtype)
    first = old["updates"] == 0

    # Preconditioner
    if settings.preconditioner:
        h_before = read(variables["hessian_diagonal"])
        steps = [old["step_size"]] * len(w)
        if settings.lars_coefficient:
            rows = _unstack(variables["trust_ratios"])
            steps = [old["step_size"] * rows[i] for i in positions]
        y = [g_i - p_i for g_i, p_i in zip(g, g_prev)]
        s = [step_i * d_i for step_i, d_i in zip(steps, d)]
        h, curvature, accepted = preconditioner.bfgs(h_before, y, s, epsilon)
    else:
        h_before = h = [ops.ones_like(w_i) for w_i in w]
        curvature, accepted = ops.zeros_like(old["curvature"]), True

    # Direction
    z = [-g_i / (h_i + epsilon) for g_i, h_i in zip(g, h)]
    delta_new = -dot(g, z)
    delta_mid = None
    if settings.update_rule == "polak_ribiere":
        delta_mid = dot(g, [p_i / (h_i + epsilon) for p_i, h_i in zip(g_prev, h_before)])
    beta = direction.RULES[settings.update_rule](delta_new, delta_mid, old["delta"], epsilon)
    beta = ops.where(first, ops.zeros_like(beta), beta)
    d = [z_i + beta * d_i for z_i, d_i in zip(z, d)]

    # Line search
    new, alpha, must_be_finite = {}, learning_rate, list(g)
    if line_search is not None:
        loss = ops.cast(variables["loss"], dtype)
        state = {name: old[name] for name in line_search.initial_state()}
        new = line_search.update(state, loss, old["updates"])
        alpha = learning_rate * new["learning_rate_scale"]
        must_be_finite.append(loss)

    # Step
    steps = [alpha] * len(w)
    if settings.lars_coefficient:
        ratios = [_trust_ratio(settings, w_i, d_i) for w_i, d_i in zip(w, d)]
        steps = [alpha * ratio for ratio in ratios]
    w = [
        (w_i - w_i * decay * learning_rate if decay else w_i) + step_i * d_i
        for w_i, d_i, step_i, decay in zip(w, d, steps, weight_decays)
    ]

    applied = all_finite([*must_be_finite, alpha])

    def assign(variable, value):
        value = ops.cast(value, variable.dtype)
        variable.assign(ops.where(applied, value, ops.convert_to_tensor(variable)))

    slots = {"weights": w, "direction": d, "previous_gradient": g}
    if settings.preconditioner:
        slots["hessian_diagonal"] = h
    for name, values in slots.items():
        for variable, value in zip(variables[name], values):
            assign(variable, value)
    if settings.lars_coefficient:
        rows = _unstack(variables["trust_ratios"])
        for position, ratio in zip(positions, ratios):
            rows[position] = ratio
        assign(variables["trust_ratios"], ops.stack(rows))
    cosine = _cosine(g, d)
    new.update(delta=delta_new, step_size=alpha, beta=beta, curvature=curvature, cosine=cosine)
    assign(variables["reals"], ops.stack([new[name] for name in settings.real_names]))
    rejected = applied & ops.logical_not(first | accepted)
    changes = [applied, ops.logical_not(applied), rejected]
    changes = [ops.cast(change, old["updates"].dtype) for change in changes]
    counts = [old[name] + change for name, change in zip(COUNTS, changes)]
    variables["counts"].assign(ops.stack([*counts, changes[0]]))


def _unstack(variable):
    return list(ops.unstack(ops.convert_to_tensor(variable), variable.shape[0]))


def _trust_ratio(settings, w, d):
    norm = ops.sqrt(total(w * w))
    ratio = settings.lars_coefficient * norm / (ops.sqrt(total(d * d)) + settings.epsilon)
    return ops.where(norm > 0, ratio, ops.ones_like(ratio))


def _cosine(g, d):
    norms = ops.sqrt(dot(g, g)) * ops.sqrt(dot(d, d))
    return ops.where(norms > 0, -dot(g, d) / norms, ops.zeros_like(norms))

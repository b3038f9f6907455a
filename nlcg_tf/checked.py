"""Calls of a user's preconditioner and line search: what they return, checked and converted.

The fused op and the reference update both come here, before anything changes. All raise a
ValueError that names the method, what it must return, and what it returned.
"""

from collections.abc import Mapping

from keras import ops

from nlcg_tf.variables import has_shape, known_shape


def update_preconditioner(preconditioner, state, *what):
    """`preconditioner.update(state, *what)`."""
    by = f"`update` of preconditioner {preconditioner!r}"
    given = {name: [*entries] for name, entries in state.items()}  # it may change that in place
    new, accepted = _pair(preconditioner.update(given, *what), by)
    _check_names(new, state, by)
    new = {
        name: _tensors_like(x, new[name], f"its state '{name}'", by) for name, x in state.items()
    }
    return new, ops.cast(_scalar(accepted, "whether it accepted y and s", by), "bool")


def apply_preconditioner(preconditioner, state, g, w, epsilon, sums):
    """`preconditioner.apply`; of shards that hold whole variables with each of those by itself."""
    by = f"`apply` of preconditioner {preconditioner!r}"
    is_whole = preconditioner.couples != "elements"
    if is_whole:
        g, w = sums.pieces(g), None if w is None else sums.pieces(w)
    found, mean = _pair(preconditioner.apply(state, g, w, epsilon, sums), by)
    preconditioned = _tensors_like(g, found, "P g", by)
    mean = ops.cast(_scalar(mean, "the mean of its diagonal", by), g[0].dtype)
    return sums.join(preconditioned) if is_whole else preconditioned, mean


def update_line_search(line_search, state, loss, updates):
    """`line_search.update`."""
    by = f"`update` of line_search {line_search!r}"
    new = line_search.update(dict(state), loss, updates)
    _check_names(new, state, by)
    return {name: ops.cast(_scalar(new[name], f"'{name}'", by), loss.dtype) for name in state}


def _pair(result, by):
    if not isinstance(result, (list, tuple)) or len(result) != 2:
        raise ValueError(f"{by} must return two things. Received: {result!r}")
    return result


def _check_names(new, state, by):
    is_mapping = isinstance(new, Mapping)
    if not is_mapping or set(new) != set(state):
        raise ValueError(
            f"{by} must return the states {sorted(state)}. "
            f"Received: {sorted(new) if is_mapping else new!r}"
        )


def _scalar(x, what, by):
    if x is None or not has_shape(x, ()):
        raise ValueError(f"{by} must return a scalar as {what}. Received: {x!r}")
    return x


def _tensors_like(wanted, found, what, by):
    """What was found, as tensors of the wanted types and shapes; `None` where that is wanted."""
    fits = isinstance(found, (list, tuple)) and len(found) == len(wanted)
    if not fits or not all(
        w is None or (x is not None and has_shape(x, w.shape)) for x, w in zip(found, wanted)
    ):
        raise ValueError(
            f"{by} must return {what} in the shapes {_shapes(wanted)}. Received: {_shapes(found)}"
        )
    return [None if w is None else _like(w, x) for x, w in zip(found, wanted)]


def _like(wanted, x):
    x = ops.cast(x, wanted.dtype)
    return x if known_shape(x) is not None else ops.reshape(x, wanted.shape)


def _shapes(xs):
    if not isinstance(xs, (list, tuple)):
        return xs
    return f"[{', '.join(str(getattr(x, 'shape', x)) for x in xs)}]"

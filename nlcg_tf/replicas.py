"""The seam to TensorFlow: what is traced or compiled, and updates on each replica of a strategy.

Imported only on the TensorFlow backend.
"""

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util


def dense_gradients(gradients, variables):
    """The gradients as dense tensors of the variables' shapes, which a trace may not know.

    Integers, and what is no tensor, become of the variable's type. `None` stays.
    """

    def dense(gradient, variable):
        tensor = tf.convert_to_tensor(gradient)
        is_real = not tensor.dtype.is_complex
        if is_real and (tensor.dtype.is_integer or not tf.is_tensor(gradient)):
            tensor = tf.cast(tensor, variable.dtype)
        is_known = tensor.shape.is_fully_defined()
        return tensor if is_known else tf.ensure_shape(tensor, variable.shape)

    return [g if g is None else dense(g, v) for g, v in zip(gradients, variables)]


def sum_over_replicas(tensors):
    """Sums a list of tensors over the replicas; without a strategy, the list itself."""
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def is_tracing():
    """Whether a `tf.function` is being traced."""
    return not tf.executing_eagerly()


def is_compiled_by_xla():
    """Whether what is being traced is for XLA."""
    return is_tracing() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def update_each(update, tensors, variables):
    """Calls `update(tensors, variables)` once on each replica's own copies.

    Args:
        update: function of the two structures below, which assigns to the variables.
        tensors: list of tensors, equal on all replicas.
        variables: nested structure of Keras or TensorFlow variables, among them "reals".
    """
    variables = keras.tree.map_structure(
        lambda v: v.value if isinstance(v, keras.Variable) else v, variables
    )
    if not tf.distribute.has_strategy():
        update(tensors, variables)
        return

    @tf.autograph.experimental.do_not_convert
    def update_own(_, *tensors):
        # Without this each assignment would be one for all replicas.
        own = keras.tree.map_structure(lambda v: v._get() if hasattr(v, "_get") else v, variables)
        update(list(tensors), own)

    tf.distribute.get_strategy().extended.update(
        variables["reals"], update_own, args=tuple(tensors), group=False
    )

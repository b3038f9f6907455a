"""The seam to TensorFlow: an update of the whole model on each replica of a tf.distribute strategy.

Imported only on the TensorFlow backend.
"""

import keras
import tensorflow as tf


def sum_over_replicas(tensors):
    """Sums a list of tensors over the replicas; without a strategy, the list itself.

    A gradient given as `tf.IndexedSlices` becomes dense: the direction of an update is.
    """
    tensors = [tf.convert_to_tensor(x) for x in tensors]
    context = tf.distribute.get_replica_context()
    if context is None or not tf.distribute.has_strategy():
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def is_tracing():
    """Whether a `tf.function` is being traced."""
    return not tf.executing_eagerly()


def update_each(update, tensors, variables):
    """Calls `update(tensors, variables)` once on each replica's own copies.

    Args:
        update: function of the two structures below, which assigns to the variables.
        tensors: list of tensors, equal on all replicas.
        variables: nested structure of Keras or TensorFlow variables.
    """
    variables = keras.tree.map_structure(
        lambda v: v.value if isinstance(v, keras.Variable) else v, variables
    )
    if not tf.distribute.has_strategy():
        update(tensors, variables)
        return

    def update_all(strategy, tensors):
        if tf.distribute.in_cross_replica_context():
            for replica, device in enumerate(strategy.extended.worker_devices):

                def own(x, replica=replica):
                    # A value that the replicas share comes once.
                    copies = strategy.experimental_local_results(x)
                    return copies[replica] if len(copies) > 1 else copies[0]

                with tf.device(device):
                    update(
                        [own(x) for x in tensors],
                        keras.tree.map_structure(own, variables),
                    )
        else:
            # Strategies without merge_call run this on each replica by itself.
            update(tensors, keras.tree.map_structure(_local, variables))

    tf.__internal__.distribute.interim.maybe_merge_call(
        update_all, tf.distribute.get_strategy(), tensors
    )


def _local(variable):
    return variable._get() if hasattr(variable, "_get") else variable

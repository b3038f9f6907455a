"""Loss and accuracy of a classifier over all workers' parts of the test images."""

import functools

import tensorflow as tf


class Evaluator:
    """Evaluates a `keras.Model` from images to logits."""

    def __init__(self, model):
        self.model = model

    def __call__(self, batches, cluster):
        """Sums exactly over the examples of all workers.

        Args:
            batches: iterable of `(images, labels, weights)`; the weights are 1, or 0 for images
                that only fill up.
            cluster: see `trainers.engine.cluster`.

        Returns:
            `(loss, top1, top5)` as floats, the loss without regularization.
        """
        sums = tf.zeros(4, tf.float64)
        for images, labels, weights in batches:
            sums += self._sums(images, labels, weights)
        # Horovod: sum over the workers
        loss, top1, top5, count = cluster.sum_over_workers(sums.numpy().tolist())
        return loss / count, top1 / count, top5 / count

    @functools.partial(tf.function, autograph=False)
    def _sums(self, images, labels, weights):
        logits = self.model(images, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        hits = [tf.cast(tf.math.in_top_k(labels, logits, k), tf.float32) for k in (1, 5)]
        parts = [losses, *hits, tf.ones_like(losses)]
        return tf.stack([tf.reduce_sum(tf.cast(part * weights, tf.float64)) for part in parts])

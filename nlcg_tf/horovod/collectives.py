"""What all workers do together: averages, sums, broadcasts and comparisons of tensors."""

import hashlib
import itertools
import numbers
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from nlcg_tf.horovod.watch import entering
from nlcg_tf.variables import plain

# What Horovod's own operations know.
NUMBERS = {tf.float16, tf.float32, tf.float64, tf.bool, tf.uint8, tf.int8, tf.uint16, tf.int16}
NUMBERS |= {tf.int32, tf.int64}
# What stands for numbers that Horovod does not know.
WORDS = {tf.bfloat16: tf.uint16, tf.complex64: tf.float32, tf.complex128: tf.float64}
WORDS |= {tf.uint32: tf.int32, tf.uint64: tf.int64}


def average(tensors: Sequence[Any]) -> list[Any]:
    """Averages over the workers, the tensors of each type of number together."""
    averages = list(tensors)
    for dtype in {x.dtype: None for x in tensors}:
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        group = [tensors[i] for i in places]
        if dtype.size == 2:
            group = _average_16_bit(group)
        else:
            # The word Horovod in the names tells `elastic_run` whose errors it sees.
            name = f"Horovod_average_{dtype.name}"
            group = hvd.grouped_allreduce(group, op=hvd.Average, name=name)
        for i, x in zip(places, group):
            averages[i] = x
    return averages


def _average_16_bit(tensors):
    """Averages tensors of float16 or bfloat16, rounded once.

    Horovod's own reductions do not know bfloat16. They add up in float16, where a sum of many
    overflows and a small gradient over the number of workers vanishes.

    As in a ring all-reduce each worker sums one part: it gets the others' words of that part, adds
    them up in float32 in the order of the ranks, and sends the mean to all. The volume is that of
    a ring all-reduce of 16-bit words.
    """
    flat = tf.concat([tf.reshape(x, [-1]) for x in tensors], axis=0)
    sizes = [x.shape.num_elements() for x in tensors]
    mean = reduce_scatter(flat, lengths_of_parts(sum(sizes), hvd.size()))
    (whole,) = gather([tf.cast(mean, flat.dtype)])
    return [tf.reshape(part, x.shape) for part, x in zip(tf.split(whole, sizes), tensors)]


def lengths_of_parts(elements, workers):
    """A list of how many elements of a vector each worker has; they differ by one at most."""
    ends = [elements * i // workers for i in range(workers + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def reduce_scatter(vector: Any, lengths: Any) -> Any:
    """This worker's part of the average of a vector; 16-bit numbers are added up in float32.

    Each worker gets the others' numbers of its part and adds them up. That is as many bytes as
    Horovod's own `reducescatter`, which takes several times as long over Gloo and does not know
    bfloat16.

    Args:
        vector: tensor of one dimension.
        lengths: list of ints, the elements of each worker's part.
    """
    dtype, own = vector.dtype, lengths[hvd.rank()]
    received, _ = hvd.alltoall(_words(vector), splits=lengths, name="Horovod_reduce_scatter")
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    parts = tf.reshape(tf.cast(_numbers(received, dtype), wide), [hvd.size(), own])
    return tf.reduce_sum(parts, axis=0) / hvd.size()


def gather(parts: Sequence[Any]) -> list[Any]:
    """The vectors of which each worker has a part."""
    vectors = list(parts)
    for dtype in {x.dtype: None for x in parts}:
        places = [i for i, x in enumerate(parts) if x.dtype == dtype]
        words = [_words(parts[i]) for i in places]
        gathered = hvd.grouped_allgather(words, name="Horovod_gather")
        for i, x in zip(places, gathered):
            vectors[i] = _numbers(x, dtype)
    return vectors


def broadcast_first(vector: Any) -> Any:
    """Worker 0's tensor."""
    words = hvd.broadcast(_words(vector), 0, name="Horovod_broadcast_first")
    return _numbers(words, vector.dtype)


def _words(x):
    """Numbers as Horovod can send them."""
    return tf.bitcast(x, WORDS[x.dtype]) if x.dtype in WORDS else x


def _numbers(words, dtype):
    return tf.bitcast(words, dtype) if dtype in WORDS else words


def broadcast(variables: Sequence[Any], root_rank: int = 0) -> None:
    """Gives all workers the values that worker `root_rank` holds.

    Args:
        variables: list of Keras or TensorFlow variables, equal in number, order and shapes. A
            sharded optimizer's slots, of which each worker has its own shard, stay as they are.

    Raises:
        ValueError: on all workers, naming the first variable that differs in shape or type; and for
            a rank that no worker has.
    """
    check_root(root_rank)
    variables = shared(variables)
    check_alike(allgather_object([kind_of(v) for v in variables]), variables, "a value")
    with entering("in a broadcast"):
        for i, v in enumerate(plain(variables)):
            # Not by the variables' names, which Keras counts up in each process for itself.
            name = f"Horovod_broadcast_{i}"
            if v.dtype in NUMBERS or v.dtype in WORDS:
                words = hvd.broadcast(_words(v.read_value()), root_rank, name=name)
                v.assign(_numbers(words, v.dtype))
            else:  # texts, quantized numbers
                v.assign(hvd.broadcast_object(v.numpy(), root_rank, name=name))


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Gathers an object that can be pickled from each worker: a list, by ranks."""
    with entering("in allgather_object"):
        return hvd.allgather_object(obj, name=name)


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """Gives all workers the object of worker `root_rank`, which must be one that can be pickled.

    Raises:
        ValueError: for a rank that no worker has.
    """
    check_root(root_rank)
    with entering("in broadcast_object"):
        return hvd.broadcast_object(obj, root_rank, name=name)


def check_root(rank):
    if not isinstance(rank, numbers.Integral) or not 0 <= rank < hvd.size():
        raise ValueError(
            f"`root_rank` must be the rank of a worker, 0 to {hvd.size() - 1}. "
            f"Received: root_rank={rank!r}"
        )


def shared(variables):
    """The variables that are the same on all workers: all but the shards of sharded optimizers."""
    return [v for v in variables if not hasattr(v, "shard_of")]


def sum_over_workers(values: Sequence[float]) -> list[float]:
    """Sums a list of numbers over all workers in float64 (integers are exact up to 2^53)."""
    values = tf.constant(values, tf.float64)
    with entering("in a sum"):
        return hvd.allreduce(values, op=hvd.Sum, name="Horovod_sum").numpy().tolist()


def sum_metrics(model: keras.Model) -> Any:
    """The model's metrics over the examples of all workers.

    A metric's state (totals and counts) is summed over the workers and its result computed from
    that, so that unequal parts of the data count as they should. Exact for metrics whose state is
    a sum, as that of Keras' own metrics is. Call it after `model.evaluate`, on all workers.

    Returns:
        dict of floats, or of arrays for metrics of several values.
    """
    variables = [v for metric in model.metrics for v in metric.variables]
    own = [v.numpy() for v in variables]
    if not own:
        return {}
    sums = np.array(sum_over_workers(np.concatenate([x.ravel() for x in own])))
    for variable, x in zip(variables, np.split(sums, np.cumsum([x.size for x in own])[:-1])):
        variable.assign(x.reshape(variable.shape))
    results = keras.tree.map_structure(
        lambda x: np.asarray(x) if np.ndim(x) else float(x), model.get_metrics_result()
    )
    for variable, x in zip(variables, own):
        variable.assign(x)
    return results


def average_moving_statistics(model: keras.Model) -> None:
    """Averages the model's floating-point state (batch norm's moving mean and variance).

    Each worker sees its own part of the batch; call this before evaluation and before saving.
    Frozen layers, and what is the same on all workers, keep their bits.
    """
    statistics = [
        v
        for layer in model._flatten_layers()
        if layer.trainable
        for v in layer._non_trainable_variables
        if "float" in str(v.dtype)
    ]
    if not statistics:
        return
    own = tf.concat([tf.reshape(tf.cast(v, tf.float64), [-1]) for v in statistics], axis=0)
    # The mean of three equal numbers need not be that number; that of three zeros is zero.
    with entering("in a mean of moving statistics"):
        first = hvd.broadcast(own, 0, name="Horovod_first_statistics")
        mean = first + hvd.allreduce(own - first, op=hvd.Average, name="Horovod_statistics")
    sizes = [v.shape.num_elements() for v in plain(statistics)]
    for variable, part in zip(statistics, tf.split(mean, sizes)):
        variable.assign(tf.cast(tf.reshape(part, variable.shape), variable.dtype))


def check_identical(variables: Sequence[Any]) -> None:
    """Checks that all workers hold the same bits.

    Args:
        variables: list of Keras or TensorFlow variables, in the same order on all workers. A
            sharded optimizer's slots are passed over.

    Raises:
        RuntimeError: on every worker, naming the first variable that differs.
    """
    variables = shared(variables)
    digests = [hashlib.sha256(_bytes(np.asarray(v))).digest()[:8] for v in variables]
    own = np.frombuffer(b"".join(digests), np.int64)
    with entering("in a comparison of variables"):
        all_digests = hvd.allgather(tf.constant(own[None]), name="Horovod_check").numpy()
    differs = (all_digests != all_digests[0]).any(axis=0)
    if differs.any():
        first = int(differs.argmax())
        workers = np.flatnonzero(all_digests[:, first] != all_digests[0, first]).tolist()
        raise RuntimeError(
            f"The workers have drifted apart: variable '{name_of(variables[first])}' on worker(s) "
            f"{workers} differs from that on worker 0 ({int(differs.sum())} of {len(variables)} "
            "variables differ). Broadcast all variables first, average every gradient, and give "
            "all workers the same learning rates."
        )


def kind_of(tensor):
    """What must be the same on all workers, as a text."""
    return f"{tf.as_dtype(tensor.dtype).name} {tensor.shape}"


def check_alike(kinds, variables, what):
    """Refuses variables for which workers would wait for each other for ever.

    Args:
        kinds: of each worker a list of texts, one for each variable; `None`: it has none.
        variables: this worker's list of variables.
        what: string, what the kinds are of.

    Raises:
        ValueError: on all workers, naming the first variable that differs.
    """
    for worker, found in enumerate(kinds):
        pairs = list(itertools.zip_longest(kinds[0], found))
        odd = [i for i, (one, other) in enumerate(pairs) if one != other]
        if not odd:
            continue
        words = ["none" if kind is None else f"{what} of {kind}" for kind in pairs[odd[0]]]
        name = name_of(variables[odd[0]]) if odd[0] < len(variables) else odd[0]
        raise ValueError(
            f"Variable '{name}' has {words[0]} on worker 0 and {words[1]} on worker {worker} "
            f"({len(odd)} such variables): they would wait for each other for ever."
        )


def _bytes(array):
    # The elements of an array of texts are addresses.
    return repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()


def name_of(variable):
    return getattr(variable, "path", variable.name)

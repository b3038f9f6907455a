"""Which numbers two Horovod workers can average and send; run by run_checks.py."""

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf.horovod as hvd
from nlcg_tf import NLCG
from tests.distributed.training import BATCH, expect, make, trained
from tests.support.problems import (
    flat,
    paper_nlcg,
    regression_data,
    regression_model,
    relative_difference,
)


def check_compression():
    x, y = regression_data(BATCH)
    run = lambda optimizer, steps=1: trained(  # noqa: E731
        optimizer, regression_model(units=64), "mse", x, y, steps
    )
    exact = flat(run(make("fletcher_reeves")).get_weights())
    for compression, bound in (("fp16", 0.002), ("bf16", 0.02)):
        for steps in (None, 2):
            optimizer = make("fletcher_reeves", gradient_accumulation_steps=steps)
            optimizer = hvd.DistributedOptimizer(optimizer, compression)
            model = run(optimizer, steps or 1)
            difference = relative_difference(flat(model.get_weights()), exact)
            assert 0 < difference < bound, (compression, steps, difference)
            hvd.check_identical([*model.variables, *optimizer.variables])


def check_the_compressed_average_is_that_of_the_rounded_values():
    """Odd sizes, which do not divide among the workers; huge numbers, and float16's smallest."""
    for compression, dtype, size in (("bf16", tf.bfloat16, 1e30), ("fp16", tf.float16, 1e-7)):
        variables = [keras.Variable(np.zeros(n, "float32")) for n in (1, 5, 7)]
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression)
        draws = [np.random.default_rng(rank).normal(size=13) * size for rank in range(2)]
        gradients = np.split(draws[hvd.rank()].astype("float32"), [1, 6])
        optimizer.apply([tf.constant(g) for g in gradients], variables)
        rounded = [tf.cast(tf.cast(draw, dtype), tf.float32).numpy() for draw in draws]
        mean = tf.cast((rounded[0] + rounded[1]) / 2, dtype).numpy().astype("float32")
        np.testing.assert_array_equal(flat(variables), -mean.astype("float64"))


def check_numbers_that_horovod_does_not_know_are_broadcast():
    for dtype in ("bfloat16", "complex64", "uint32", "float16"):
        variable = tf.Variable(tf.cast([1 + hvd.rank(), 2], dtype))
        hvd.broadcast([variable], root_rank=1)
        assert (variable.numpy() == tf.cast([2, 2], dtype).numpy()).all(), dtype
    text = tf.Variable([f"worker {hvd.rank()}"])
    hvd.broadcast([text], root_rank=1)
    assert text.numpy() == [b"worker 1"]
    hvd.check_identical([text])


def check_gradients_of_shapes_that_a_graph_does_not_know():
    for compression in (None, "fp16", "bf16"):
        variables = [keras.Variable([1.0, 1.0]), keras.Variable([1.0])]
        sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression)
        sgd.build(variables)
        apply = lambda x: sgd.apply([x, None], variables)  # noqa: E731, B023
        step = tf.function(apply, input_signature=[tf.TensorSpec([None])])
        step(tf.ones(2) + 2 * hvd.rank())
        np.testing.assert_array_equal(flat(variables), [-1.0, -1.0, 1.0])


def check_gradients_that_are_no_tensors_or_no_floats():
    """They are averaged as numbers of the variable's type, on each of several micro-steps too."""
    for steps, dtype in ((None, "float32"), (2, "float32"), (2, "float64")):
        number = 1 + hvd.rank()  # 1.5 in the mean
        for gradient in (np.full(2, 1.0 * number), [1.0 * number] * 2, tf.fill([2], number)):
            variable = keras.Variable([1.0, 1.0], dtype=dtype)
            sgd = keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
            sgd = hvd.DistributedOptimizer(sgd)
            for _ in range(steps or 1):
                sgd.apply([gradient], [variable])
            np.testing.assert_array_equal(variable.numpy(), [-0.5, -0.5])
    optimizer = hvd.DistributedOptimizer(NLCG(0.1, "momentum"))
    expect(
        ValueError, "NLCG updates variables. Received: 'x'", optimizer.apply, [tf.ones(2)], ["x"]
    )


def check_float16_gradients_whose_sum_overflows():
    variable = keras.Variable([1.0])
    sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(1e-4), compression="fp16")
    sgd.apply([tf.constant([40000.0])], [variable])
    np.testing.assert_allclose(variable.numpy(), [-3.0], rtol=1e-3)


def check_bfloat16_variables():
    variable = keras.Variable([1.0, 2.0], dtype="bfloat16")
    optimizer = hvd.DistributedOptimizer(paper_nlcg(0.1, line_search=None))
    optimizer.apply([tf.cast([float(hvd.rank()), 1.0], tf.bfloat16)], [variable])
    hvd.check_identical([variable, *optimizer.variables])
    assert optimizer.diagnostics()["updates"] == 1

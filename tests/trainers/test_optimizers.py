"""The optimizers to choose from, against their papers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from nlcg_tf.schedules import CifarSchedule
from trainers.engine.plan import BatchPlan
from trainers.flags import FLAGS
from trainers.optimizers.choice import make_optimizer, make_schedule, spectral_peak, trained
from trainers.optimizers.lars import LARS
from trainers.optimizers.momentum import Momentum
from trainers.optimizers.muon import Muon


def test_rmsprop_and_nesterov_have_the_papers_settings():
    rmsprop = make_optimizer("rmsprop", 0.1)
    assert (rmsprop.rho, rmsprop.momentum, rmsprop.epsilon) == (0.9, 0.9, 1.0)
    nesterov = make_optimizer("nesterov", 0.1)
    assert (nesterov.momentum, nesterov.nesterov) == (0.9, True)
    for name in trained():
        assert isinstance(make_optimizer(name, 0.1), keras.optimizers.Optimizer)
    with pytest.raises(ValueError, match="name='lion'"):
        make_optimizer("lion", 0.1)


@pytest.mark.parametrize("l2", [0.0, 1e-3])
def test_lars_follows_its_paper(l2):
    """Against its Algorithm 1 in float64 NumPy, with a kernel and a gradient that are zero once."""
    generator = np.random.default_rng(0)
    shapes = [(3, 3, 4, 8), (8,), (8, 5), (5, 2)]
    w = [generator.normal(size=shape) for shape in shapes]
    w[3][:] = 0
    variables = [keras.Variable(x, dtype="float32") for x in w]
    optimizer = LARS(0.5, momentum=0.8, trust_coefficient=0.02, l2=l2)
    v = [np.zeros(shape) for shape in shapes]
    for step in range(20):
        g = [generator.normal(size=shape) for shape in shapes]
        g[2] *= step != 5
        optimizer.apply([tf.constant(x, tf.float32) for x in g], variables)
        for i, (x, y) in enumerate(zip(w, g)):
            rate = 1.0
            norm, gradient_norm = np.sqrt((x**2).sum()), np.sqrt((y**2).sum())
            if x.ndim > 1:
                if norm > 0 and gradient_norm > 0:
                    rate = 0.02 * norm / (gradient_norm + l2 * norm)
                y = y + l2 * x
            v[i] = 0.8 * v[i] + 0.5 * rate * y
            w[i] = x - v[i]
    for variable, x in zip(variables, w):
        np.testing.assert_allclose(variable.numpy(), x, rtol=1e-4, atol=1e-5)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    with pytest.raises(ValueError, match="momentum=1"):
        LARS(momentum=1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_has_the_rate_outside_of_its_velocity(nesterov):
    """Against float64 NumPy under a falling rate, where Keras' form differs."""
    generator = np.random.default_rng(0)
    w, v = generator.normal(size=(4, 3)), 0.0
    variable = keras.Variable(w, dtype="float32")
    optimizer = Momentum(learning_rate=1.0, momentum=0.8, nesterov=nesterov)
    for rate in (0.5, 0.5, 0.05, 0.05):
        g = generator.normal(size=w.shape)
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant(g, tf.float32)], [variable])
        v = 0.8 * v + g
        w = w - rate * (g + 0.8 * v if nesterov else v)
    np.testing.assert_allclose(variable.numpy(), w, rtol=1e-5, atol=1e-6)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    with pytest.raises(ValueError, match=r"momentum=-0\.1"):
        Momentum(momentum=-0.1)


@pytest.mark.parametrize("length", ["shape", "norm"])
def test_muon_takes_a_convolution_for_a_matrix(length):
    """Against an exact decomposition in float64 NumPy; vectors are Adam's."""
    generator = np.random.default_rng(0)
    kernel, bias = generator.normal(size=(3, 3, 4, 8)), generator.normal(size=5)
    variables = [keras.Variable(x, dtype="float32") for x in (kernel, bias)]
    optimizer, adam = (
        Muon(0.1, momentum=0.8, length=length),
        keras.optimizers.Adam(0.1, epsilon=1e-8),
    )
    expected_bias, velocity = keras.Variable(bias, dtype="float32"), 0.0
    for _ in range(5):
        gradients = [generator.normal(size=x.shape) for x in (kernel, bias)]
        optimizer.apply([tf.constant(g, tf.float32) for g in gradients], variables)
        adam.apply([tf.constant(gradients[1], tf.float32)], [expected_bias])
        velocity = 0.8 * velocity + gradients[0]
        matrix = (gradients[0] + 0.8 * velocity).reshape(36, 8)
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        step = u @ v
        norm = np.linalg.norm(kernel) / np.linalg.norm(step)
        step *= 0.2 * 6 if length == "shape" else norm
        kernel = kernel - 0.1 * step.reshape(kernel.shape)
    np.testing.assert_allclose(variables[0].numpy(), kernel, atol=5e-3)
    np.testing.assert_allclose(variables[1].numpy(), expected_bias.numpy(), rtol=1e-5)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    for arguments in ({"momentum": 1}, {"length": "unit"}):
        (name, value), *_ = arguments.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            Muon(**arguments)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, (1.0, 0.032)),
        ({"learning_rate_factor": 2.0}, (1.0, 0.064)),
        ({"peak_learning_rate": 0.5}, (1.0, 0.5)),
        ({"preconditioner": "bfgs", "learning_rate_factor": 2.0}, (2.0, None)),
        ({"optimizer": "sgd"}, (1.0, None)),
    ],
)
def test_the_spectral_form_has_a_peak_of_its_own(flags, expected):
    defaults = {"optimizer": "nlcg", "preconditioner": "spectral"}
    defaults |= {"learning_rate_factor": 1.0, "peak_learning_rate": None, "decay": "paper"}
    plan = BatchPlan(512, 512, 1, 1, updates_per_epoch=120, epochs=1)
    rate = make_schedule(CifarSchedule, {**defaults, **flags}, plan).get_config()
    assert (rate["factor"], rate["peak"]) == expected


def test_the_spectral_peak_grows_with_the_batch():
    assert [spectral_peak(batch) for batch in (128, 2048, 98304)] == [0.016, 0.064, 0.064]


def test_commands_with_a_preconditioner_of_before_go_on(capsys):
    assert FLAGS["preconditioner"].parser.parse("rms") == "spectral"
    assert "--preconditioner=rms is no longer there" in capsys.readouterr().err

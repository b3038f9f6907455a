"""The reference path is backend-neutral: it trains on JAX and torch without TensorFlow."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import itertools
import sys
import numpy as np
import keras
import nlcg_tf
from nlcg_tf.callbacks import OptimizerDiagnostics
from trainers.models.cifar_resnet import cifar_resnet
from tests.support.oracle import Oracle

assert cifar_resnet(8, (8, 8, 1), 10).count_params() > 0

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 5)).astype("float32")
y = x @ rng.normal(size=(5, 1)).astype("float32")
forms = [
    {"update_rule": "polak_ribiere", "preconditioner": "bfgs", "nesterov": False},
    {"line_search": "online"},
    {"preconditioner": None, "use_ema": True, "ema_momentum": 0.8},
    {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
]
for steps, form in [*itertools.product((None, 2), forms[:3]), (2, forms[3])]:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1, use_bias=False)])
    optimizer = nlcg_tf.NLCG(0.05, **form, gradient_accumulation_steps=steps)
    w = np.array(model.layers[0].kernel, np.float64).ravel()
    oracle = Oracle(
        w,
        [5],
        form.get("update_rule", "blended"),
        form.get("preconditioner", "normalized_bfgs"),
        form.get("line_search"),
        nesterov=form.get("nesterov", True),
    )
    model.compile(optimizer=optimizer, loss="mse")
    size = 16 // (steps or 1)
    callbacks = [OptimizerDiagnostics("batch"), keras.callbacks.History()]
    model.fit(x, y, batch_size=size, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    assert callbacks[1].history["step_size"][-1] == optimizer.diagnostics()["step_size"]
    average = 0.0
    for t in range(12):
        rows = np.arange(16 * t, 16 * (t + 1)) % 64
        error = x[rows].astype(np.float64) @ oracle.w - y[rows, 0]
        gradient = 2 * x[rows].astype(np.float64).T @ error / 16
        oracle.update(gradient, np.mean(error**2), float(np.float32(0.05)))
        if optimizer.use_ema:
            average = 0.8 * average + 0.2 * oracle.w if t else oracle.w.copy()
            if optimizer.ema_overwrite_frequency and (t + 1) % 3 == 0 or t == 11:
                oracle.w[:] = average
    got = np.array(model.layers[0].kernel).ravel()
    difference = np.linalg.norm(got - oracle.w) / np.linalg.norm(oracle.w)
    assert difference < 2e-5, difference
    diagnostics = optimizer.diagnostics()
    assert diagnostics["updates"] == 12
    np.testing.assert_allclose(diagnostics["learning_rate_scale"], oracle.scale, rtol=1e-5)

# Every other argument that promises to work on each backend.
schedule = keras.optimizers.schedules.CosineDecay(0.05, 8)
for optimizer in [
    nlcg_tf.NLCG(schedule, weight_decay=0.01, global_clipnorm=1.0, loss_scale_factor=8.0),
    nlcg_tf.NLCG(0.01, "momentum", "spectral", weight_decay=0.01),
    nlcg_tf.NLCG(0.01, "fletcher_reeves", "spectral", line_search="online"),
    nlcg_tf.NLCG(lars_coefficient=0.01, line_search="step", clipvalue=0.5),
    keras.optimizers.LossScaleOptimizer(nlcg_tf.NLCG(clipnorm=1.0)),
]:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse")
    losses = model.fit(x, y, batch_size=16, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0], (optimizer.get_config(), losses)
assert "tensorflow" not in sys.modules
"""


DEVICES = """
import keras
import numpy as np
from keras import distribution

import nlcg_tf

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 6)).astype("float32")
y = np.tanh(x @ rng.normal(size=(6, 1))).astype("float32")
devices = distribution.list_devices()
layout = distribution.LayoutMap(distribution.DeviceMesh((1, 2), ["batch", "model"], devices))
layout[".*hidden/kernel"] = (None, "model")
ways = [
    distribution.DataParallel(devices=devices),
    distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"),
]

def train(form, way):
    distribution.set_distribution(way)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, "tanh", name="hidden"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(nlcg_tf.NLCG(0.05, **form), "mse")
    model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    slot = model.optimizer.slots["direction"][0].value
    assert len(slot.sharding.device_set) == (1 if way is None else 2)
    is_divided = slot.addressable_shards[0].data.shape != slot.shape
    assert is_divided == isinstance(way, distribution.ModelParallel)
    return np.concatenate([np.ravel(w) for w in model.get_weights()])

for form in (
    {"preconditioner": None},
    {"preconditioner": "bfgs", "line_search": "online", "update_rule": "fletcher_reeves"},
    {"preconditioner": "normalized_bfgs"},
    {"preconditioner": "spectral"},
):
    expected = train(form, None)
    for way in ways:
        difference = np.linalg.norm(train(form, way) - expected)
        assert difference < 1e-5 * np.linalg.norm(expected), (form, way, difference)
"""


def test_devices_of_jax_that_divide_the_batch_or_the_model():
    pytest.importorskip("jax")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    result = subprocess.run(
        [sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_training_on_another_backend_equals_the_oracle(backend):
    pytest.importorskip(backend)
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([os.path.dirname(tests), tests])
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr

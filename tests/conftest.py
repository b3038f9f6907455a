import os

# Two logical CPUs for the tests of tf.distribute; must be set before TensorFlow starts.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA takes longer to optimize the small programs of the tests than to run them.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import pytest

from tests.support import launch

# The files that take longest begin first, so that no worker ends long after the others.
LONGEST = ("test_horovod", "test_versions", "test_elastic", "test_fullsize", "test_docs")
LONGEST += ("test_update", "test_imagenet", "test_cifar", "test_curvature", "test_failures")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        # This process only distributes the tests; its workers share the process that forks.
        os.environ[launch.forked.ADDRESS] = launch.server()[1]
        return
    from trainers.engine.imports import import_tensorflow

    if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
        import_tensorflow()
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def reset_keras():
    import keras

    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def mirrored():
    """The one of this process: TensorFlow numbers the collectives of each from the same value on.

    A second one fails where its first collective has another shape than that of the first one.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def fused_library():
    """The op's library; tests skip where none was built, but one that cannot be used fails them."""
    from nlcg_tf.fused import nlcg_update

    module, reason = nlcg_update._load()
    if not nlcg_update.LIBRARY.is_file():
        pytest.skip(reason)
    assert module is not None, reason
    return module

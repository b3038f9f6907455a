"""The CIFAR ResNets."""

import numpy as np
import pytest
import tensorflow as tf

from trainers.models import cifar_resnet


@pytest.mark.parametrize("depth, parameters", [(20, 269722), (32, 464154), (56, 853018)])
def test_resnet_has_the_published_number_of_parameters(depth, parameters):
    """He et al. 2016, table 6: 0.27 M, 0.46 M and 0.85 M for CIFAR-10."""
    model = cifar_resnet.cifar_resnet(depth, (32, 32, 3), 10)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters


def test_resnet32_has_95_tensors_and_regularizes_kernels_alone():
    model = cifar_resnet.cifar_resnet(32, (32, 32, 3), 100, weight_decay=1e-4)
    assert len(model.trainable_variables) == 95
    kernels = [v for v in model.trainable_variables if v.path.endswith("kernel")]
    expected = 1e-4 * sum(float(tf.reduce_sum(tf.square(v))) for v in kernels)
    assert float(tf.add_n(model.losses)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="depth=9"):
        cifar_resnet.cifar_resnet(9, (32, 32, 3), 100)

"""The CIFAR ResNet family (He et al. 2016, "Deep Residual Learning", section 4.2)."""

import keras
from keras import layers, ops


def check_depth(depth):
    """Raises a ValueError for a depth that is not 6n + 2."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"`depth` must be 6n + 2 with n >= 1. Received: depth={depth}")


def cifar_resnet(depth, input_shape, classes, weight_decay=1e-4):
    """ResNet of depth 6n + 2: three stages of n blocks with 16, 32 and 64 filters.

    Shortcuts are free of parameters (option A): strided, and padded with zero channels. The loss
    gains weight_decay * sum(w^2) over the kernels of convolutions and of the classifier.

    Args:
        depth: int, 6n + 2 with n >= 1: 8, 20, 32, 56.
        input_shape: `(height, width, channels)` of the images, channels last.
        classes: int, number of logits.
        weight_decay: float.

    Returns:
        A functional `keras.Model` from images to logits.

    Raises:
        ValueError: for a depth that is not 6n + 2.
    """
    check_depth(depth)
    regularizer = keras.regularizers.L2(weight_decay)

    def convolution(x, filters, strides=1):
        x = layers.Conv2D(
            filters,
            3,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            kernel_regularizer=regularizer,
        )(x)
        return layers.BatchNormalization(momentum=0.99, epsilon=1e-5)(x)

    def block(x, filters, strides):
        y = layers.ReLU()(convolution(x, filters, strides))
        y = convolution(y, filters)
        if strides > 1:
            x = x[:, ::strides, ::strides]
            x = ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, filters - x.shape[-1]]])
        return layers.ReLU()(layers.Add()([x, y]))

    images = layers.Input(input_shape)
    x = layers.ReLU()(convolution(images, 16))
    for stage, filters in enumerate((16, 32, 64)):
        for position in range((depth - 2) // 6):
            x = block(x, filters, strides=2 if stage > 0 and position == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(classes, kernel_regularizer=regularizer, dtype="float32")(x)
    return keras.Model(images, logits, name=f"resnet{depth}")

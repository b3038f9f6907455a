"""ResNet-50 v1 and v2 (He et al. 2016) of Keras Applications, with the paper's settings."""

import keras

VERSIONS = {"v1": keras.applications.ResNet50, "v2": keras.applications.ResNet50V2}


def resnet50(version, image_size, classes, weight_decay=1e-4):
    """`keras.applications.ResNet50` or `ResNet50V2` with logits and L2.

    Batch norm has momentum 0.9 and epsilon 1e-5. The loss gains weight_decay * sum(w^2) over the
    kernels of convolutions and of the classifier. The layers' names are those of Keras
    Applications, and so is the order of the weights.

    Args:
        version: `"v1"` or `"v2"`.
        image_size: int, height and width of the images, at least 32.
        classes: int, number of logits.
        weight_decay: float.

    Returns:
        A functional `keras.Model` from images `(batch, image_size, image_size, 3)` to float32
        logits.

    Raises:
        ValueError: for another version or too small images.
    """
    if version not in VERSIONS:
        raise ValueError(f"`version` must be 'v1' or 'v2'. Received: version={version!r}")
    if image_size < 32:
        raise ValueError(f"`image_size` must be at least 32. Received: image_size={image_size}")
    regularizer = keras.regularizers.L2(weight_decay)

    def changed(layer):
        config = layer.get_config()
        if isinstance(layer, keras.layers.BatchNormalization):
            config.update(momentum=0.9, epsilon=1e-5)
        elif isinstance(layer, keras.layers.Dense):
            config.update(kernel_regularizer=regularizer, dtype="float32")
        elif isinstance(layer, keras.layers.Conv2D):
            config.update(kernel_regularizer=regularizer)
        return type(layer).from_config(config)

    model = VERSIONS[version](
        weights=None,
        input_shape=(image_size, image_size, 3),
        classes=classes,
        classifier_activation=None,
    )
    return keras.models.clone_model(model, clone_function=changed)

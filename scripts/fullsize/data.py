"""Data sets as files that NumPy alone can read, each small enough to be sent anywhere."""

import json
import math
import pathlib

import numpy as np

from trainers.engine.files import make_folder

FILE_BYTES = 45_000_000
META = "meta.json"


def export(dataset, data_dir, folder):
    """Writes a data set of `trainers.cifar`; needs TensorFlow.

    Args:
        dataset: name in `trainers.data.memory.DATA_SETS`.
        data_dir: folder of TensorFlow Datasets, or `None`.
        folder: path to write to.

    Raises:
        OSError: if the data are not there.
        ValueError: for an unknown name.
    """
    from trainers.data.memory import DATA_SETS

    if dataset not in DATA_SETS:
        raise ValueError(f"--dataset must be one of {', '.join(DATA_SETS)}. Received: {dataset}")
    data = DATA_SETS[dataset].load(data_dir, False)
    make_folder(folder)
    parts = {}
    for name, (images, labels) in (("train", data.train), ("test", data.test)):
        count = math.ceil(images.nbytes / FILE_BYTES)
        parts[name] = [f"{dataset}-{name}-images-{i}.npy" for i in range(count)]
        for file, part in zip(parts[name], np.array_split(images, count)):
            np.save(folder / file, part)
        np.save(folder / f"{dataset}-{name}-labels.npy", labels.astype(np.int32))
    meta = {"parts": parts, "classes": DATA_SETS[dataset].classes}
    meta.update(padding=data.padding, flip=data.flip)
    (folder / f"{dataset}-{META}").write_text(json.dumps(meta, indent=1) + "\n")


class ImageFiles:
    """What `export` wrote.

    Attributes:
        train, test: `(images, labels)`: uint8 `(n, height, width, channels)` and int32 `(n,)`.
        classes: int.
        padding: pixels of zero padding around a training image before its random crop.
        flip: whether training images may be mirrored.

    Raises:
        OSError: if a file is missing.
    """

    def __init__(self, folder, dataset):
        folder = pathlib.Path(folder)
        try:
            meta = json.loads((folder / f"{dataset}-{META}").read_text())
        except FileNotFoundError as error:
            raise OSError(
                f"{error.filename} is not there: python -m scripts.fullsize --export={folder} "
                "writes it, where TensorFlow is"
            ) from None
        self.train, self.test = (
            (
                np.concatenate([np.load(folder / file) for file in meta["parts"][name]]),
                np.load(folder / f"{dataset}-{name}-labels.npy"),
            )
            for name in ("train", "test")
        )
        self.classes, self.padding, self.flip = meta["classes"], meta["padding"], meta["flip"]

"""Photos made up, and where real ones lie."""

import io

import numpy as np
import pytest
import tensorflow as tf

from tests.support.launch import DATA
from trainers.engine.plan import make_plan

Image = pytest.importorskip("PIL.Image")

SIZE = 32

IMAGENETTE = DATA / "imagenette"

ORIGINALS = DATA / "imagenet_originals"

# A value of 255 after normalisation is a step of 1 / (255 * 0.225); float32 rounds some 1e-6.
TOLERANCE = 2e-5


def photo(rng, height, width, channels=3):
    """A smooth random field with some noise, uint8."""
    coarse = tf.image.resize(rng.normal(size=(5, 6, channels)), (height, width), "bicubic")
    pixels = 128 + 60 * coarse.numpy() + 6 * rng.normal(size=(height, width, channels))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encoded(pixels, kind="JPEG", mode=None, **options):
    stream = io.BytesIO()
    picture = Image.fromarray(pixels.squeeze())
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


def write(folder, files, part="train"):
    """Files in two classes; files: dict of names to bytes."""
    for i, (name, content) in enumerate(files.items()):
        path = folder / part / f"class{i % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


GOOD = encoded(photo(np.random.default_rng(5), 200, 160))


def epoch(data, workers, per_worker, seed=1, number=0, first=0, examples=20, batch=10):
    """All workers' micro-batches of an epoch: [update, position in the virtual batch]."""
    plan = make_plan(examples, batch, per_worker, workers, 1)
    parts = []
    for rank in range(workers):
        batches = data.training_batches(plan, rank, seed, number, first)
        pixels, labels = (np.stack(column) for column in zip(*batches))
        updates = plan.updates_per_epoch - first
        assert len(pixels) == updates * plan.micro_steps
        shape = (updates, -1, data.image_size, data.image_size, 3)
        parts.append((pixels.reshape(shape), labels.reshape(updates, -1)))
    return tuple(np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))

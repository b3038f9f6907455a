"""Times input and training apart: `python -m scripts.bench.input --data_dir=DIR --json=out.json`.

input: the trainers' photos beside what Keras offers for the same work:
    `image_dataset_from_directory`, then preprocessing layers that crop, resize, mirror and
    normalise. In turn, each alone on the machine. Keras has no layer for a random-resized crop, so
    `keras` has one as Keras' own examples write it, with `tf.image.crop_and_resize`;
    `keras_fixed_crop` has `RandomCrop`, which does less: no random scale, and one place for the
    whole batch. Without --data_dir the photos are random fields. On a machine that does other work
    too, trust the processor time rather than the clock.
training: images per second of `trainers.imagenet --dataset=synthetic` with NLCG and with Momentum,
    in turn, each in the last of two epochs of 50 updates.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from scripts.shared.timing import machine, ratio, show_ratio, turns, write_json
from trainers.data import decode, sources
from trainers.engine.files import output_file, path_of
from trainers.engine.folder import read_metrics
from trainers.engine.plan import make_plan

WARMUP_BATCHES = 6
# How much larger than the crop Keras loads the photos, as is usual: 256 for 224.
MARGIN = 256 / 224


class RandomResizedCrop(keras.layers.Layer):
    """As in Keras' examples, on a batch of images of one size."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, inputs):
        count = tf.shape(inputs)[0]
        area = tf.random.uniform((count,), *decode.CROP_AREA)
        log_aspect = tf.random.uniform((count,), *np.log(decode.CROP_ASPECT).astype("float32"))
        aspect = tf.exp(log_aspect)
        height = tf.minimum(tf.sqrt(area / aspect), 1.0)
        width = tf.minimum(tf.sqrt(area * aspect), 1.0)
        top = tf.random.uniform((count,)) * (1 - height)
        left = tf.random.uniform((count,)) * (1 - width)
        boxes = tf.stack([top, left, top + height, left + width], axis=1)
        return tf.image.crop_and_resize(inputs, boxes, tf.range(count), (self.size, self.size))


def ours(folder, size, batch):
    """Training batches of the trainers, for more epochs than will be taken."""
    data = sources.open_folder(folder, size)
    plan = make_plan(100 * data.examples, batch, batch, workers=1, epochs=1)
    return iter(data.training_batches(plan, 0, 0, 0, 0))


def plain(folder, size, batch, crop):
    """Endless training batches of Keras with a layer that crops."""
    loaded = round(MARGIN * size)
    dataset = keras.utils.image_dataset_from_directory(
        pathlib.Path(folder, "train"), image_size=(loaded, loaded), batch_size=batch, verbose=False
    )
    deviation = 255 * np.array(decode.DEVIATION)
    layers = [
        crop(size),
        keras.layers.RandomFlip("horizontal"),
        keras.layers.Normalization(mean=255 * np.array(decode.MEAN), variance=deviation**2),
    ]

    def prepare(pixels, labels):
        for layer in layers[:2]:
            pixels = layer(pixels, training=True)
        return layers[2](pixels), labels

    dataset = dataset.map(prepare, tf.data.AUTOTUNE)
    return iter(dataset.prefetch(tf.data.AUTOTUNE).repeat())


PIPELINES = {
    "ours": ours,
    "keras": lambda *arguments: plain(*arguments, RandomResizedCrop),
    "keras_fixed_crop": lambda *arguments: plain(
        *arguments, lambda size: keras.layers.RandomCrop(size, size)
    ),
}


def seconds_an_image(make, seconds):
    """Of a fresh pipeline after its first batches: on the clock, and of all cores together."""
    batches = make()
    for _ in range(WARMUP_BATCHES):
        next(batches)
    began, worked, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(batches)[1])
    return (time.perf_counter() - began) / count, (time.process_time() - worked) / count


def bench(folder, size, batch, seconds, repeats):
    taken = {name: [] for name in PIPELINES}
    for _, name in turns(PIPELINES, repeats):
        make = PIPELINES[name]
        taken[name].append(seconds_an_image(lambda m=make: m(folder, size, batch), seconds))
    clock, work = ({name: np.array(v)[:, i] for name, v in taken.items()} for i in (0, 1))
    others = [name for name in PIPELINES if name != "ours"]
    result = {
        "image_size": size,
        "batch": batch,
        "images_per_second": {
            name: dict(zip(("low", "median", "high"), np.percentile(1 / values, [25, 50, 75])))
            for name, values in clock.items()
        },
        "processor_milliseconds_an_image": {n: 1e3 * np.median(v) for n, v in work.items()},
        # Of seconds, so of speeds the other way round.
        "speed_ratios": {name: ratio(clock, name, "ours") for name in others},
        "processor_time_ratios": {name: ratio(work, name, "ours") for name in others},
    }
    print(f"{size}x{size}, batch {batch}, {repeats} rounds of {seconds:g} s each")
    for name, speed in result["images_per_second"].items():
        print(f"  {name:<20} {speed['median']:7.0f} images/s", end="")
        print(f"  ({speed['low']:.0f} to {speed['high']:.0f}),", end="")
        print(f" {result['processor_milliseconds_an_image'][name]:.2f} ms of one core an image")
    for name in others:
        show_ratio(f"speed of ours / {name}", result["speed_ratios"][name])
        title = f"processor time of {name} / ours"
        show_ratio(title, result["processor_time_ratios"][name])
    return result


def training_speed(optimizer, size, batch):
    """Images per second of the ImageNet trainer on images that are made up."""
    command = [sys.executable, "-m", "trainers.imagenet", "--dataset=synthetic", "--epochs=2"]
    command += [f"--optimizer={optimizer}", f"--image_size={size}", f"--global_batch_size={batch}"]
    if optimizer == "nlcg":  # the paper's
        command += ["--update_rule=fletcher_reeves", "--preconditioner=bfgs", "--nonesterov"]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [*command, f"--output_dir={folder}"], capture_output=True, text=True, check=False
        )
        if result.returncode:
            sys.exit(f"error: {' '.join(command)} failed:\n{result.stderr[-2000:]}")
        epochs = [record for record in read_metrics(folder) if record["type"] == "epoch"]
        return epochs[-1]["images_per_second"]


def bench_training(size, batch, repeats):
    speeds = {"nlcg": [], "momentum": []}
    for _, optimizer in turns(speeds, repeats):
        speeds[optimizer].append(training_speed(optimizer, size, batch))
    print(f"ResNet-50, {size}x{size}, batch {batch}, {repeats} rounds")
    for optimizer, values in speeds.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        print(f"  {optimizer:<20} {median:7.1f} images/s  ({low:.1f} to {high:.1f})")
    speeds = {optimizer: np.array(values) for optimizer, values in speeds.items()}
    result = {"image_size": size, "batch": batch, "ratio": ratio(speeds, "nlcg", "momentum")}
    show_ratio("speed with NLCG / with Momentum", result["ratio"])
    result["images_per_second"] = {name: values.tolist() for name, values in speeds.items()}
    return result


def write_photos(folder, count=200, copies=50, classes=10, height=375, width=500):
    """JPEGs of smooth random fields, of the size and nearly the bytes of ImageNet's usual photo.

    Each lies there under many names: an epoch that ends soon would cost both pipelines time.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        field = np.zeros((height, width, 3), np.float32)
        for cells in (3, 8, 20, 60, 150, 350):
            noise = rng.normal(size=(cells, cells * 4 // 3, 3)).astype(np.float32)
            field += tf.image.resize(noise, (height, width), "bicubic").numpy() / cells**0.5
        pixels = np.clip(128 + 110 * field, 0, 255).astype(np.uint8)
        first = pathlib.Path(folder, "validation", f"class{i % classes}", f"{i}.JPEG")
        first.parent.mkdir(parents=True, exist_ok=True)
        first.write_bytes(tf.io.encode_jpeg(pixels, quality=92).numpy())
        for copy in range(copies):
            path = pathlib.Path(folder, "train", first.parent.name, f"{i}_{copy}.JPEG")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(first)


@contextlib.contextmanager
def photos(data_dir):
    if data_dir:
        if not pathlib.Path(data_dir, "train").is_dir():
            sys.exit(f"error: --data_dir={data_dir} holds no folder train")
        yield data_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        write_photos(folder)
        yield folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = ("input", "training")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument(
        "--data_dir", type=path_of, help="with train/ and validation/ of class folders"
    )
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4, help="of each pipeline in each round")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--training_image_size", type=int, default=64)
    parser.add_argument("--training_batch", type=int, default=16)
    parser.add_argument("--training_repeats", type=int, default=3, help="rounds")
    parser.add_argument("--json", type=output_file, help="file for all figures")
    arguments = parser.parse_args()
    result = {"machine": machine()}
    print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
    if "input" in arguments.parts:
        with photos(arguments.data_dir) as folder:
            size = np.mean([file.stat().st_size for file in pathlib.Path(folder).glob("train/*/*")])
            result["mean_bytes"] = float(size)
            print(f"photos of {size / 1000:.0f} kB on average")
            result.update(
                bench(
                    folder,
                    arguments.image_size,
                    arguments.batch,
                    arguments.seconds,
                    arguments.repeats,
                )
            )
    if "training" in arguments.parts:
        result["training"] = bench_training(
            arguments.training_image_size, arguments.training_batch, arguments.training_repeats
        )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()

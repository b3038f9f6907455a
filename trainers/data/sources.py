"""Where photos come from: class folders, and what TensorFlow Datasets wrote."""

import concurrent.futures
import hashlib
import os
import pathlib

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from trainers.data.photos import Photos

EXTENSIONS = (".jpeg", ".jpg", ".png")

_FEATURES = {
    "image": tf.io.FixedLenFeature((), tf.string),
    "label": tf.io.FixedLenFeature((), tf.int64),
}


class Folder:
    """Photos in class folders; labels count the classes in the order of their names.

    Args:
        path: `pathlib.Path`.

    Raises:
        ValueError: if there are no class folders, or one without images.
    """

    def __init__(self, path):
        self.classes = sorted(
            entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != "."
        )
        if not self.classes:
            raise ValueError(f"{path} holds no class folders")
        names, labels = [], []
        for label, name in enumerate(self.classes):
            files = sorted(
                entry.name
                for entry in os.scandir(path / name)
                if entry.name.lower().endswith(EXTENSIONS)
                and entry.name[0] != "."
                # Not left out: a link to what is not there is an image that cannot be read.
                and not entry.is_dir()
            )
            if not files:
                raise ValueError(f"{path / name} holds no images ({', '.join(EXTENSIONS)})")
            # As bytes: old archives have names that are no UTF-8.
            names += [os.fsencode(f"{name}/{file}") for file in files]
            labels += [label] * len(files)
        self._path = path
        self.digest = hashlib.sha256(b"\n".join(names)).hexdigest()
        with tf.device("CPU"):
            # As a tensor: a Python list of ImageNet's 1.3 million names is twice as large.
            self._names, self._labels = tf.constant(names), tf.constant(labels, tf.int32)

    def __len__(self):
        return len(self._labels)

    def load(self, index):
        """File and label of an example, in a graph."""
        path = tf.strings.join([os.fsencode(self._path), tf.gather(self._names, index)], "/")
        return tf.io.read_file(path), tf.gather(self._labels, index)

    def name(self, index):
        return str(self._path / os.fsdecode(self._names[int(index)].numpy()))


def open_folder(path, image_size, max_corrupt_examples=0):
    """Photos in `train/<class>/` and `validation/<class>/` or `val/<class>/` under a folder.

    Raises:
        FileNotFoundError: if one of these folders is missing.
        ValueError: if a part or a class holds no images, or the classes of the parts differ.
    """
    path = pathlib.Path(path)
    train = path / "train"
    test = path / "validation" if (path / "validation").is_dir() else path / "val"
    for part, wanted in ((train, "train"), (test, "validation or val")):
        if not part.is_dir():
            raise FileNotFoundError(f"{path} holds no folder {wanted} with class folders")
    train, test = Folder(train), Folder(test)
    differing = sorted(set(train.classes) ^ set(test.classes))
    if differing:
        raise ValueError(
            f"the classes of training and validation under {path} differ: {differing[0]}"
            + (f" and {len(differing) - 1} more" if differing[1:] else "")
        )
    return Photos(train, test, train.classes, image_size, max_corrupt_examples)


class Records:
    """A part of a data set that TensorFlow Datasets wrote as TFRecord files, read by index.

    TensorFlow Datasets reads these files from front to back only. So the headers of all records
    are read once, for the places of the records.

    Args:
        paths: list of the files.
        lengths: list of the number of records in each.

    Raises:
        ValueError: if a file does not hold so many whole records.
    """

    def __init__(self, paths, lengths):
        self._paths = [str(path) for path in paths]
        # Many at a time, for the sake of disks and networks that take long to answer.
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(_record_places, self._paths, lengths))
        self._places = np.concatenate(parts)
        self.digest = hashlib.sha256(self._places.tobytes()).hexdigest()
        self._files = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)

    def __len__(self):
        return len(self._places)

    def load(self, index):
        """File and label of an example, in a graph."""
        record = tf.numpy_function(self._read, [index], tf.string)
        record.set_shape(())
        example = tf.io.parse_single_example(record, _FEATURES)
        return example["image"], tf.cast(example["label"], tf.int32)

    def name(self, index):
        example = tf.train.Example()
        try:
            example.ParseFromString(self._read(index))
            names = [v.decode() for v in example.features.feature["file_name"].bytes_list.value]
        except (DecodeError, UnicodeDecodeError):
            names = []
        path = self._paths[self._files[index]]
        return " ".join([*names, f"(at byte {self._places[index, 0]} of {path})"])

    def _read(self, index):
        offset, length = self._places[index].tolist()
        # Not kept open: ImageNet's 1,024 files are as many as a process may open on most systems.
        with open(self._paths[self._files[index]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)


def _record_places(path, count):
    """Offsets and lengths, in bytes, of the contents of a TFRecord file's records: `(count, 2)`."""
    places = np.empty((count, 2), np.int64)
    offset, size = 0, os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        # Otherwise the system reads far ahead, which is the whole file in the end.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for i in range(count):
            # A record: length (8 bytes), its checksum (4), contents, their checksum (4).
            header = os.pread(file.fileno(), 8, offset)
            length = int.from_bytes(header, "little")
            places[i] = offset + 12, length
            offset += length + 16
            if offset > size:
                raise ValueError(f"{path} ends within record {i + 1} of {count}: prepare it again")
    if offset != size:
        raise ValueError(f"{path} holds more than its {count} records: prepare it again")
    return places


def open_tfds(data_dir, image_size, max_corrupt_examples=0):
    """ImageNet as TensorFlow Datasets prepared it: `imagenet2012`, splits train and validation.

    Args:
        data_dir: folder of TensorFlow Datasets, or `None` for its default.
        image_size, max_corrupt_examples: as in `Photos`.

    Raises:
        FileNotFoundError: if it has not been prepared there.
        ValueError: if its files are of another format than TFRecord, or incomplete.
    """
    import tensorflow_datasets as tfds

    data_dir = data_dir or tfds.core.constants.DATA_DIR
    # With a version TensorFlow Datasets looks for what lies on the disk, not for its newest one.
    builder = tfds.builder("imagenet2012:5.*.*", data_dir=data_dir)
    splits = builder.info.splits
    if "train" not in splits or "validation" not in splits:
        raise FileNotFoundError(
            f"imagenet2012 is not prepared under --data_dir={data_dir}. ImageNet must be had by "
            "hand from image-net.org: put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into "
            "downloads/manual of that folder, then run `tfds build imagenet2012 "
            f"--data_dir={data_dir}`; or unpack them into class folders for --dataset=folder"
        )
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(
            f"imagenet2012 under --data_dir={data_dir} has files of the format "
            f"{builder.info.file_format.value}: prepare it as tfrecord"
        )
    train, test = (
        Records(splits[name].filepaths, splits[name].shard_lengths)
        for name in ("train", "validation")
    )
    class_names = builder.info.features["label"].names
    return Photos(train, test, class_names, image_size, max_corrupt_examples)

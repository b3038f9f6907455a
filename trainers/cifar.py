"""Trains a CIFAR ResNet: `python -m trainers.cifar --flagfile=configs/digits.cfg`."""

import trainers.quick_start  # noqa: F401

# isort: split

import functools

from absl import flags

import nlcg_tf
from trainers.data import memory
from trainers.engine.run import main
from trainers.flags import decides, free, is_among, weight_decay
from trainers.models import cifar_resnet
from trainers.optimizers.choice import cifar_line_search, make_schedule
from trainers.task import Task

FLAGS = flags.FLAGS

flags.DEFINE_string(
    decides("dataset"), "digits", f"Images to train on: {', '.join(memory.DATA_SETS)}."
)
flags.register_validator("dataset", lambda name: is_among(name, memory.DATA_SETS))
flags.DEFINE_bool(free("download"), False, "Let TensorFlow Datasets download what is missing.")
flags.DEFINE_integer(
    decides("training_examples"),
    None,
    "Train on so many images only, the first ones.",
    lower_bound=1,
)
flags.DEFINE_integer(
    decides("image_size"),
    None,
    "Height and width to which the images are reduced, by means of whole blocks of pixels; a "
    "divisor of their own.",
    lower_bound=4,
)
flags.DEFINE_integer(decides("depth"), 32, "Depth of the ResNet, 6n + 2: 8, 20, 32, 56.")

TEST_BATCH_SIZE = 500


class Cifar(Task):
    """The task of this trainer."""

    trainer = "trainers.cifar"

    @property
    def name(self):
        return f"{FLAGS.dataset}-resnet{FLAGS.depth}"

    @property
    def examples(self):
        return FLAGS.training_examples or self.data_set.training_examples

    @property
    def data_set(self):
        return memory.DATA_SETS[FLAGS.dataset]

    @functools.cached_property
    def classes(self):
        return self.data_set.classes

    @property
    def default_line_search(self):
        return cifar_line_search(FLAGS.global_batch_size)

    def check(self):
        cifar_resnet.check_depth(FLAGS.depth)
        package = self.data_set.comes_with
        if package and (FLAGS.data_dir or FLAGS.download):
            raise ValueError(
                f"--dataset={FLAGS.dataset} comes with {package}: no --data_dir, --download"
            )
        size = self.data_set.image_shape[0]
        if FLAGS.image_size and size % FLAGS.image_size:
            raise ValueError(
                f"--image_size={FLAGS.image_size} does not divide the {size} pixels of "
                f"--dataset={FLAGS.dataset}"
            )
        there_are = self.data_set.training_examples
        if self.examples > there_are:
            raise ValueError(
                f"--training_examples={self.examples} is more than the {there_are} of "
                f"--dataset={FLAGS.dataset}"
            )

    def schedule(self, plan):
        return make_schedule(nlcg_tf.schedules.CifarSchedule, FLAGS.flag_values_dict(), plan)

    def load(self):
        self.data = self.data_set.load(FLAGS.data_dir, FLAGS.download)
        if FLAGS.image_size:
            self.data = memory.reduced(self.data, FLAGS.image_size)
        self.data.train = tuple(part[: self.examples] for part in self.data.train)

    def model(self):
        height, width, channels = self.data_set.image_shape
        shape = (FLAGS.image_size or height, FLAGS.image_size or width, channels)
        return cifar_resnet.cifar_resnet(FLAGS.depth, shape, self.classes, weight_decay())

    def training_batches(self, plan, rank, seed, epoch, first_update):
        return memory.training_batches(self.data, plan, rank, seed, epoch, first_update)

    def test_batches(self, rank, workers):
        return memory.test_batches(self.data, TEST_BATCH_SIZE, rank, workers)


TASK = Cifar

if __name__ == "__main__":
    main(TASK)

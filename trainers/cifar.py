"""Trains a CIFAR ResNet: `python -m trainers.cifar --flagfile=configs/digits.cfg`."""

import functools

from absl import flags

import nlcg_tf
from trainers import data, models, settings
from trainers.run import main

FLAGS = flags.FLAGS

flags.DEFINE_enum("dataset", "digits", list(data.TRAINING_EXAMPLES), "Images to train on.")
flags.DEFINE_bool("download", False, "Let TensorFlow Datasets download what is missing.")
flags.DEFINE_integer(
    "training_examples", None, "Train on so many images only, the first ones.", lower_bound=1
)
flags.DEFINE_integer("depth", 32, "Depth of the ResNet, 6n + 2: 8, 20, 32, 56.")

# The paper's runs on CIFAR-100 have no line search below this global batch.
LINE_SEARCH_FROM = 2048
TEST_BATCH_SIZE = 500


class Cifar:
    """The task of this trainer; see `trainers.run.run`."""

    trainer = "trainers.cifar"
    class_names = None  # the data sets' own numbers

    def __init__(self):
        self.skipped = set()  # none: damage is an error here

    @property
    def name(self):
        return f"{FLAGS.dataset}-resnet{FLAGS.depth}"

    @property
    def examples(self):
        return FLAGS.training_examples or data.TRAINING_EXAMPLES[FLAGS.dataset]

    @functools.cached_property
    def classes(self):
        return data.CLASSES[FLAGS.dataset]

    @property
    def default_line_search(self):
        return "online" if FLAGS.global_batch_size >= LINE_SEARCH_FROM else "none"

    @property
    def identity(self):
        return {name: FLAGS[name].value for name in ("dataset", "depth", "training_examples")}

    def check(self):
        models.check_depth(FLAGS.depth)
        if FLAGS.dataset == "digits" and (FLAGS.data_dir or FLAGS.download):
            raise ValueError("--dataset=digits comes with scikit-learn: no --data_dir, --download")
        there_are = data.TRAINING_EXAMPLES[FLAGS.dataset]
        if self.examples > there_are:
            raise ValueError(
                f"--training_examples={self.examples} is more than the {there_are} of "
                f"--dataset={FLAGS.dataset}"
            )

    def schedule(self, plan):
        return nlcg_tf.schedules.CifarSchedule(
            plan.global_batch_size, plan.epochs, plan.updates_per_epoch, FLAGS.learning_rate_factor
        )

    def load(self):
        self.data = data.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.download)
        self.data.train = tuple(part[: self.examples] for part in self.data.train)

    def model(self):
        shape = data.IMAGE_SHAPES[FLAGS.dataset]
        return models.cifar_resnet(FLAGS.depth, shape, self.classes, settings.weight_decay())

    def training_batches(self, plan, rank, seed, epoch, first_update):
        return data.training_batches(self.data, plan, rank, seed, epoch, first_update)

    def test_batches(self, rank, workers):
        return data.test_batches(self.data, TEST_BATCH_SIZE, rank, workers)


TASK = Cifar

if __name__ == "__main__":
    main(TASK)

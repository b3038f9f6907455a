"""Trains a CIFAR ResNet: `python -m trainers.cifar --flagfile=configs/digits.cfg`."""

from absl import flags

import nlcg_tf
from trainers import data, models, settings  # noqa: F401 (settings defines the shared flags)
from trainers.run import main

FLAGS = flags.FLAGS

flags.DEFINE_enum("dataset", "digits", list(data.TRAINING_EXAMPLES), "Images to train on.")
flags.DEFINE_bool("download", False, "Let TensorFlow Datasets download what is missing.")
flags.DEFINE_integer("depth", 32, "Depth of the ResNet, 6n + 2: 8, 20, 32, 56.")

# The paper's runs on CIFAR-100 have no line search below this global batch.
LINE_SEARCH_FROM = 2048
TEST_BATCH_SIZE = 500


class Cifar:
    """The task of this trainer; see `trainers.run.run`."""

    trainer = "trainers.cifar"

    @property
    def name(self):
        return f"{FLAGS.dataset}-resnet{FLAGS.depth}"

    @property
    def examples(self):
        return data.TRAINING_EXAMPLES[FLAGS.dataset]

    @property
    def default_line_search(self):
        return "online" if FLAGS.global_batch_size >= LINE_SEARCH_FROM else "none"

    @property
    def identity(self):
        return {"dataset": FLAGS.dataset, "depth": FLAGS.depth}

    def check(self):
        models.check_depth(FLAGS.depth)
        if FLAGS.dataset == "digits" and (FLAGS.data_dir or FLAGS.download):
            raise ValueError("--dataset=digits comes with scikit-learn: no --data_dir, --download")

    def schedule(self, plan):
        return nlcg_tf.schedules.CifarSchedule(
            plan.global_batch_size, plan.epochs, plan.updates_per_epoch
        )

    def load(self):
        self.data = data.load(FLAGS.dataset, FLAGS.data_dir, FLAGS.download)

    def model(self):
        shape, classes = data.IMAGE_SHAPES[FLAGS.dataset], data.CLASSES[FLAGS.dataset]
        return models.cifar_resnet(FLAGS.depth, shape, classes, FLAGS.weight_decay)

    def training_batches(self, plan, rank, seed, epoch, first_update):
        return data.training_batches(self.data, plan, rank, seed, epoch, first_update)

    def test_batches(self, rank, workers):
        return data.test_batches(self.data, TEST_BATCH_SIZE, rank, workers)


TASK = Cifar

if __name__ == "__main__":
    main(TASK)

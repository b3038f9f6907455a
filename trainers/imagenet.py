"""Trains ResNet-50 on ImageNet: `python -m trainers.imagenet --dataset=folder --data_dir=DIR`."""

import trainers.quick_start  # noqa: F401

# isort: split

import functools

from absl import flags

import nlcg_tf
from trainers.data import photos, sources
from trainers.engine.run import main
from trainers.flags import decides, free, weight_decay
from trainers.models import resnet50
from trainers.optimizers.choice import make_schedule
from trainers.task import Task

FLAGS = flags.FLAGS

flags.DEFINE_enum(
    decides("dataset"),
    "imagenet2012",
    ["imagenet2012", "folder", "synthetic"],
    "TensorFlow Datasets' imagenet2012; a folder with train/CLASS/*.JPEG and validation/CLASS/* "
    "(or val); or images made up, to measure speed.",
)
flags.DEFINE_enum(decides("model"), "v1", list(resnet50.VERSIONS), "ResNet-50 v1 or v2.")
flags.DEFINE_integer(
    decides("image_size"), 299, "Height and width of the images, 299 in the paper."
)
flags.DEFINE_integer(
    free("max_corrupt_examples"), 0, "How many damaged images each worker may skip.", lower_bound=0
)

TEST_BATCH_SIZE = 100
# Of ImageNet, for dry runs without it.
EXAMPLES, CLASSES = 1_281_167, 1000
SYNTHETIC_UPDATES = 50


class ImageNet(Task):
    """The task of this trainer."""

    trainer = "trainers.imagenet"
    default_line_search = "online"

    @property
    def name(self):
        return f"{FLAGS.dataset}-resnet50{FLAGS.model}"

    @functools.cached_property
    def data(self):
        if FLAGS.dataset == "synthetic":
            # An epoch short enough to wait for its images per second.
            examples = SYNTHETIC_UPDATES * FLAGS.global_batch_size
            return photos.Synthetic(FLAGS.image_size, examples=examples)
        arguments = (FLAGS.data_dir, FLAGS.image_size, FLAGS.max_corrupt_examples)
        if FLAGS.dataset == "folder":
            return sources.open_folder(*arguments)
        return sources.open_tfds(*arguments)

    @property
    def examples(self):
        return EXAMPLES if self._assumed else self.data.examples

    @functools.cached_property
    def classes(self):
        return CLASSES if self._assumed else self.data.classes

    @property
    def class_names(self):
        return self.data.class_names

    @property
    def skipped(self):
        return self.data.skipped

    @property
    def _assumed(self):
        """A dry run needs no data: it takes ImageNet's size."""
        return FLAGS.dry_run and FLAGS.dataset == "imagenet2012"

    @property
    def identity(self):
        return {"data_dir's files": self.data.digest}

    def check(self):
        if FLAGS.dataset == "folder" and not FLAGS.data_dir:
            raise ValueError("--dataset=folder needs --data_dir")
        if FLAGS.dataset == "synthetic" and FLAGS.data_dir:
            raise ValueError("--dataset=synthetic takes no --data_dir")
        if FLAGS.jit_compile and FLAGS.deterministic:
            raise ValueError(
                "--jit_compile and --deterministic exclude each other: XLA's gradient of the "
                "network's max pooling is not deterministic"
            )
        if FLAGS.image_size < 32:
            raise ValueError(f"--image_size={FLAGS.image_size} is too small: at least 32")

    def schedule(self, plan):
        return make_schedule(nlcg_tf.schedules.ImageNetSchedule, FLAGS.flag_values_dict(), plan)

    def load(self):
        self.data  # noqa: B018 (opened here, where an error is reported well)

    def model(self):
        return resnet50.resnet50(FLAGS.model, FLAGS.image_size, self.classes, weight_decay())

    def training_batches(self, plan, rank, seed, epoch, first_update):
        return self.data.training_batches(plan, rank, seed, epoch, first_update)

    def test_batches(self, rank, workers):
        return self.data.test_batches(TEST_BATCH_SIZE, rank, workers)


TASK = ImageNet

if __name__ == "__main__":
    main(TASK)

"""What a trainer is asked for; `trainers.engine.run` does the rest."""

import abc


class Task(abc.ABC):
    """Data, model and schedule of a trainer, as its flags say.

    Attributes:
        trainer: string, the module that defines it.
        name: string, names the default run folder.
        examples: int, training images in an epoch.
        classes: int.
        class_names: list of strings, or `None` where the data set has but numbers.
        default_line_search: `"online"` or `"none"`, for `--line_search=auto`.
        skipped: set of the names of the damaged images that it has skipped so far.
        identity: dict of what decides the result of a run besides the flags.
    """

    class_names = None
    skipped = frozenset()
    identity = {}  # noqa: RUF012 (never changed)

    @abc.abstractmethod
    def check(self):
        """Raises a ValueError for flags that do not fit each other."""

    @abc.abstractmethod
    def schedule(self, plan):
        """The learning-rate schedule of a `trainers.engine.plan.BatchPlan`."""

    @abc.abstractmethod
    def load(self):
        """Opens or loads the data; a ValueError or an OSError if it cannot."""

    @abc.abstractmethod
    def model(self):
        """The `keras.Model` from images to logits."""

    @abc.abstractmethod
    def training_batches(self, plan, rank, seed, epoch, first_update):
        """An iterable of this worker's `(images, labels)` of an epoch, a pair a micro-step."""

    @abc.abstractmethod
    def test_batches(self, rank, workers):
        """An iterable of this worker's `(images, labels, weights)`, as many on all workers."""

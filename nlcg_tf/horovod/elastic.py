"""Workers that come and go: what Horovod's elastic engine needs from Keras 3."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

from nlcg_tf.horovod.collectives import broadcast, gather, plain, shared
from nlcg_tf.horovod.watch import is_communication_error


class ElasticState(ObjectState):
    """What the workers of an elastic job share: variables, and values as attributes.

    `commit()` keeps a copy of them in host memory, to which the others return when a worker is
    lost, and lets workers join that wait to. Horovod's own `TensorFlowState` does not give the
    variables to workers that join, and its `TensorFlowKerasState` cannot read Keras 3 optimizers.
    Of a sharded optimizer the copy is the whole state, on each worker, and each change of workers
    divides it anew.

    Args:
        variables: list of Keras or TensorFlow variables.
        **values: Python values, `update=0, ...`, to be found as `state.update`.
    """

    def __init__(self, variables: Sequence[Any], **values: Any) -> None:
        self._variables = plain(shared(variables))
        sharded = {id(v.part_of): v.part_of for v in variables if hasattr(v, "part_of")}
        self._sharded = list(sharded.values())
        self._whole = None  # the state of each of those, once the workers may communicate
        self._keep()
        super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **values)

    def save(self):
        self._keep()
        self._gather()
        super().save()

    def restore(self):
        for variable, value in zip(self._variables, self._kept):
            variable.assign(value)
        super().restore()

    def reset(self):
        """The workers are others now."""
        if self._sharded and self._whole is None:
            raise RuntimeError("a worker was lost before the first state had been shared")
        self._divide()

    def sync(self):
        broadcast(self._variables)
        self._keep()
        if self._sharded:
            self._share_whole()
            self._divide()
        super().sync()

    def _gather(self):
        self._whole = [
            {key: gather([part.value])[0].numpy() for key, part in sorted(optimizer.parts.items())}
            for optimizer in self._sharded
        ]

    def _share_whole(self):
        """Gives all workers the whole states that worker 0 has kept."""
        if not hvd.broadcast_object(self._whole is not None):
            self._gather()  # nobody has trained yet
            return
        whole = []
        for i, optimizer in enumerate(self._sharded):
            whole.append({})
            for name, number in sorted(optimizer.parts):
                layout = optimizer.layouts[number]
                vector = tf.zeros([layout.elements], layout.dtype)
                if hvd.rank() == 0:
                    vector = self._whole[i][name, number]
                vector = hvd.broadcast(vector, 0, name="Horovod_whole")
                whole[i][name, number] = vector.numpy()
        self._whole = whole

    def _divide(self):
        for optimizer, whole in zip(self._sharded, self._whole or ()):
            optimizer.divide_anew(whole)

    def _keep(self):
        self._kept = [v.numpy() for v in self._variables]


def elastic_run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `function(state, ...)` to be called again after each change of workers.

    See `horovod.elastic.run`, whose engine this is. Functions traced by TensorFlow that depend on
    the number of workers must be made anew in each call, and nothing may be communicated between
    `init()` and the call.
    """

    @functools.wraps(function)
    def guarded(state, *args, **kwargs):
        try:
            return function(state, *args, **kwargs)
        except tf.errors.OpError as error:
            # Horovod's own decorator takes the failure of an operation that it does not know by
            # name, such as a grouped all-reduce, for the end of the training.
            if is_communication_error(error):
                raise HorovodInternalError(str(error)) from error
            raise

    return run_fn(guarded, _reset)


def _reset():
    hvd.shutdown()
    hvd.init()

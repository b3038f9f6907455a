"""Workers that come and go: what Horovod's elastic engine needs from Keras 3."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

from nlcg_tf.horovod.collectives import broadcast, broadcast_first, gather, shared
from nlcg_tf.horovod.watch import is_communication_error
from nlcg_tf.horovod.whole import first_state
from nlcg_tf.variables import plain


class ElasticState(ObjectState):
    """What the workers of an elastic job share: variables, and Python values as attributes.

    Call `commit()` regularly. It copies the state into host memory and lets waiting workers join.
    If a worker is lost, the others continue from the last copy. For a sharded optimizer, each
    worker copies the whole state, and each change of workers divides it again.

    Use this class instead of Horovod's `TensorFlowState`, which does not pass the variables to
    workers that join, and `TensorFlowKerasState`, which cannot read Keras 3 optimizers.

    Args:
        variables: list of Keras or TensorFlow variables.
        **values: Python values, `update=0, ...`, to be found as `state.update`.
    """

    def __init__(self, variables: Sequence[Any], **values: Any) -> None:
        self._variables = plain(shared(variables))
        sharded = {id(v.shard_of): v.shard_of for v in variables if hasattr(v, "shard_of")}
        self._sharded = list(sharded.values())
        self._whole = None  # the state of each of those; here the workers may not communicate yet
        self._is_divided_anew = False
        self._keep()
        super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **values)

    def save(self):
        whole = self._gathered()  # a worker lost meanwhile leaves what was kept before
        self._whole, self._is_divided_anew = whole, False
        self._keep()
        super().save()

    def check_host_updates(self):
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            self._whole = self._gathered()  # nobody was lost: all go on from here
            raise

    def restore(self):
        for variable, value in zip(self._variables, self._kept):
            variable.assign(value)
        super().restore()

    def reset(self):
        """The workers are others now."""
        if self._whole is None:
            self._whole = [first_state(optimizer) for optimizer in self._sharded]
        self._divide()
        self._is_divided_anew = True

    def sync(self):
        broadcast(self._variables)
        self._keep()
        if self._sharded:
            self._share_whole()
            self._divide()
        super().sync()

    def _gathered(self):
        return [
            {key: gather([x.value])[0].numpy() for key, x in sorted(one.division.slots.items())}
            for one in self._sharded
        ]

    def _share_whole(self):
        """Gives all workers the whole states, which worker 0 has if others were there before."""
        if not hvd.broadcast_object(self._is_divided_anew):
            self._whole = self._gathered()
            return
        whole = []
        for i, optimizer in enumerate(self._sharded):
            whole.append({})
            for name, number in sorted(optimizer.division.slots):
                layout = optimizer.division.layouts[number]
                vector = tf.zeros([layout.elements], layout.dtype)
                if hvd.rank() == 0:
                    vector = self._whole[i][name, number]
                whole[i][name, number] = broadcast_first(tf.convert_to_tensor(vector)).numpy()
        self._whole = whole

    def _divide(self):
        for optimizer, whole in zip(self._sharded, self._whole, strict=True):
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

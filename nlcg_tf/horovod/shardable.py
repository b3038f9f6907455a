"""Which optimizers can be sharded: those that would train as they do unsharded."""

from keras import optimizers

from nlcg_tf.horovod.averaging import COMES_TO_THE_AVERAGE
from nlcg_tf.optimizer import NLCG

# Each element's update depends on that element alone, and on what all share. A subclass may differ.
ELEMENTWISE = (
    NLCG,
    optimizers.SGD,
    optimizers.Adam,
    optimizers.AdamW,
    optimizers.RMSprop,
    optimizers.Adagrad,
    optimizers.Adadelta,
    optimizers.Lion,
    optimizers.Ftrl,
)

# Settings that look at a variable as a whole.
NEEDS_WHOLE = ("clipnorm", "lars_coefficient")


def why_not(optimizer, compression):
    """Why an optimizer cannot be divided, in a sentence; `None` where it can."""
    if hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
        if compression == "fp16":
            return (
                "with loss scaling it sends gradients without the scale, which float16 could not "
                f"hold: use compression='bf16'. Received: compression={compression!r}"
            )
    cls = type(optimizer)
    if cls not in ELEMENTWISE and not getattr(cls, "is_elementwise", False):
        return (
            f"{cls.__name__} is not known to update each element by itself. If it does, give its "
            "class the attribute `is_elementwise = True`"
        )
    clips = optimizers.Optimizer._clip_gradients
    if cls.apply not in COMES_TO_THE_AVERAGE or cls._clip_gradients is not clips:
        return (
            f"{cls.__name__} has an `apply` or `_clip_gradients` of its own, which would see the "
            "gradients of one worker"
        )
    for name in NEEDS_WHOLE:
        if getattr(optimizer, name, None):
            return f"`{name}` needs whole variables. Received: {name}={getattr(optimizer, name)}"
    preconditioner = getattr(optimizer, "preconditioner", None)
    if preconditioner is not None and preconditioner.couples != "elements":
        # Of one that keeps a state the shapes of variables are not those of the shards.
        if preconditioner.couples == "model" or preconditioner.initial_state((2, 2)):
            return cannot_serve(preconditioner)
    if optimizer.built:
        return (
            f"{cls.__name__} has been built already, and its state is whole. "
            "Distribute a new optimizer, build it, and load the state with `load_weights` on every "
            "worker"
        )
    try:  # as each save does
        cls.from_config(optimizer.get_config())
    except Exception as error:
        return (
            f"{cls.__name__} cannot be made again from its configuration, as a save of "
            f"its whole state needs: {error}"
        )
    return None


def cannot_serve(preconditioner):
    return (
        "shards serve a preconditioner that couples elements and keeps the same state for each "
        "variable, or one that couples a variable without keeping a state. Received: "
        f"preconditioner={preconditioner!r} with couples={preconditioner.couples!r}"
    )


def check_slots(optimizer):
    """Raises a ValueError for slots of which those of the whole variables could not be told."""
    slots, of_the_whole = optimizer.division.slots, optimizer.division.of_the_whole
    recorded = {id(slot) for slot in [*slots.values(), *of_the_whole.values()]}
    odd = [v for v in optimizer.variables if id(v) not in recorded and len(v.shape)]
    if odd and optimizer.__class__ not in ELEMENTWISE:
        raise ValueError(
            f"`shard=True` needs slots made by `add_variable_from_reference`, which "
            f"'{odd[0].name}' of {type(optimizer).__name__} is not"
        )
    names = [name for name, _ in slots]
    for name in names:
        if names.count(name) != len(optimizer.division.layouts) or (name, 0) in of_the_whole:
            raise ValueError(
                "`shard=True` needs one slot for each variable under a name of its own, other "
                "than Keras' 'average' and 'gradient_accumulator'. Received: "
                f"{type(optimizer).__name__} with {names.count(name)} of the name {name!r} for "
                f"{len(optimizer.division.layouts)} shards"
            )

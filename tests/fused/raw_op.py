"""Calls of the raw op with arguments of all kinds, good and bad; shared by test and fuzz script."""

import numpy as np
import tensorflow as tf

from nlcg_tf.reference import REALS

SHAPES = [(3, 4), (), (0,), (7,)]
SEARCHED = 2  # scalars of a line search
SUMS = 11  # of a call for shards
STAGE_BYTES = {tf.float32: 120, tf.float64: 216}
LENGTH = len(REALS) + SEARCHED


class Call:
    """The arguments of one call, valid until a test spoils them, and the variables behind them."""

    def __init__(
        self,
        seed=0,
        dtype=tf.float32,
        preconditioner="bfgs",
        lars=0.0,
        update_rule="fletcher_reeves",
        nesterov=False,
    ):
        rng = np.random.default_rng(seed)
        make = lambda shape: tf.Variable(tf.constant(rng.normal(size=shape), dtype))  # noqa: E731
        self.weights = [make(shape) for shape in SHAPES]
        bfgs = preconditioner in ("bfgs", "normalized_bfgs")
        keeps_gradient = bfgs or update_rule in ("polak_ribiere", "blended")
        kinds = 1 + keeps_gradient + bfgs
        given = SHAPES if preconditioner == "given" else []
        self.slots = [make(shape) for _ in range(kinds) for shape in SHAPES]
        self.reals = tf.Variable(tf.zeros(LENGTH, dtype))
        self.counts = tf.Variable(tf.zeros(4, tf.int64))
        self.ratios = [tf.Variable(tf.ones(len(SHAPES), dtype))] if lars else []
        keeps_sums = bfgs and not nesterov
        self.sums = [tf.Variable(tf.zeros((len(SHAPES), 4), dtype))] if keeps_sums else []
        self.variables = [*self.weights, *self.slots, self.reals, self.counts]
        self.variables += [*self.ratios, *self.sums]
        self.arguments = {
            "weights": [v.handle for v in self.weights],
            "slots": [v.handle for v in self.slots],
            "reals": self.reals.handle,
            "counts": self.counts.handle,
            "trust_ratios": [v.handle for v in self.ratios],
            "curvature_sums": [v.handle for v in self.sums],
            "gradients": [tf.constant(rng.normal(size=shape), dtype) for shape in SHAPES],
            "preconditioned": [tf.constant(rng.normal(size=shape), dtype) for shape in given],
            "given": tf.constant([0.1, 0.05, 1.0, 0.5, 1.0], dtype),
            "settings": _settings(1e-8, lars),
            "weight_decays": tf.zeros(len(SHAPES), tf.float64),
            "op": "nlcg_update",
            "preconditioner": preconditioner,
            "positions": list(range(len(SHAPES))),
            "update_rule": update_rule,
            "nesterov": nesterov,
        }

    def run(self, library, graph=False):
        """Runs the op; returns what it returns, raises what it raises."""

        def call():
            arguments = dict(self.arguments)
            op = getattr(library, arguments.pop("op"))
            if isinstance(arguments["slots"], list):
                with tf.init_scope():
                    arguments["slots"] = library.nlcg_pack_handles(arguments["slots"])
            outputs = op(keep_slots=graph, **arguments)
            return None if self.arguments["op"] == "nlcg_update" else outputs  # it has none

        return (tf.function(call) if graph else call)()

    def bits(self):
        return [_bits(v) for v in self.variables]


def _bits(variable):
    """Not `variable.numpy()`, whose checks would take most of the time of a fuzz."""
    value = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
    return value.numpy().tobytes()


def _settings(epsilon=1e-8, lars=0.0, momentum=0.9, decay=0.99):
    return tf.constant([epsilon, lars, momentum, decay], tf.float64)


def _set(name, value):
    def spoil(call):
        call.arguments[name] = value(call) if callable(value) else value

    return spoil


def _replace(name, index, value):
    def spoil(call):
        call.arguments[name] = list(call.arguments[name])
        call.arguments[name][index] = value(call)

    return spoil


def for_shards(op, **handed_over):
    """Makes a call for shards of a call for whole variables."""

    def change(call):
        for name in ("trust_ratios", "curvature_sums", "positions", "totals", "stage_before"):
            call.arguments.pop(name, None)
        call.arguments.update(op=op, **handed_over)

    return change


TOTALS = tf.zeros(SUMS, tf.float64)
STAGE = tf.zeros(STAGE_BYTES[tf.float32], tf.int8)


def _direction(totals=(TOTALS,), stage_before=(STAGE,)):
    """The second call for shards with BFGS."""
    return for_shards("nlcg_direction", totals=totals, stage_before=stage_before)


def _step(**handed_over):
    return for_shards("nlcg_step", **{"totals": TOTALS, "stage_before": STAGE, **handed_over})


def _uninitialized(shape=(3, 4), dtype=tf.float32):
    return tf.raw_ops.VarHandleOp(dtype=dtype, shape=shape, shared_name="", name="empty")


def _deleted():
    handle = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=(3, 4), shared_name="gone")
    tf.raw_ops.AssignVariableOp(resource=handle, value=tf.zeros((3, 4)))
    tf.raw_ops.DestroyResourceOp(resource=handle)
    return handle


def _table():
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    return table.resource_handle


def _pairs(call):
    return tf.stack([v.handle for v in call.weights[:2]])


def _no_handle(call):
    return _pairs(call)[:0]


SPOILERS = {
    "no variables": lambda call: call.arguments.update(
        weights=[], gradients=[], slots=_no_handle(call), positions=[]
    ),
    "too few gradients": _set("gradients", lambda call: call.arguments["gradients"][:-1]),
    "too many weights": _set("weights", lambda call: [v.handle for v in call.slots[:5]]),
    "too few slots": _set("slots", lambda call: call.arguments["slots"][:-1]),
    "too many slots": _set("slots", lambda call: [*call.arguments["slots"], call.reals.handle]),
    "gradient of another shape": _replace("gradients", 0, lambda call: tf.zeros((4, 3))),
    "gradient of another rank": _replace("gradients", 0, lambda call: tf.zeros(12)),
    "gradient of another type": _replace("gradients", 0, lambda call: tf.zeros((3, 4), tf.float64)),
    "integer gradient": _replace("gradients", 0, lambda call: tf.zeros((3, 4), tf.int32)),
    "weight of another type": _replace(
        "weights", 0, lambda call: call.keep(tf.Variable(tf.zeros((3, 4), tf.float64)))
    ),
    "slot of another shape": _replace(
        "slots", 0, lambda call: call.keep(tf.Variable(tf.zeros((4, 4))))
    ),
    "slot of another type": _replace(
        "slots", 0, lambda call: call.keep(tf.Variable(tf.zeros((3, 4), tf.int32)))
    ),
    "the same weight twice": _replace("weights", 3, lambda call: call.weights[0].handle),
    "a weight as a slot": _replace("slots", 0, lambda call: call.weights[0].handle),
    "the same slot twice": _replace("slots", 4, lambda call: call.slots[0].handle),
    "reals as counts": _set("counts", lambda call: call.reals.handle),
    "reals too short": _set("reals", lambda call: call.keep(tf.Variable(tf.zeros(LENGTH - 1)))),
    "reals of another rank": _set(
        "reals", lambda call: call.keep(tf.Variable(tf.zeros((LENGTH, 1))))
    ),
    "counts too long": _set("counts", lambda call: call.keep(tf.Variable(tf.zeros(5, tf.int64)))),
    "counts of another type": _set("counts", lambda call: call.keep(tf.Variable(tf.zeros(4)))),
    "ratios without a coefficient": _set(
        "trust_ratios", lambda call: [call.keep(tf.Variable(tf.ones(4)))]
    ),
    "a coefficient without ratios": _set("settings", _settings(lars=0.1)),
    "two variables of sums": _set(
        "curvature_sums",
        lambda call: [call.sums[0].handle, call.keep(tf.Variable(tf.zeros((4, 4))))],
    ),
    "sums as a vector": _set("curvature_sums", lambda call: [call.keep(tf.Variable(tf.zeros(16)))]),
    "sums too narrow": _set(
        "curvature_sums", lambda call: [call.keep(tf.Variable(tf.zeros((4, 3))))]
    ),
    "kept sums of another type": _set(
        "curvature_sums", lambda call: [call.keep(tf.Variable(tf.zeros((4, 4), tf.int32)))]
    ),
    "sums that the look-ahead has not": _set("nesterov", True),
    "P g that the op computes itself": _set("preconditioned", lambda c: c.arguments["gradients"]),
    "slots of another rule": _set("preconditioner", "none"),
    "unknown preconditioner": _set("preconditioner", "adam"),
    "no rate and no loss": _set("given", tf.zeros(0)),
    "a rate without a loss": _set("given", tf.zeros(2)),
    "a scalar for rates and loss": _set("given", tf.constant(0.1)),
    "rates and loss of another type": _set("given", tf.zeros(5, tf.float64)),
    "another line search than the reals have": _set("given", tf.zeros(4)),
    "a line search of thousands": _set("given", tf.zeros(5000)),
    "no settings": _set("settings", tf.zeros(0, tf.float64)),
    "short settings": _set("settings", tf.constant([1e-8, 0.0, 0.9], tf.float64)),
    "scalar settings": _set("settings", tf.constant(1e-8, tf.float64)),
    "settings with NaN": _set("settings", _settings(np.nan)),
    "epsilon zero": _set("settings", _settings(0.0)),
    "negative coefficient": _set("settings", _settings(lars=-1.0)),
    "momentum one": _set("settings", _settings(momentum=1.0)),
    "decay zero": _set("settings", _settings(decay=0.0)),
    "decay above one": _set("settings", _settings(decay=1.01)),
    "long settings": _set("settings", tf.constant([1e-8, 0, 0.9, 0.99, 1], tf.float64)),
    "infinite coefficient": _set("settings", _settings(lars=np.inf)),
    "unknown rule": _set("update_rule", "newton"),
    "too few weight decays": _set("weight_decays", tf.zeros(3, tf.float64)),
    "matrix of weight decays": _set("weight_decays", tf.zeros((4, 1), tf.float64)),
    "too few positions": _set("positions", [0, 1, 2]),
    "uninitialized weight": _replace("weights", 0, lambda call: _uninitialized()),
    "uninitialized slot": _replace("slots", 0, lambda call: _uninitialized()),
    "uninitialized reals": _set("reals", lambda call: _uninitialized((LENGTH,))),
    "deleted weight": _replace("weights", 0, lambda call: _deleted()),
    "deleted slot": _replace("slots", 0, lambda call: _deleted()),
    "a hash table as weight": _replace("weights", 0, lambda call: _table()),
    "a hash table as slot": _replace("slots", 0, lambda call: _table()),
    "two handles as weight": _replace("weights", 0, _pairs),
    "no handle as reals": _set("reals", _no_handle),
    "slots as a matrix": _set(
        "slots", lambda call: tf.reshape(tf.stack(call.arguments["slots"]), (3, -1))
    ),
    "no slot handles": _set("slots", _no_handle),
    "shards beside sums of whole variables": _set("op", "nlcg_curvature"),
    "shards without what the call before found": _direction([], []),
    "totals without a stage": _direction(stage_before=[]),
    "totals of two calls": _direction([TOTALS] * 2, [STAGE] * 2),
    "totals of too few numbers": _direction([TOTALS[1:]]),
    "a scalar for totals": _step(totals=TOTALS[0]),
    "a stage of too few bytes": _step(stage_before=STAGE[1:]),
    "a stage of doubles": _step(stage_before=tf.zeros(STAGE_BYTES[tf.float64], tf.int8)),
}


def _keep(self, variable):
    """Keeps a variable alive, and its bits under watch."""
    self.variables.append(variable)
    return variable.handle


Call.keep = _keep

LARS_SPOILERS = {
    "shards with a coefficient": _step(),
    "position out of range": _set("positions", [0, 1, 2, 4]),
    "negative position": _set("positions", [0, -1, 2, 3]),
    "position twice": _set("positions", [0, 1, 1, 3]),
    "ratios of another rank": _set(
        "trust_ratios", lambda call: [call.keep(tf.Variable(tf.ones((4, 1))))]
    ),
    "scalar ratios": _set("trust_ratios", lambda call: [call.keep(tf.Variable(1.0))]),
    "two vectors of ratios": _set(
        "trust_ratios", lambda call: [call.ratios[0].handle, call.slots[0].handle]
    ),
}


GIVEN_SPOILERS = {
    "too few of P g": _set("preconditioned", lambda call: call.arguments["preconditioned"][:-1]),
    "no P g": _set("preconditioned", []),
    "P g of another shape": _replace("preconditioned", 0, lambda call: tf.zeros((4, 3))),
    "P g of another type": _replace("preconditioned", 0, lambda call: tf.zeros((3, 4), tf.float64)),
    "a rule that looks back": _set("update_rule", "blended"),
    "a call that it does not have": for_shards("nlcg_curvature"),
    "a stage before its first call": _direction(),
}


def fuzz(library, calls, seed):
    """Runs random calls, good and bad, eager; returns how many were done and how many refused.

    Whatever is passed, the process lives, a refused call changes no variable, and a call with a
    gradient or loss that is not finite is skipped.
    """
    rng = np.random.default_rng(seed)
    spoilers = [*SPOILERS.values(), *LARS_SPOILERS.values(), *GIVEN_SPOILERS.values()]
    values = [0.0, -0.0, 1.0, 1e-42, 1e-30, 1e30, 3e38, np.nan, np.inf, -np.inf]
    done = refused = 0
    call = None
    for _ in range(calls):
        if call is None or rng.random() < 0.02:
            dtype = [tf.float32, tf.float64][rng.integers(2)]
            lars = [0.0, 0.01][rng.integers(2)]
            preconditioner = ["none", "bfgs", "normalized_bfgs", "given"][rng.integers(4)]
            rules = ["fletcher_reeves", "momentum", "polak_ribiere", "blended"]
            rule = rules[rng.integers(2 if preconditioner == "given" else 4)]
            seed, nesterov = int(rng.integers(1000)), bool(rng.integers(2))
            call = Call(seed, dtype, preconditioner, lars, rule, nesterov)
            good, before = dict(call.arguments), call.bits()
        call.arguments = dict(good)
        if rng.random() < 0.3:
            index = rng.integers(len(SHAPES))
            gradients = list(good["gradients"])
            gradients[index] = tf.fill(SHAPES[index], tf.cast(rng.choice(values), dtype))
            call.arguments["gradients"] = gradients
            rate, loss = 10.0 ** rng.integers(-3, 3), rng.choice(values)
            call.arguments["given"] = tf.constant([rate, rate, loss, 0.5, 1.0], dtype)
        if rng.random() < 0.3:
            _hand_over_anything(call, dtype, rng)
        for _ in range(rng.integers(3)):
            try:
                spoilers[rng.integers(len(spoilers))](call)
            except (tf.errors.InvalidArgumentError, IndexError, TypeError, ValueError):
                pass  # TensorFlow refuses to make such an argument, or another spoiler took it
        own, kept = len(before), call.variables[len(before) :]  # by the spoilers
        before += map(_bits, kept)
        try:
            call.run(library)
            done += 1
        except (tf.errors.OpError, TypeError, ValueError):
            refused += 1
            assert call.bits() == before
        else:
            before = call.bits()
        del call.variables[own:], before[own:]
    return done, refused


def _hand_over_anything(call, dtype, rng):
    """Makes it one of the calls for shards, after one that gave any numbers and any bytes."""
    totals = tf.constant(10.0 ** rng.integers(-40, 40, SUMS) * rng.normal(size=SUMS))
    stage = tf.constant(rng.integers(-128, 128, STAGE_BYTES[dtype]), tf.int8)
    is_first = not call.arguments["preconditioner"].endswith("bfgs")
    change = [
        for_shards("nlcg_curvature"),
        _direction(*([], []) if is_first else ([totals], [stage])),
        _step(totals=totals, stage_before=stage),
    ][rng.integers(3)]
    change(call)

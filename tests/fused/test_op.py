"""The raw op: bad input, TensorFlow's rules for variables, which path runs, what is recorded."""

import logging
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from nlcg_tf import NLCG, fused
from nlcg_tf.fused import nlcg_update
from nlcg_tf.reference import COUNTS, REALS
from tests.fused import cuda_problem
from tests.fused.raw_op import GIVEN_SPOILERS, LARS_SPOILERS, SPOILERS, Call, for_shards, fuzz
from tests.support.launch import PYTHON, run
from tests.support.problems import paper_nlcg, regression_data, regression_model

REFUSED = (tf.errors.OpError, TypeError, ValueError)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("case", [*SPOILERS, *LARS_SPOILERS, *GIVEN_SPOILERS])
def test_bad_input_is_refused_and_changes_nothing(fused_library, case, graph):
    given = {"preconditioner": "given"} if case in GIVEN_SPOILERS else {}
    call = Call(lars=0.01 if case in LARS_SPOILERS else 0.0, **given)
    call.run(fused_library, graph)  # the call is good until it is spoilt
    before = call.bits()
    {**SPOILERS, **LARS_SPOILERS, **GIVEN_SPOILERS}[case](call)
    watched = before + call.bits()[len(before) :]
    with pytest.raises(REFUSED):
        call.run(fused_library, graph)
    assert call.bits() == watched


def test_fuzz(fused_library):
    done, refused = fuzz(fused_library, 10_000, seed=0)
    assert done > 3000 and refused > 3000


def test_the_scalars_stand_in_the_same_order_everywhere():
    """Python and the kernels share two vectors of scalars, of which each knows the positions."""
    header = (pathlib.Path(fused.__file__).parent / "nlcg_update.h").read_text()

    def names(enum):
        found = re.findall(r"k(\w+)", re.search(rf"enum {enum} {{(.*?)}}", header, re.S)[1])
        return [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in found[:-1]]

    assert names("Real") == REALS == cuda_problem.REALS
    assert names("Count") == list(COUNTS)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("preconditioner", "rule"),
    [
        ("none", "fletcher_reeves"),
        ("none", "blended"),
        ("bfgs", "polak_ribiere"),
        ("normalized_bfgs", "blended"),
        ("given", "momentum"),
    ],
)
def test_the_calls_for_shards_make_the_update(fused_library, preconditioner, rule, nesterov):
    """With one worker, whose shards are the variables, they give the bits of a whole update."""
    whole, shards = (
        Call(preconditioner=preconditioner, update_rule=rule, nesterov=nesterov) for _ in range(2)
    )
    whole.arguments["curvature_sums"] = []  # which rounds otherwise
    good = whole.arguments["gradients"]
    for scale in (1.0, -0.5, np.inf, 2.0):
        totals, stages = [], []
        for call in (whole, shards):
            call.arguments["gradients"] = [g * scale for g in good]
        whole.run(fused_library)
        if preconditioner.endswith("bfgs"):
            for_shards("nlcg_curvature")(shards)
            sums, stage = shards.run(fused_library)
            totals, stages = [sums], [stage]
        for_shards("nlcg_direction", totals=totals, stage_before=stages)(shards)
        sums, stage = shards.run(fused_library)
        for_shards("nlcg_step", totals=sums, stage_before=stage)(shards)
        shards.run(fused_library)
        assert shards.bits() == whole.bits()
    assert list(shards.counts.numpy()[[0, 1]]) == [3, 1]  # updates, skipped


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_value_that_was_read_before_does_not_change(fused_library, graph):
    """The buffer of a variable is shared with its readers: the op must copy it first."""
    call = Call()
    read = [v.read_value() for v in call.variables]
    before = [x.numpy().tobytes() for x in read]
    call.run(fused_library, graph)
    assert [x.numpy().tobytes() for x in read] == before
    assert call.bits() != before


def test_a_gradient_that_is_taken_over_is_not_changed_later(fused_library):
    """The op keeps the buffer of a gradient that nobody else holds as the previous gradient."""
    variable = keras.Variable(np.ones(1000, "float32"))
    optimizer = paper_nlcg(0.1, line_search=None, fused=True)
    optimizer.build([variable])

    update = tf.function(lambda x: optimizer.apply([x * 2.0], [variable]))

    def step(x):
        update(x)
        return optimizer.slots["previous_gradient"][0].value.read_value()

    first = step(tf.fill((1000,), 1.0))
    second = step(tf.fill((1000,), 3.0))
    np.testing.assert_array_equal(first.numpy(), np.full(1000, 2.0))
    np.testing.assert_array_equal(second.numpy(), np.full(1000, 6.0))
    outside = tf.fill((1000,), 5.0)
    tf.function(lambda g: optimizer.apply([g], [variable]))(outside)
    step(outside)
    np.testing.assert_array_equal(outside.numpy(), np.full(1000, 5.0))


def test_updates_in_two_threads_do_not_deadlock(fused_library):
    """Two optimizers over the same variables in opposite order, each update whole."""
    import threading

    def make_step(optimizer, order):
        return tf.function(lambda: optimizer.apply([v * 0.1 for v in order], order))

    variables = [keras.Variable(np.ones(50_000, "float32")) for _ in range(4)]
    optimizers = [paper_nlcg(1e-4, line_search=None, fused=True) for _ in range(2)]
    orders = [variables, variables[::-1]]
    steps = []
    for optimizer, order in zip(optimizers, orders):
        optimizer.build(order)
        steps.append(make_step(optimizer, order))
        steps[-1]()
    threads = [
        threading.Thread(target=lambda s=step: [s() for _ in range(50)], daemon=True)
        for step in steps
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert all(np.isfinite(v.numpy()).all() for v in variables)


def path_of(caplog, train):
    """Runs `train` and tells which path the debug log names."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="nlcg_tf"):
        train()
    messages = {record.message for record in caplog.records if record.name == "nlcg_tf"}
    assert len(messages) == 1, messages
    return messages.pop()


def test_each_situation_takes_its_path(fused_library, mirrored, caplog):
    x, y = regression_data()

    def fit(dtype=None, strategy=None, **arguments):
        def train():
            with (strategy or tf.distribute.get_strategy()).scope():
                model = regression_model(dtype=dtype)
                optimizer = NLCG(0.01, line_search="online")
                model.compile(optimizer=optimizer, loss="mse", **arguments)
            model.fit(x, y, verbose=0)

        return path_of(caplog, train)

    assert fit(jit_compile=False) == "NLCG update: fused op"
    assert fit(run_eagerly=True) == "NLCG update: fused op"
    assert "XLA" in fit(jit_compile=True)
    assert "bfloat16" in fit(dtype="bfloat16")
    assert "strategy" in fit(strategy=mirrored)


def test_fused_true_raises_where_it_cannot_be_met(fused_library):
    x, y = regression_data()
    model = regression_model()
    model.compile(optimizer=NLCG(0.1, fused=True), loss="mse", jit_compile=True)
    with pytest.raises(RuntimeError, match=r"fused=True.*jit_compile=False"):
        model.fit(x, y, verbose=0)


UNUSABLE = """
import pathlib, sys, warnings
from trainers.engine.imports import import_tensorflow
import_tensorflow()
import keras, tensorflow as tf
import nlcg_tf
from nlcg_tf.fused import nlcg_update

def apply(fused):
    variable = keras.Variable([1.0])
    optimizer = nlcg_tf.NLCG(0.1, "fletcher_reeves", fused=fused)
    for _ in range(3):
        optimizer.apply([tf.constant([1.0])], [variable])
    return variable.numpy()[0]

for path in map(pathlib.Path, sys.argv[1:]):
    nlcg_update.LIBRARY = path
    for cached in (nlcg_update._load, nlcg_update._recorded, nlcg_update._warn_once):
        cached.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert apply("auto") < 1
    (text,) = [str(w.message) for w in seen if "NLCG" in str(w.message)]
    info = nlcg_tf.fused.build_info()
    assert not info["available"] and info["reason"] in text
    try:
        apply(True)
    except RuntimeError as error:
        print(path.name, text, error, sep=": ")
"""


def test_an_unusable_library_falls_back_with_one_warning(tmp_path, fused_library):
    """In a process of its own, whose library is replaced: Python loads one only once."""
    original = nlcg_update.LIBRARY.read_bytes()
    version = b'"' + tf.__version__.encode() + b'"'
    assert original.count(b'"tensorflow": ' + version) == 1
    digest = nlcg_update._recorded()["sources"].encode()
    record = original[original.find(b"nlcg_build_info") :]
    libraries = {
        "another": original.replace(version, b'"1.23.4"'),
        "sources": original.replace(digest, digest[::-1]),
        "damaged": b"no library, but with the record of one\0" + record,
    }
    for name, content in libraries.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in ("missing", *libraries)]
    result = run([*PYTHON, "-c", UNUSABLE, *paths])
    assert result.returncode == 0, result.stderr
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert set(said) == {"missing", *libraries}
    assert all(line.count("python -m nlcg_tf.fused.build") == 2 for line in said.values())
    assert "is not built" in said["missing"] and "cannot be loaded" in said["damaged"]
    assert f"built for TensorFlow 1.23.4, found {tf.__version__}" in said["another"]
    assert "built from other sources" in said["sources"]


def test_build_info_tells_what_was_built(fused_library):
    info = fused.build_info()
    assert fused.is_available() and info["available"] and info["reason"] is None
    assert info["tensorflow"] == tf.__version__
    assert "-O3" in info["flags"] and isinstance(info["cuda"], bool)
    assert pathlib.Path(info["library"]).is_file()


def test_a_change_in_any_source_shows_in_the_digest():
    from nlcg_tf.fused import build

    sources = [p.name for p in build.HERE.iterdir() if p.suffix in (".h", ".cc", ".cu")]
    assert sorted(build.SOURCES) == sorted([*sources, "build.py"])


def test_a_compiler_that_fails_is_reported(tmp_path):
    from nlcg_tf.fused.build import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(RuntimeError, match=r"no-such-compiler.*install g\+\+"):
            build(tmp_path)
        patch.setenv("CXX", shutil.which("false"))
        patch.setenv("NLCG_CUDA", "0")
        with pytest.raises(RuntimeError, match="false"):
            build(tmp_path)
        patch.setenv("NLCG_CUDA", "yes")
        with pytest.raises(RuntimeError, match="NLCG_CUDA='yes'"):
            build(tmp_path)
    assert not list(tmp_path.iterdir())

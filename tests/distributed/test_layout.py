"""How variables are divided among workers: nothing is lost, nothing is kept twice."""

import keras
import numpy as np
import pytest

from tests.support.launch import needs_horovod

pytestmark = needs_horovod
SHAPES = [(3, 4), (), (7,), (1, 2, 2)]  # 24 elements


@pytest.mark.parametrize("workers", [1, 2, 5, 7, 24, 100])
def test_the_parts_of_all_workers_are_the_whole(workers):
    from nlcg_tf.horovod.layout import divide

    rng = np.random.default_rng(workers)
    variables = [keras.Variable(rng.normal(size=shape)) for shape in SHAPES]
    parts = []
    for rank in range(workers):
        (layout,) = divide(variables, lambda v: True, False, workers, rank)
        vector = layout.flatten([v.value for v in variables])
        part = layout.own_shard([v.value for v in variables])
        begin, end = layout.range()
        np.testing.assert_array_equal(part, vector[begin:end])
        parts.append(part)
        assert layout.lengths[rank] == part.shape[0]
    assert {x.shape[0] for x in parts} <= {24 // workers, -(-24 // workers)}
    np.testing.assert_array_equal(np.concatenate(parts), vector)
    for value, variable in zip(layout.restore(vector), variables):
        np.testing.assert_array_equal(value, variable.numpy())


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_whole_variables_have_one_owner_each(workers):
    """In order, so that another number of workers divides the same vector."""
    from nlcg_tf.horovod.layout import divide

    variables = [keras.Variable(np.full(shape, i)) for i, shape in enumerate(SHAPES)]
    values, shapes = [], []
    for rank in range(workers):
        (layout,) = divide(variables, lambda v: True, True, workers, rank)
        part = layout.own_shard([v.value for v in variables])
        assert layout.lengths[rank] == part.shape[0] == sum(map(np.prod, layout.own_shapes))
        values.append(part)
        shapes += layout.own_shapes
    assert shapes == SHAPES
    vector = layout.flatten([v.value for v in variables])
    np.testing.assert_array_equal(np.concatenate(values), vector)


def test_polar_factors_go_to_the_least_loaded():
    from nlcg_tf.horovod.factors import owners

    small = [(10, 10)] * 6
    assert owners([*small, (100, 20), (20, 100)], 2) == [0, 1, 0, 1, 0, 1, 0, 1]
    # The one large matrix is a worker's own; the small ones are the other's.
    assert owners([*small, (100, 50)], 2) == [1] * 6 + [0]
    assert owners([], 3) == [] and owners([(5, 5)], 3) == [0]


def test_kinds_of_variables_are_divided_apart():
    from nlcg_tf.horovod.layout import divide

    names = ["a", "bias", "c", "bias2"]
    variables = [
        keras.Variable(np.ones(3), dtype=dtype, name=name)
        for name, dtype in zip(names, ["float32", "float32", "float64", "float32"])
    ]
    layouts = divide(variables, lambda v: "bias" not in v.name, False, 2, 1)
    found = {layout.indices: (layout.dtype, layout.decays, layout.range()) for layout in layouts}
    assert found == {
        (0,): ("float32", True, (1, 3)),
        (1, 3): ("float32", False, (3, 6)),
        (2,): ("float64", True, (1, 3)),
    }


def test_parts_of_very_long_vectors():
    from nlcg_tf.horovod.collectives import lengths_of_parts

    lengths = lengths_of_parts(10**10, 1000)
    assert sum(lengths) == 10**10 and set(lengths) == {10**7}


def test_long_vectors_are_several(monkeypatch):
    """Memory is given back to the system beyond some length."""
    from nlcg_tf.horovod import layout

    monkeypatch.setattr(layout, "LONGEST", 10)
    variables = [keras.Variable(np.ones(n)) for n in (4, 6, 1, 30, 2)]
    found = layout.divide(variables, lambda v: True, False, 2, 0)
    assert [x.indices for x in found] == [(0, 1), (2,), (3,), (4,)]

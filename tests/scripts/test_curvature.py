"""The curvature study: exact solutions, derivatives, resuming, and what the table says."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from scripts.curvature import ablation, problems, report, statistics, study
from scripts.curvature import training as trainings

STEP = 1e-4


def central(function, x, step=STEP):
    """First and second derivative by central differences."""
    below, at, above = function(x - step), function(x), function(x + step)
    return (above - below) / (2 * step), (above - 2 * at + below) / step**2


def test_the_burgers_reference_satisfies_the_equation():
    # It is what the networks are measured against; nothing else here would see a wrong one.
    x, t = np.meshgrid(np.linspace(-0.98, 0.98, 50), [0.1, 0.3, 0.5, 0.9])
    u = problems.burgers_solution(x, t)
    u_x, u_xx = central(lambda x: problems.burgers_solution(x, t), x)
    u_t, _ = central(lambda t: problems.burgers_solution(x, t), t)
    # At the front, near x = 0, the terms reach some hundreds.
    size = np.abs(u_t) + np.abs(u * u_x) + 1
    np.testing.assert_allclose((u_t + u * u_x - 0.01 / np.pi * u_xx) / size, 0, atol=2e-4)


def test_the_burgers_reference_meets_the_start_and_the_sides():
    x, t = np.linspace(-1, 1, 41), np.linspace(0, 1, 11)
    np.testing.assert_allclose(problems.burgers_solution(x, 0), -np.sin(np.pi * x), atol=1e-14)
    np.testing.assert_allclose(problems.burgers_solution(-1, t), 0, atol=1e-12)
    np.testing.assert_allclose(problems.burgers_solution(1, t), 0, atol=1e-12)


def test_the_burgers_quadrature_has_enough_nodes():
    # The front is the hard place: few nodes miss it.
    x, t = np.meshgrid(np.linspace(-1, 1, 401), np.linspace(0, 1, 21))
    fewer = problems.burgers_solution(x, t, nodes=90)
    np.testing.assert_allclose(problems.burgers_solution(x, t), fewer, atol=1e-6)


def test_the_poisson_solution_satisfies_the_equation():
    x = np.linspace(-1, 1, 101)
    _, second = central(lambda x: problems.poisson_solution(x)[0], x)
    np.testing.assert_allclose(second, problems.poisson_solution(x)[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(problems.poisson_solution(np.array([-1, 1]))[0], 0, atol=1e-14)


def test_derivatives_agree_with_nested_tapes():
    # All of the PINN losses are made of them; nested tapes share no formula with them.
    model = problems.multilayer_perceptron((2, 8, 8, 1))
    for weight in model.trainable_variables:
        weight.assign(keras.random.normal(weight.shape, stddev=0.7))
    points = tf.constant(np.random.default_rng(0).uniform(-1, 1, (20, 2)), tf.float32)
    with tf.GradientTape() as outer:
        outer.watch(points)
        with tf.GradientTape() as inner:
            inner.watch(points)
            u = model(points)
        first = inner.gradient(u, points)
        u_x = first[:, :1]
    second = outer.gradient(u_x, points)[:, :1]
    value, firsts, u_xx = problems.derivatives(model, points)
    np.testing.assert_allclose(value, u, atol=1e-5)
    np.testing.assert_allclose(tf.concat(firsts, axis=1), first, atol=1e-5)
    np.testing.assert_allclose(u_xx, second, atol=1e-4)


def test_the_burgers_residual_of_a_known_function():
    # One neuron makes u = 2 tanh(3 x - t + 0.5), whose residual can be written down.
    model = problems.multilayer_perceptron((2, 1, 1))
    model.set_weights([np.array(w) for w in ([[3.0], [-1.0]], [0.5], [[2.0]], [0.0])])
    points = np.random.default_rng(0).uniform(-1, 1, (30, 2)).astype(np.float32)

    def u(x, t):
        return 2 * np.tanh(3 * x - t + 0.5)

    x, t = points.astype(np.float64).T
    u_x, u_xx = central(lambda x: u(x, t), x)
    u_t, _ = central(lambda t: u(x, t), t)
    residual = problems.burgers_residual(model, tf.constant(points))[:, 0]
    np.testing.assert_allclose(residual, u_t + u(x, t) * u_x - 0.01 / np.pi * u_xx, atol=1e-4)


def test_the_adding_problem_by_its_definition(rng):
    sequences, sums = problems.adding_data(50, 20, rng)
    numbers, marks = sequences[..., 0], sequences[..., 1]
    assert (marks[:, :10].sum(1) == 1).all() and (marks[:, 10:].sum(1) == 1).all()
    expected = [n[m == 1].sum() for n, m in zip(numbers, marks)]
    np.testing.assert_allclose(sums[:, 0], expected, rtol=1e-6)


def test_the_autoencoder_loss_cannot_fall_below_its_floor():
    # A network that returned its input would have exactly this loss.
    problem = problems.autoencoder()
    pixels = problem.data[0].astype(np.float64)
    inner = np.clip(pixels, 1e-12, 1 - 1e-12)
    perfect = problem.loss(lambda x, training: np.log(inner / (1 - inner)), pixels)
    assert problem.floor == pytest.approx(float(perfect), abs=1e-9)


@pytest.mark.parametrize("name", ["nlcg_pr", "adam"])
def test_updates_in_a_graph_are_those_of_single_steps(name):
    # One graph does many updates: their order, and that a run leaves nothing behind for the next.
    problem = problems.PROBLEMS["autoencoder_256"]()
    training = trainings.make_training(problem, name, updates=20)
    rate = 0.01
    training.run(10 * rate, seed=2)
    curve = training.run(rate, seed=1)

    model = problem.make_model()
    model.set_weights(training.initial_weights(1))
    optimizer = ablation.make_optimizer(name)
    optimizer.learning_rate = rate
    for indices in training.epochs(1):
        with tf.GradientTape() as tape:
            loss = problem.loss(model, problem.data[0][indices])
            loss = optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
    assert curve[-1][0] == 20
    assert curve[-1][2] == pytest.approx(float(problem.loss(model, *problem.data)), rel=1e-3)


def test_lbfgs_counts_gradient_evaluations():
    training = trainings.make_training(problems.PROBLEMS["poisson"](), "lbfgs", updates=60)
    updates, _, losses = zip(*training.run(None, seed=1))
    assert updates[0] == 0 and updates[-1] <= 60 and list(updates) == sorted(set(updates))
    assert list(losses) == sorted(losses, reverse=True)
    # The weights that are left are those of the last point.
    assert float(training.loss()) == pytest.approx(losses[-1], rel=1e-4)


def record(loss, rate=0.1, seed=1, optimizer="adam", curve=((0, 0.0, 8.0), (10, 0.5, 4.0))):
    updates, seconds, losses = map(list, zip(*curve))
    finite = loss is not None
    return {
        "problem": "poisson",
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
        "updates": 10,
        "diverged": not finite or loss > losses[0],
        "final_loss": loss,
        "error": 0.25 if finite else None,
        "seconds": seconds[-1],
        "diagnostics": {},
        "curve": {"updates": updates, "seconds": seconds, "loss": losses},
    }


def test_the_best_rate_has_the_lowest_loss_and_did_not_diverge():
    search = [record(loss, rate) for rate, loss in ((0.1, 3.0), (1.0, 2.0), (10.0, None))]
    assert statistics.best_rate(search) == 1.0
    assert statistics.best_rate([record(9.0, 0.1), record(None, 1.0)]) == 0.1
    # The best run may be of a rate that fails with the other seed.
    search += [record(loss, rate, seed=0) for rate, loss in ((0.1, 4.0), (1.0, 9.0), (10.0, 1.0))]
    assert statistics.best_rate(search) == 0.1
    assert [r["final_loss"] for r in statistics.worst_runs(search)] == [4.0, 9.0, None]


@pytest.mark.parametrize(
    "losses, expected",
    [
        ((5.0, 2.1, 2.0, 2.2, 9.0), (0.1, 10, False)),
        ((2.1, 5.0, 2.0, 2.3, None), (1, 1, False)),  # neighbours only
        ((9.0, 8.5, None, 8.4, 9.0), (10, 10, False)),  # diverged: above the initial 8
        ((5.0, 4.0, 3.0, 2.1, 2.0), (10, 100, True)),
    ],
)
def test_the_range_of_rates(losses, expected):
    rates = (0.01, 0.1, 1, 10, 100)
    assert statistics.rate_range([record(*pair) for pair in zip(losses, rates)]) == expected


def test_the_target_and_when_it_is_reached():
    runs = [record(loss, seed=seed) for seed, loss in enumerate((3.0, 1.0, None, 2.0, 5.0))]
    assert statistics.target_loss({"adam": ([], runs)}) == 3.0
    assert statistics.target_loss({"momentum": ([], runs)}) is None
    curve = ((0, 0.0, 8.0), (10, 0.5, 4.0), (20, 1.0, 2.0), (30, 1.5, None))
    assert statistics.first_reach(record(None, curve=curve), 3.0) == (20, 1.0)
    assert statistics.first_reach(record(None, curve=curve), 1.0) == (math.inf, math.inf)


def test_a_diverged_run_stays_in_the_median():
    assert statistics.quartiles([1.0, math.inf, 2.0, math.inf, math.inf]) == [
        2.0,
        math.inf,
        math.inf,
    ]
    assert statistics.quartiles([2.0, 1.0]) == [1.0, 2.0, 2.0]
    curve = ((0, 0.0, 8.0), (10, 0.5, None))
    values = statistics.resample(record(None, curve=curve), "updates", [0, 9, 10, 40])
    assert values.tolist() == [8.0, 8.0, math.inf, math.inf]


def test_the_table(tmp_path):
    search = [record(loss, rate, seed=0) for rate, loss in ((0.1, 4.0), (1.0, None))]
    runs = [record(loss, seed=seed) for seed, loss in ((2, 4.0), (3, 4.5), (4, None))]
    for i, run in enumerate(runs):
        run["diagnostics"] = {"cosine": 0.1 * i}
    made = {"processor": "a", "cores": 2, "revision": "b", "command": "c"}
    text = report.table([*search, *runs], made)
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    # Updates, seconds: all three curves reach the target of 4.5 at their second point.
    assert cells[:2] == ["Adam", "0.1*"] and "target loss 4.5" in text
    assert cells[2] == "4.5 (4 to ∞)" and cells[4] == "10" and cells[6] == "3/3"
    assert cells[7:9] == ["10", "0.5"] and cells[-4:] == ["≥ 1", "1/2", "1/3", "0.1"]
    others = [record(loss, seed=seed, optimizer="nlcg") for seed, loss in ((2, 2.0), (3, 3.0))]
    report.write_report(tmp_path, [*search, *runs, *others], made)
    assert (tmp_path / "loss_updates.svg").stat().st_size > 1000
    assert (tmp_path / "win_loss.png").stat().st_size > 1000


@pytest.mark.parametrize("optimizer", sorted(set(ablation.KNOWN) - {"lbfgs"}))
def test_all_optimizers_get_as_many_rates_as_far_apart(optimizer):
    rates = study.learning_rates(optimizer, 5)
    assert len(rates) == 5
    np.testing.assert_allclose(np.diff(np.log10(rates)), 0.5, atol=0.03)


def test_each_variant_changes_its_mechanism():
    # Losses that follow from the gradients, but not quite; the last gradient calls for clipping.
    gradients = [[1.0, -2.0, 0.5], [0.9, -1.6, 0.6], [0.5, -1.7, 0.1], [40.0, 30.0, -20.0]]
    losses = [3.0, 2.97, 2.95, 2.9]

    def trained(name):
        w = keras.Variable([1.0, 2.0, 3.0])
        with ablation.changed(name):
            optimizer = ablation.make_optimizer(name)
            for loss, gradient in zip(losses, gradients):
                optimizer.observe_loss(loss)
                optimizer.apply([tf.constant(gradient)], [w])
        return w.numpy(), optimizer.diagnostics()

    w, figures = trained("default")
    assert 0 < figures["gain_ratio"] < 1
    np.testing.assert_array_equal(trained("default")[0], w)
    others = {name: trained(name) for name in ablation.ABLATION if name != "default"}
    for name, (other, _) in others.items():
        assert not np.allclose(other, w, rtol=1e-6), name
    assert figures["beta"] != pytest.approx(0.9)
    assert others["beta_constant"][1]["beta"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    "argument, name",
    [
        ("--jobs=0", "--jobs"),
        ("--updates-factor=nan", "--updates-factor"),
        ("--seeds=-1", "-1"),
        ("--problems adding --optimizers lbfgs", "full batches: autoencoder"),
    ],
)
def test_bad_arguments(argument, name, capsys):
    with pytest.raises(SystemExit):
        study.parsed_options(argument.split())
    assert name in capsys.readouterr().err


def test_a_half_line_is_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    log, records = study.open_log(path)
    with log:
        assert records == [{"a": 1}, {"a": 2}]
        log.write('{"a": 3}\n')
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_killed_study_goes_on(tmp_path):
    path = tmp_path / "runs.jsonl"
    arguments = [f"--folder={tmp_path}", "--problems", "poisson", "--optimizers", "nlcg_fr"]
    arguments += ["--jobs=1", "--rates=2", "--seeds=2", "--updates-factor=0.01"]

    def start():
        command = [sys.executable, "-m", "scripts.curvature", *arguments]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    process = start()
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text()
    assert before.count("\n") < 6 and not (tmp_path / "table.md").exists()
    assert start().wait() == 0
    after = path.read_text()
    # The bytes of finished runs stay, each run is there once, and the study is complete.
    assert after.startswith(before[: before.rindex("\n") + 1])
    records = [json.loads(line) for line in after.splitlines()]
    runs = [(r["rate"], r["seed"]) for r in records]
    assert len(runs) == len(set(runs)) == 6
    # A run does not depend on what its process did before. Not to the bit: where an array lies in
    # memory decides the order of some sums.
    again = study.missing_runs("poisson", "nlcg_fr", records[0]["updates"], 2, 2, {})
    early = {(r["rate"], r["seed"]): r["curve"]["loss"][:10] for r in again}
    for r in records:
        assert r["curve"]["loss"][:10] == pytest.approx(early[r["rate"], r["seed"]], rel=1e-3)
    table = (tmp_path / "table.md").read_text()
    # Nothing to do: the same table.
    study.main(arguments)
    assert path.read_text() == after and (tmp_path / "table.md").read_text() == table

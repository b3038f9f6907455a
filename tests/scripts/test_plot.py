"""Tables and figures of hand-made run folders."""

import json
import shutil

import pandas as pd
import pytest

from scripts.plot import __main__ as plot
from scripts.plot import figures, tables
from scripts.shared import runs as run_reader
from scripts.shared.style import styles


def make_run(folder, name, top1, averaged=None, loss=0.5, optimizer="momentum", **flags):
    flags = {"optimizer": optimizer, "global_batch_size": 128, "epochs": 10, "seed": 0, **flags}
    path = folder / name
    path.mkdir(parents=True)
    (path / "flags.json").write_text(json.dumps({"flags": flags, "git_revision": "abc"}))
    if top1 is not None:
        summary = {"top1": top1, "averaged_top1": averaged or top1}
        summary.update(loss=loss, test_loss=loss)
        (path / "summary.json").write_text(json.dumps(summary))
    batch, lines = flags["global_batch_size"], []
    for update in range(1, 21):
        step = {"type": "step", "epoch": 1, "update": update, "learning_rate": 0.1}
        step["loss"] = None if loss is None and update > 5 else 1 / update
        if optimizer == "nlcg":
            step.update(step_size=0.2, beta=0.1, learning_rate_scale=2.0, cosine=0.9)
        lines.append(step)
        if update % 10 == 0:
            epoch = {"type": "epoch", "epoch": update // 10, "update": update}
            lines.append({**epoch, "images_per_second": 10 * batch * update / 10})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"type": "st')
    return path


@pytest.fixture
def run_folders(tmp_path):
    """Momentum: two seeds and a search, factor 4 is best; NLCG: one seed and one diverged."""
    for seed, top1 in enumerate((0.5, 0.7)):
        make_run(tmp_path, f"m-{seed}", top1, 0.8, seed=seed)
    for seed, top1 in enumerate((0.9, 0.6, 0.6)):
        make_run(tmp_path, f"m-4-{seed}", top1, seed=seed, learning_rate_factor=4.0)
    make_run(tmp_path, "m-peak", 0.3, learning_rate_factor=1.0, peak_learning_rate=0.03)
    half = make_run(tmp_path, "m-0.25", None, learning_rate_factor=0.25)
    (half / "summary.json").write_text('{"top1": 0.')  # killed, or read meanwhile
    make_run(tmp_path, "n", 0.75, optimizer="nlcg", update_rule="polak_ribiere")
    make_run(tmp_path, "n-1", 0.1, optimizer="nlcg", update_rule="polak_ribiere", loss=None, seed=1)
    make_run(tmp_path, "deep/s", 0.1, optimizer="sgd", loss=None, global_batch_size=2048)
    return tmp_path


def test_tables_of_hand_made_runs(run_folders):
    runs = run_reader.read_runs([run_folders])
    text = tables.table(runs)
    rows = [
        "## 10 epochs, one schedule for all: weights",
        "| global batch | NLCG-PR | Momentum | SGD |",
        "| 128 | 75.0 (n = 1), 1 diverged | 60.0 ± 14.1 (n = 2) |  |",
        "| 2,048 |  |  | no result, 1 diverged |",
        "| 128 | 75.0 (n = 1), 1 diverged | 80.0 ± 0.0 (n = 2) |  |",
        "Rates: factor 0.25, factor 1, factor 4, peak 0.03.",
        "| 128 | 75.0 (n = 1), factor 1, 1 diverged | 70.0 ± 17.3 (n = 3), factor 4 |  |",
        "| n-1 | diverged |  |",
        "| m-0.25 | unfinished |  |",
        "Revisions of the code: abc.",
    ]
    places = [text.find(row) for row in rows]
    assert -1 not in places and places == sorted(places), text
    assert list(runs["git_revision"].unique()) == ["abc"]
    run_reader.write_csv(runs, run_folders / "runs.csv")
    assert tables.table(run_reader.read_runs([run_folders / "runs.csv"])) == text
    # Runs that differ in anything else must not be averaged.
    make_run(run_folders, "deep/m", 0.9, depth=56, seed=2)
    make_run(run_folders, "deep/m2", 0.8, depth=20, seed=2)
    found = set(run_reader.read_runs([run_folders / "deep"])["optimizer"])
    assert found == {"Momentum depth=20", "Momentum depth=56", "SGD"}
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        run_reader.read_runs(["nowhere"])
    (run_folders / "other.csv").write_text("run,seed\n")
    with pytest.raises(ValueError, match=r"other.csv is not of runs: it has no column averaged"):
        run_reader.read_runs([run_folders, run_folders / "other.csv"])
    for column, wrong in {"status": "done", "top1": "high", "global_batch_size": "128x"}.items():
        run_reader.write_csv(runs.assign(**{column: wrong}), run_folders / "other.csv")
        with pytest.raises(ValueError, match=rf"other.csv: {column} must be .*Received: {wrong}$"):
            run_reader.read_runs([run_folders / "other.csv"])


def test_what_two_sweeps_share_counts_once(tmp_path):
    for name, top1 in (("a/0", None), ("b/0", 0.5), ("c/0", 0.5)):
        make_run(tmp_path, name, top1, learning_rate_factor=0.5, weight_decay="1e-4")
    make_run(tmp_path, "a/1", 0.7, seed=1, learning_rate_factor=0.5, weight_decay=0.0001)
    runs = tables.count_once(run_reader.read_runs([tmp_path]))
    text = tables.table(runs)
    # Without a run at the schedule's own rate there is a table, too.
    assert "## 10 epochs, one schedule for all, factor 0.5: weights" in text
    assert "| global batch | Momentum |" in text and "| 128 | 60.0 ± 14.1 (n = 2) |" in text
    assert "unfinished" not in text
    # Whatever was wrong with them, failed runs are not dropped.
    for name in ("x", "y"):
        failed = make_run(tmp_path / "bad", name, None, seed=name, learning_rate_factor=name)
        (failed / run_reader.FAILED_FILE).write_text('{"exit_status": 1}')
    runs = tables.count_once(run_reader.read_runs([tmp_path / "bad"]))
    assert "| x | failed | 1 |\n| y | failed | 1 |" in tables.table(runs)


def test_odd_runs_spoil_nothing(tmp_path, monkeypatch):
    late = make_run(tmp_path, "late", 0.1, optimizer="sgd")
    # The last update made the weights NaN: the loss of the last epoch is from before.
    (late / "summary.json").write_text('{"top1": 0.0, "loss": 2.0, "test_loss": null}')
    seed = make_run(tmp_path, "seed", None, optimizer="lars", seed="x")
    (seed / run_reader.FAILED_FILE).write_text('{"exit_status": 1}')
    for factor in (1.0, 4.0):
        make_run(tmp_path, f"long-{factor}", 0.9, epochs=20, learning_rate_factor=factor)
    runs = run_reader.read_runs([tmp_path])
    text = tables.table(runs)
    assert "| 128 | no result, 1 failed | no result, 1 diverged |" in text
    assert "| 128 | 90.0 (n = 1), factor 1 |" in text
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, axes, *names: drawn.extend(axes))
    make_run(tmp_path, "large", 0.5, global_batch_size=256)
    make_run(tmp_path, "large-long", 0.95, global_batch_size=256, epochs=20)
    summary = tables.summarise(run_reader.read_runs([tmp_path]))
    look = styles(list(summary["optimizer"].unique()))
    figures.draw_accuracy_batch(summary, look, tmp_path, "a", "")
    # The first panel holds runs without a result, the second the highest accuracy.
    assert len(drawn) == 2 and drawn[1].get_ylim()[1] > 95


def test_another_programs_files_are_passed_over(run_folders, tmp_path):
    others = dict(zip("abcd", ("[1]", "null", '{"flags": null}', "\xff")))
    for name, foreign in others.items():
        (run_folders / name).mkdir()
        (run_folders / name / "flags.json").write_text(foreign, encoding="latin-1")
    text = '{"flags": {"optimizer": null, "epochs": null, "seed": [1]}}'
    (make_run(run_folders, "empty", 0.5) / "flags.json").write_text(text)
    (make_run(run_folders, "text", 0.5, seed=7) / "summary.json").write_text('{"loss": "low"}')
    (run_folders / "a" / "sweep.json").write_text('{"name": "other", "b": {"flags": 1}}')
    lines = '[1]\n{"loss": 1}\n{"type": "step", "update": "a"}\n{"type": "epoch", "update": 1}\n'
    (make_run(run_folders, "lines", 0.5, optimizer="sgd") / "metrics.jsonl").write_text(lines)
    out = tmp_path / "out"
    out.mkdir()
    plot.draw_runs([run_folders], out)
    found = list(pd.read_csv(out / "runs.csv")["run"])
    assert not others.keys() & set(found) and {"empty", "text", "lines"} <= set(found)


def test_seconds_follow_from_the_throughput_of_the_epochs(run_folders):
    steps, _ = run_reader.read_metrics(run_folders / "m-0", 128)
    assert len(steps) == 20
    assert steps["seconds"].to_numpy() == pytest.approx(
        [0.1 * update for update in range(1, 11)] + [1 + 0.05 * update for update in range(1, 11)]
    )


def test_figures_are_written(run_folders, tmp_path):
    make_run(run_folders, "long", 0.8, epochs=20)
    make_run(run_folders, "n-long", 0.85, epochs=20, optimizer="nlcg")
    make_run(run_folders, "large", 0.6, global_batch_size=2048)
    out = tmp_path / "out"
    out.mkdir()
    plot.draw_runs([run_folders], out)
    expected = {"accuracy_batch", "accuracy_batch_tuned", "accuracy_epochs", "loss_step"}
    expected |= {"loss_seconds", "learning_rate", "diagnostics"}
    for suffix in ("png", "svg"):
        assert {file.stem for file in out.glob(f"*.{suffix}")} == expected
    assert len(pd.read_csv(out / "runs.csv")) == 13
    # One batch size, several lengths: no figure against the batch size.
    for name in ("large", "deep"):
        shutil.rmtree(run_folders / name)
    shutil.rmtree(out)
    out.mkdir()
    plot.draw_runs([run_folders], out)
    expected -= {"accuracy_batch", "accuracy_batch_tuned"}
    assert {file.stem for file in out.glob("*.png")} == expected
    plot.draw_schedule(65536, [90, 150], out)
    assert (out / "schedule_65536.png").stat().st_size > 10000

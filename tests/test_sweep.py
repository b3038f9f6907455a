"""Sweeps: their definition, how runs that are killed, fail or diverge end, and what is drawn."""

import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import yaml
from distributed.launch import ROOT, environment, records, run, wait_for

from scripts import figures, plot, result_tables, results, sweep_definition
from trainers.optimizers import NAMES

SWEEP = [sys.executable, "-m", "scripts.sweep"]
CORES = min(2, len(os.sched_getaffinity(0)))
DEFINITION = {
    "flags": {"dataset": "digits", "epochs": 10},
    "optimizers": {
        "NLCG-FR": {
            "optimizer": "nlcg",
            "update_rule": "fletcher_reeves",
            "preconditioner": "bfgs",
            "nesterov": False,
        },
        "Momentum": {"optimizer": "momentum"},
    },
    "grid": [
        {"global_batch_size": [128, 512], "seed": [0, 1]},
        {"global_batch_size": 128, "learning_rate_factor": [0.25, 4], "seed": 0},
    ],
}

# In place of the trainer, where the trainer's own work does not matter. The flag `optimizer` says
# how it ends.
STUB = """
import json, os, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--"))
folder, kind = pathlib.Path(flags["output_dir"]), flags["optimizer"]
(folder / "flags.json").write_text(json.dumps({"flags": flags}))
(folder / "cores").write_text(json.dumps([sorted(os.sched_getaffinity(0)), os.getpid()]))
if kind == "failing":
    print("this is why"), sys.exit(3)
if kind == "killed":  # as Linux does when memory runs out
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "slow" and not (folder / "saved").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
    (folder / "ready").touch()
    time.sleep(60)
summary = {"loss": None if kind == "diverged" else 0.5, "test_loss": 0.5, "top1": 0.25}
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "summary.json").write_text(json.dumps(summary))
"""


def names(definition, extra=None):
    return list(sweep_definition.expand(definition, extra))


def write(folder, definition):
    path = folder / "definition.yaml"
    path.write_text(yaml.safe_dump(definition, sort_keys=False))
    return f"--config={path}"


def stub_definition(folder, *kinds):
    stub = folder / "stub.py"
    stub.write_text(STUB)
    return {
        "launcher": [sys.executable, str(stub)],
        "flags": {"global_batch_size": 128, "epochs": 1},
        "optimizers": {kind: {"optimizer": kind} for kind in kinds},
        "grid": [{"seed": 0}],
    }


def statuses(folder):
    return dict(pd.read_csv(folder / "runs.csv")[["run", "status"]].to_numpy())


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_definition_gives_every_combination_a_readable_name():
    runs = sweep_definition.expand(DEFINITION, {"data_dir": "/data"})
    assert list(runs) == [
        "NLCG-FR-128-e10-s0",
        "Momentum-128-e10-s0",
        "NLCG-FR-128-e10-s1",
        "Momentum-128-e10-s1",
        "NLCG-FR-512-e10-s0",
        "Momentum-512-e10-s0",
        "NLCG-FR-512-e10-s1",
        "Momentum-512-e10-s1",
        "NLCG-FR-128-e10-f0.25-s0",
        "Momentum-128-e10-f0.25-s0",
        "NLCG-FR-128-e10-f4-s0",
        "Momentum-128-e10-f4-s0",
    ]
    assert runs["NLCG-FR-128-e10-f0.25-s0"] == {
        "optimizer": "NLCG-FR",
        "trainer": "trainers.cifar",
        "launcher": [],
        "flags": {
            "dataset": "digits",
            "epochs": 10,
            "data_dir": "/data",
            "optimizer": "nlcg",
            "update_rule": "fletcher_reeves",
            "preconditioner": "bfgs",
            "nesterov": False,
            "global_batch_size": 128,
            "learning_rate_factor": 0.25,
            "seed": 0,
        },
    }
    merged = yaml.load(
        "a: &a {seed: 1, epochs: 2}\nx: {y: &b {<<: *a, seed: 3}}\nc: {<<: *b}",
        sweep_definition._StrictLoader,
    )
    assert merged["c"] == {"seed": 3, "epochs": 2}
    other = {**DEFINITION, "grid": [{"weight_decay": [1e-3, 5e-4]}]}
    assert names(other)[2] == "NLCG-FR-e10-weight_decay=0.0005"
    other = {**DEFINITION, "grid": [{"seed": [1, 2], "optimizers": ["Momentum"]}]}
    assert names(other) == ["Momentum-e10-s1", "Momentum-e10-s2"]


def test_one_line_gives_what_the_file_gives():
    line = sweep_definition.from_line(["nlcg_fr", "momentum"], [128, 512], [10], [0, 1], [])
    extra = sweep_definition.parse_flags(["--dataset=digits"])
    file = {**DEFINITION, "grid": DEFINITION["grid"][:1]}
    assert sweep_definition.expand(line, extra) == sweep_definition.expand(file)
    line = sweep_definition.from_line(["lars"], None, None, None, ["weight_decay=0.1,0.2"])
    assert names(line) == ["LARS-weight_decay=0.1", "LARS-weight_decay=0.2"]


def test_every_optimizer_of_the_trainers_has_a_name():
    assert {flags["optimizer"] for _, flags in results.OPTIMIZERS.values()} == set(NAMES)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimisers": {}}, "unknown key 'optimisers'"),
        ({"optimizers": {}}, "optimizers must not be empty. Received: {}"),
        ({"optimizers": ["nlcg"]}, r"optimizers must be a mapping. Received: \['nlcg'\]"),
        ({"optimizers": {"A": {"optimizer": ["nlcg"]}}}, "optimizers: A: optimizer must have one"),
        ({"grid": []}, r"grid must not be empty. Received: \[\]"),
        ({"grid": [{"seed": []}]}, r"grid\[0\]: seed must be .* Received: \[\]"),
        ({"grid": [{"seed": [None]}]}, r"grid\[0\]: seed must be .* Received: \[None\]"),
        ({"grid": [{"output_dir": "x"}]}, r"grid\[0\]: 'output_dir' is not a flag"),
        ({"grid": [{"seed": [0, 0]}]}, "two runs are named NLCG-FR-e10-s0"),
        ({"grid": [{"seed": 0}, {"seed": 0, "learning_rate_factor": 1}]}, "two runs are named"),
        ({"grid": [{"optimizers": "A"}]}, r"grid\[0\]: optimizers does not define A"),
        ({"optimizers": {"..": {}}, "flags": {}, "grid": [{}]}, "cannot have this name"),
        ({"grid": [{"optimizer": "sgd"}]}, "--optimizer stands in optimizers: NLCG-FR and in grid"),
        ({"flags": {"depth": {}}}, "flags: depth must have one value. Received: {}"),
        ({"launcher": "horovodrun"}, "launcher must be a list of words. Received: 'horovodrun'"),
        ({"trainer": "a b"}, "trainer must be a module"),
    ],
)
def test_a_bad_definition_is_an_error_that_names_key_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        sweep_definition.expand({**DEFINITION, **change})


def test_bad_words_and_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"--seed stands in grid.0. and in after --"):
        names(DEFINITION, {"seed": 3})
    with pytest.raises(ValueError, match="Received: digits"):
        sweep_definition.parse_flags(["digits"])
    with pytest.raises(ValueError, match="Received: seed=1"):
        sweep_definition.from_line(["nlcg"], None, None, [0], ["seed=1"])
    with pytest.raises(ValueError, match=r"Received: depth=.$"):
        sweep_definition.from_line(["nlcg"], None, None, [0], ["depth=["])
    file = tmp_path / "twice.yaml"
    file.write_text("optimizers:\n  A: {optimizer: nlcg}\n  A: {optimizer: sgd}\n")
    with pytest.raises(ValueError, match="'A' stands twice"):
        sweep_definition.from_file(file)
    done = run([*SWEEP, f"--folder={tmp_path / 'a'}", write(tmp_path, {**DEFINITION, "grid": []})])
    assert (done.returncode, done.stderr) == (2, "error: grid must not be empty. Received: []\n")
    assert not (tmp_path / "a").exists()


def test_a_run_that_has_begun_takes_what_the_trainer_takes(tmp_path):
    definition = {"optimizers": {"M": {"optimizer": "momentum"}}, "grid": [{"seed": 0}]}

    def save(**flags):
        sweep_definition.save(tmp_path, sweep_definition.expand({**definition, "flags": flags}))

    save(depth=8, evaluation_epochs=5)
    (tmp_path / "runs" / "M-s0").mkdir(parents=True)
    (tmp_path / "runs" / "M-s0" / "flags.json").write_text("{}")
    save(depth=8, evaluation_epochs=1, commit_steps=3, jit_compile=True)
    with pytest.raises(ValueError, match="--depth was 8, is 20"):
        save(depth=20, evaluation_epochs=1)


def test_failed_and_diverged_runs_are_recorded_and_the_others_run(tmp_path):
    folder = tmp_path / "sweep"
    config = write(tmp_path, stub_definition(tmp_path, "failing", "killed", "diverged", "well"))
    done = run([*SWEEP, f"--folder={folder}", config, f"--jobs={CORES}", "--discard-checkpoints"])
    expected = {
        "failing-128-e1-s0": "failed",
        "killed-128-e1-s0": "failed",
        "diverged-128-e1-s0": "diverged",
        "well-128-e1-s0": "finished",
    }
    assert statuses(folder) == expected and done.returncode == 1, done.stderr
    assert "failing-128-e1-s0: failed" in done.stdout and "    this is why" in done.stdout
    assert "1 finished, 1 diverged, 2 failed" in done.stdout
    assert not list(folder.glob("runs/*/checkpoints"))
    cores = [json.loads(file.read_text())[0] for file in folder.glob("runs/*/cores")]
    assert {len(part) for part in cores} == {len(os.sched_getaffinity(0)) // CORES}

    # Started again, nothing runs, until one asks for it.
    log = folder / "runs" / "failing-128-e1-s0" / "log.txt"
    again = run([*SWEEP, f"--folder={folder}"])
    assert again.returncode == 1 and log.read_text() == "this is why\n"
    run([*SWEEP, f"--folder={folder}", "--retry-failed"])
    assert statuses(folder) == expected and log.read_text() == "this is why\n" * 2

    # What cannot be run is not noted.
    known = (folder / "sweep.json").read_text()
    line = ["--optimizers", "adam", "--jobs=99"]
    done = run([*SWEEP, f"--folder={folder}", *line])
    assert done.returncode == 2 and "Received: 99" in done.stderr
    assert (folder / "sweep.json").read_text() == known

    # A run that has begun keeps its flags; others may join.
    line = ["--optimizers", "sgd", "--epochs", 2, "--", "--global_batch_size=128"]
    other = write(tmp_path, {**stub_definition(tmp_path, "well"), "flags": {"epochs": 1}})
    changed = [*SWEEP, f"--folder={folder}", other, "--", "--global_batch_size=128", "--depth=8"]
    done = run(changed)
    assert done.returncode == 2 and "well-128-e1-s0" in done.stderr
    assert "--depth was None, is 8" in done.stderr
    done = run([*SWEEP, f"--folder={folder}", f"--slurm={tmp_path / 'job.sh'}", *line])
    assert done.stdout.startswith("5 runs"), done.stderr


def test_sigterm_lets_the_runs_save_and_a_killed_sweep_leaves_none_behind(tmp_path):
    folder, ready = tmp_path / "sweep", tmp_path / "sweep" / "runs" / "slow-128-e1-s0" / "ready"
    config = write(tmp_path, stub_definition(tmp_path, "slow", "well"))
    command, log = [*SWEEP, f"--folder={folder}", config], tmp_path / "log"

    def until_ready():
        with log.open("a") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file
            )
        wait_for(ready.exists, process, log)
        return process

    process = until_ready()
    refused = run(command)
    assert refused.returncode == 2 and "another sweep is using" in refused.stderr
    process.kill()
    process.wait()
    child = json.loads((ready.parent / "cores").read_text())[1]
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)

    ready.unlink()
    process = until_ready()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert "stopped: the same command goes on" in log.read_text()
    assert set(statuses(folder).values()) == {"unfinished"}

    # The rest as a SLURM array would do it.
    script = tmp_path / "job.sh"
    run([*command, f"--slurm={script}"])
    assert "#SBATCH --array=0-1\n" in script.read_text()
    for index in (0, 1):
        done = run(["bash", script], SLURM_ARRAY_TASK_ID=str(index))
        assert done.returncode == 0, done.stderr
    assert set(statuses(folder).values()) == {"finished"}


def test_a_slurm_task_that_is_told_to_stop_goes_back_into_the_queue(tmp_path):
    folder = tmp_path / "sweep"
    config = write(tmp_path, stub_definition(tmp_path, "slow"))
    script, told = tmp_path / "job.sh", tmp_path / "told"
    run([*SWEEP, f"--folder={folder}", config, f"--slurm={script}"])
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {told}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", script],
            env=environment(SLURM_ARRAY_TASK_ID="0", **variables),
            stdout=file,
            stderr=file,
        )
    wait_for((folder / "runs" / "slow-128-e1-s0" / "ready").exists, process, log)
    process.terminate()
    assert process.wait() == 75, log.read_text()
    assert told.read_text() == "requeue 7\n"


def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    """With the real trainer, which goes on from its checkpoints."""
    flags = {"dataset": "digits", "depth": 8, "epochs": 3, "global_batch_size": 256, "seed": 0}
    flags.update(deterministic=True, log_steps=1, checkpoint_steps=2)
    definition = {"flags": flags, "optimizers": DEFINITION["optimizers"]}
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [*SWEEP, write(tmp_path, definition), f"--jobs={CORES}"]
    done = run([*command, f"--folder={undisturbed}"])
    assert done.returncode == 0, done.stdout + done.stderr

    # The other sweep has come to its second run when it is killed.
    first = pathlib.Path("runs", "Momentum-256-e3-s0")
    shutil.copytree(undisturbed / first, killed / first)
    command.append(f"--folder={killed}")
    run_folder, log = killed / "runs" / "NLCG-FR-256-e3-s0", tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
    wait_for(lambda: len(records(run_folder, "step")) >= 5, process, log)
    process.kill()
    process.wait()
    assert not (run_folder / "summary.json").exists()
    done = run(command)
    assert done.returncode == 0 and "2 runs, 1 done before" in done.stdout, done.stderr
    assert "resuming from" in (run_folder / "log.txt").read_text()

    tables = [results.read_runs([folder]) for folder in (killed, undisturbed)]
    assert list(tables[1]["status"]) == ["finished", "finished"]
    same = ["run", "optimizer", *results.SETTINGS, "status", *results.FIGURES[:8]]
    pd.testing.assert_frame_equal(
        tables[0][same], tables[1][same], check_exact=True, check_dtype=False
    )
    assert result_tables.table(tables[0]) == result_tables.table(tables[1])


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
    """Momentum: two seeds and a search in which 4 is best; NLCG: one seed and one diverged."""
    for seed, top1 in enumerate((0.5, 0.7)):
        make_run(tmp_path, f"m-{seed}", top1, 0.8, seed=seed)
    for seed, top1 in enumerate((0.9, 0.6, 0.6)):
        make_run(tmp_path, f"m-4-{seed}", top1, seed=seed, learning_rate_factor=4.0)
    half = make_run(tmp_path, "m-0.25", None, learning_rate_factor=0.25)
    (half / "summary.json").write_text('{"top1": 0.')  # killed, or read meanwhile
    make_run(tmp_path, "n", 0.75, optimizer="nlcg", update_rule="polak_ribiere")
    make_run(tmp_path, "n-1", 0.1, optimizer="nlcg", update_rule="polak_ribiere", loss=None, seed=1)
    make_run(tmp_path, "deep/s", 0.1, optimizer="sgd", loss=None, global_batch_size=2048)
    return tmp_path


def test_tables_of_hand_made_runs(run_folders):
    runs = results.read_runs([run_folders])
    text = result_tables.table(runs)
    rows = [
        "## 10 epochs, one schedule for all: weights",
        "| global batch | NLCG-PR | Momentum | SGD |",
        "| 128 | 75.0 (n = 1), 1 diverged | 60.0 ± 14.1 (n = 2) |  |",
        "| 2,048 |  |  | no result, 1 diverged |",
        "| 128 | 75.0 (n = 1), 1 diverged | 80.0 ± 0.0 (n = 2) |  |",
        "Factors: 0.25, 1, 4.",
        "| 128 | 75.0 (n = 1), factor 1, 1 diverged | 70.0 ± 17.3 (n = 3), factor 4 |  |",
        "| n-1 | diverged |  |",
        "| m-0.25 | unfinished |  |",
        "Revisions of the code: abc.",
    ]
    places = [text.find(row) for row in rows]
    assert -1 not in places and places == sorted(places), text
    assert list(runs["git_revision"].unique()) == ["abc"]
    results.write_csv(runs, run_folders / "runs.csv")
    assert result_tables.table(results.read_runs([run_folders / "runs.csv"])) == text
    # Runs that differ in anything else must not be averaged.
    make_run(run_folders, "deep/m", 0.9, depth=56, seed=2)
    make_run(run_folders, "deep/m2", 0.8, depth=20, seed=2)
    found = set(results.read_runs([run_folders / "deep"])["optimizer"])
    assert found == {"Momentum depth=20", "Momentum depth=56", "SGD"}
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        results.read_runs(["nowhere"])
    (run_folders / "other.csv").write_text("run,seed\n")
    with pytest.raises(ValueError, match=r"other.csv is not of runs: it has no column averaged"):
        results.read_runs([run_folders, run_folders / "other.csv"])


def test_what_two_sweeps_share_counts_once(tmp_path):
    for name, top1 in (("a/0", None), ("b/0", 0.5), ("c/0", 0.5)):
        make_run(tmp_path, name, top1, learning_rate_factor=0.5, weight_decay="1e-4")
    make_run(tmp_path, "a/1", 0.7, seed=1, learning_rate_factor=0.5, weight_decay=0.0001)
    runs = result_tables.count_once(results.read_runs([tmp_path]))
    text = result_tables.table(runs)
    # Without a run at the schedule's own rate there is a table, too.
    assert "## 10 epochs, one schedule for all, its rate times 0.5: weights" in text
    assert "| global batch | Momentum |" in text and "| 128 | 60.0 ± 14.1 (n = 2) |" in text
    assert "unfinished" not in text
    # Whatever was wrong with them, failed runs are not dropped.
    for name in ("x", "y"):
        failed = make_run(tmp_path / "bad", name, None, seed=name, learning_rate_factor=name)
        (failed / results.FAILED_FILE).write_text('{"exit_status": 1}')
    runs = result_tables.count_once(results.read_runs([tmp_path / "bad"]))
    assert "| x | failed | 1 |\n| y | failed | 1 |" in result_tables.table(runs)


def test_odd_runs_spoil_nothing(tmp_path, monkeypatch):
    late = make_run(tmp_path, "late", 0.1, optimizer="sgd")
    # The last update made the weights NaN: the loss of the last epoch is from before.
    (late / "summary.json").write_text('{"top1": 0.0, "loss": 2.0, "test_loss": null}')
    seed = make_run(tmp_path, "seed", None, optimizer="lars", seed="x")
    (seed / results.FAILED_FILE).write_text('{"exit_status": 1}')
    for factor in (1.0, 4.0):
        make_run(tmp_path, f"long-{factor}", 0.9, epochs=20, learning_rate_factor=factor)
    runs = results.read_runs([tmp_path])
    text = result_tables.table(runs)
    assert "| 128 | no result, 1 failed | no result, 1 diverged |" in text
    assert "| 128 | 90.0 (n = 1), factor 1 |" in text
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, axes, *names: drawn.extend(axes))
    make_run(tmp_path, "large", 0.5, global_batch_size=256)
    make_run(tmp_path, "large-long", 0.95, global_batch_size=256, epochs=20)
    summary = result_tables.summarise(results.read_runs([tmp_path]))
    look = figures.styles(list(summary["optimizer"].unique()))
    figures.draw_accuracy_batch(summary, look, tmp_path, "a", "")
    # The first panel holds runs without a result, the second the highest accuracy.
    assert len(drawn) == 2 and drawn[1].get_ylim()[1] > 95


@pytest.mark.parametrize("foreign", ["[1]", "null", '{"flags": null}', "\xff"])
def test_another_programs_files_are_passed_over(foreign, run_folders, tmp_path):
    (run_folders / "other").mkdir()
    (run_folders / "other" / "flags.json").write_text(foreign, encoding="latin-1")
    text = '{"flags": {"optimizer": null, "epochs": null, "seed": [1]}}'
    (make_run(run_folders, "empty", 0.5) / "flags.json").write_text(text)
    (make_run(run_folders, "text", 0.5, seed=7) / "summary.json").write_text('{"loss": "low"}')
    (run_folders / "other" / "sweep.json").write_text('{"name": "other", "b": {"flags": 1}}')
    lines = '[1]\n{"loss": 1}\n{"type": "step", "update": "a"}\n{"type": "epoch", "update": 1}\n'
    (make_run(run_folders, "lines", 0.5, optimizer="sgd") / "metrics.jsonl").write_text(lines)
    out = tmp_path / "out"
    out.mkdir()
    plot.draw_runs([run_folders], out)
    found = list(pd.read_csv(out / "runs.csv")["run"])
    assert "other" not in found and {"empty", "text", "lines"} <= set(found)


def test_seconds_follow_from_the_throughput_of_the_epochs(run_folders):
    steps, _ = results.read_metrics(run_folders / "m-0", 128)
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
    assert len(pd.read_csv(out / "runs.csv")) == 12
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

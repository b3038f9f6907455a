"""A study of optimizers where curvature matters: `python -m scripts.curvature --jobs=2`.

Small ill-conditioned problems (problems.py); NLCG with its preconditioners and as it was
published beside Momentum, Nesterov, Adam and, where all data are in each update, L-BFGS. Each
optimizer gets the same search: `--rates` constant learning rates with two seeds, then `--seeds`
more seeds with the rate whose worse final loss of the two was lowest. L-BFGS has no rate.

Variants of NLCG's default, each with one part changed, are in ablation.py.

An update is one gradient evaluation. Times are those of the updates alone: no tracing, none of the
evaluations of the loss over all data from which the curves are made.

Each finished run is a line of `runs.jsonl` and is not done again: after an interruption start the
same command again. In the end come table.md and the figures (report.py).
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys

import tqdm

from scripts.curvature.ablation import KNOWN
from scripts.curvature.statistics import POINTS, SEARCH_SEEDS, best_rate
from scripts.shared.timing import machine
from trainers.engine import files
from trainers.engine.files import make_folder, path_of

# Gradient evaluations of a run: the budget.
UPDATES = {
    "autoencoder": 2500,
    "autoencoder_256": 9000,
    "poisson": 12_000,
    "burgers": 4000,
    "resnet_plain": 1000,
    "adding": 5000,
}
FULL_BATCH = ("autoencoder", "poisson", "burgers")
STUDIED = ["nlcg", "nlcg_noprec", "nlcg_fr", "nlcg_fr_noprec", "nlcg_pr"]
STUDIED += ["nlcg_pr_noprec", "momentum", "nesterov", "adam", "lbfgs"]
# The middle of the grid of learning rates, in half decades: 10^(middle / 2).
MIDDLES = {"adam": -5, "adamw": -5, "lamb": -5, "nlcg_spectral": -5, "spectral_no_limit": -5}
MIDDLES |= {"nlcg_fr": -2, "nlcg_pr": -2}
MIDDLE_WITHOUT_PRECONDITIONER = -3


def learning_rates(optimizer, count):
    """The rates to be tried: two a decade, as 0.01, 0.03, 0.1; not for L-BFGS, which has none."""
    middle = MIDDLES.get(optimizer, MIDDLE_WITHOUT_PRECONDITIONER)
    return [float(f"{10 ** ((middle + i - count // 2) / 2):.0e}") for i in range(count)]


def plan(known, optimizer, rates, seeds):
    """The runs of one optimizer on one problem, as far as they can be named yet.

    Args:
        known: dict from (rate, seed) to the record of a finished run.
        optimizer: a name in `KNOWN`.
        rates: int, learning rates of the search.
        seeds: int, further seeds with the best of them.

    Returns:
        List of (rate, seed): those of the search, then, if all of that is known, the others.
    """
    seeds = range(len(SEARCH_SEEDS), len(SEARCH_SEEDS) + seeds)
    if optimizer == "lbfgs":
        return [(None, seed) for seed in seeds]
    search = list(itertools.product(learning_rates(optimizer, rates), SEARCH_SEEDS))
    if any(run not in known for run in search):
        return search
    best = best_rate([known[run] for run in search])
    return [*search, *((best, seed) for seed in seeds)]


def missing_runs(problem_name, optimizer, updates, rates, seeds, known):
    """Makes the runs that are planned and not known; a generator of their records."""
    known, training = dict(known), None
    while missing := [run for run in plan(known, optimizer, rates, seeds) if run not in known]:
        if training is None:
            # TensorFlow is imported in the processes that train only.
            from scripts.curvature import problems
            from scripts.curvature import training as trainings
            from trainers.engine.folder import git_revision

            revision = git_revision()
            problem = problems.PROBLEMS[problem_name]()
            training = trainings.make_training(problem, optimizer, updates)
        rate, seed = missing[0]
        curve = training.run(rate, seed)
        record = {"problem": problem_name, "optimizer": optimizer, "updates": updates}
        record |= {"rate": rate, "seed": seed, "revision": revision, **results(training, curve)}
        known[rate, seed] = record
        yield record


def results(training, curve):
    """What is recorded of a run; `None` stands for a number that is not finite."""
    updates, seconds, losses = zip(*curve)
    losses = [float(f"{loss - training.problem.floor:.6g}") for loss in losses]
    finite, error = math.isfinite(losses[-1]), None
    if finite and training.problem.error:
        error = training.problem.error(training.model)
    return {
        "diverged": not finite or losses[-1] > losses[0],
        "final_loss": losses[-1] if finite else None,
        "error": error,
        "seconds": seconds[-1],
        "diagnostics": training.diagnostics(),
        "curve": {
            "updates": updates,
            "seconds": [float(f"{x:.5g}") for x in seconds],
            "loss": [x if math.isfinite(x) else None for x in losses],
        },
    }


def work(connection):
    """The life of a worker process: one pair of problem and optimizer after another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pipe breaks when the study itself was killed.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            for record in missing_runs(*connection.recv()):
                connection.send(record)
            connection.send(None)


def work_in_processes(tasks, jobs):
    """Hands the arguments of `missing_runs` to worker processes; a generator of all records."""
    # One thread each: those of TensorFlow, and of the linear algebra in SciPy and NumPy.
    names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OPENBLAS_NUM_THREADS")
    os.environ.update(dict.fromkeys(names, "1"))
    context, tasks, busy = multiprocessing.get_context("spawn"), iter(tasks), []

    def give_task(connection):
        if (task := next(tasks, None)) is not None:
            connection.send(task)
            busy.append(connection)

    for _ in range(jobs):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs,), daemon=True).start()
        theirs.close()
        give_task(ours)
    while busy:
        for connection in multiprocessing.connection.wait(busy):
            try:
                record = connection.recv()
            except EOFError:
                sys.exit("error: a worker ended; its own message is above")
            if record is None:
                busy.remove(connection)
                give_task(connection)
            else:
                yield record


def open_log(path):
    """Opens runs.jsonl to append to, without the half line that a killed study may have left.

    Returns:
        The file, and the records in it.
    """
    try:
        file = files.lock(path)
    except BlockingIOError:
        sys.exit(f"error: another study is at work on {path}")
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        file.truncate(sum(len(line) for line in lines[:-1]))
        lines.pop()
    return file, [json.loads(line) for line in lines]


def parsed_options(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.curvature", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--folder", type=path_of, default="runs/curvature", help="of all files")
    parser.add_argument("--problems", nargs="+", choices=UPDATES, default=list(UPDATES))
    parser.add_argument("--optimizers", nargs="+", choices=KNOWN, default=STUDIED)
    parser.add_argument("--jobs", type=int, default=2, help="worker processes, one thread each")
    parser.add_argument("--rates", type=int, default=7, help="learning rates of the search")
    parser.add_argument("--seeds", type=int, default=5, help="with the best of them")
    parser.add_argument("--updates-factor", type=float, default=1.0, help="for shorter runs")
    options = parser.parse_args(arguments)
    for name in ("jobs", "rates", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1. Received: {getattr(options, name)}")
    if not 0 < options.updates_factor < 1000:
        received = f"Received: {options.updates_factor}"
        parser.error(f"--updates-factor must lie between 0 and 1000. {received}")
    if options.optimizers == ["lbfgs"] and not set(options.problems) & set(FULL_BATCH):
        parser.error(f"--optimizers=lbfgs works on full batches: {', '.join(FULL_BATCH)}")
    return options


class Study:
    """The runs that are asked for, and what is known of them.

    Args:
        options: see `parsed_options`.
        made: dict that says where the runs are made.
    """

    def __init__(self, options, made):
        self.options, self.made = options, made
        self.known = {}  # problem, optimizer -> rate, seed -> record
        for problem, optimizer in itertools.product(options.problems, options.optimizers):
            if optimizer != "lbfgs" or problem in FULL_BATCH:
                self.known[problem, optimizer] = {}
        self.updates = {
            name: max(POINTS, round(UPDATES[name] * options.updates_factor))
            for name in options.problems
        }

    def add(self, record):
        """Notes a finished run, unless it is none of those asked for."""
        # Older records have hyphens: nlcg-fr.
        record["optimizer"] = record["optimizer"].replace("-", "_")
        pair = record["problem"], record["optimizer"]
        if pair in self.known and record["updates"] == self.updates[pair[0]]:
            self.known[pair][record["rate"], record["seed"]] = record

    def _planned(self, pair):
        return plan(self.known[pair], pair[1], self.options.rates, self.options.seeds)

    def records(self):
        """Those of all runs planned that are finished."""
        return [r[run] for pair, r in self.known.items() for run in self._planned(pair) if run in r]

    def run(self, log):
        """Makes the missing runs, each a line of a file."""
        options, done = self.options, len(self.records())
        tasks = [
            (*pair, self.updates[pair[0]], options.rates, options.seeds, runs)
            for pair, runs in self.known.items()
        ]
        searches = len(SEARCH_SEEDS) * options.rates
        total = sum((o != "lbfgs") * searches + options.seeds for _, o in self.known)
        # Off a terminal no bar, but a line for each run.
        with tqdm.tqdm(total=total, initial=done, unit="run", disable=None) as bar:
            for record in work_in_processes(tasks, options.jobs) if done < total else ():
                record["made"] = self.made
                log.write(json.dumps(record) + "\n")
                log.flush()
                self.add(record)
                done += 1
                text = f"{record['problem']}, {record['optimizer']}, rate {record['rate']}"
                bar.set_postfix_str(text, refresh=False)
                bar.update()
                if bar.disable:
                    print(f"{done}/{total}: {text}, seed {record['seed']}", flush=True)


def main(arguments=None):
    options = parsed_options(arguments)
    folder = options.folder
    try:
        make_folder(folder)
        log, records = open_log(folder / "runs.jsonl")
    except OSError as error:
        sys.exit(f"error: --folder: {error}")
    made = {**machine(), "jobs": options.jobs}
    study = Study(options, made)
    for record in records:
        # Times of other machines, or of other loads on this one, cannot stand in one table.
        if record.get("made") != made:
            sys.exit(
                f"error: {log.name} has runs made with {record.get('made')}, not {made}: choose "
                "another --folder"
            )
        study.add(record)
    with log:
        study.run(log)
    from scripts.curvature.report import write_report  # what draws is not for the workers

    records = study.records()
    revisions = ", ".join(sorted({str(record["revision"]) for record in records}))
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "scripts.curvature", *words])
    write_report(folder, records, {**made, "command": command, "revision": revisions})

"""Trains optimizers x batch sizes x epochs x seeds, or any other flags, one run after another.

    python -m scripts.sweep --folder=runs/a --optimizers nlcg momentum --batch-sizes 128 512 \\
        --epochs 10 --seeds 0 1 2 -- --dataset=digits --depth=8
    python -m scripts.sweep --folder=runs/a --config=sweep.yaml -- --data_dir=DIR

    trainer: trainers.cifar                            # the default
    launcher: [scripts/launch_horovodrun.sh, -n, 2, --]        # words before the command, or none
    flags: {dataset: cifar100, depth: 8, epochs: 10}           # of all runs
    optimizers:                                        # names for the plots, with their flags
      NLCG-FR: nlcg_fr                                 # of the table of optimizers
      Momentum: {optimizer: momentum}                  # or any flags
    grid:                                              # each block: every combination
      - {global_batch_size: [128, 512], seed: [0, 1, 2]}
      - {global_batch_size: [128, 512], learning_rate_factor: [0.25, 4], seed: 0}
      - {global_batch_size: 512, learning_rate_factor: 4, seed: 1, optimizers: [Momentum]}

What follows `--` is added to the flags of all runs. The same command started again, or with
`--folder` alone, goes on: finished runs stay as they are, a run that was interrupted goes on from
its checkpoint. Runs that fail or diverge are recorded as such in `FOLDER/runs.csv`; failed ones are
started again only by `--retry-failed`. `python -m scripts.plot FOLDER --out=DIR` draws the results.

Exit status: 0 when every run has finished or diverged, 1 when one failed or was killed, 2 for a
definition that cannot be run, 75 after SIGTERM and 130 after Ctrl-C, when the runs have saved
their state.
"""

import argparse
import pathlib
import shlex
import shutil
import sys

from scripts.sweep import definition as definitions
from scripts.sweep.processes import ROOT, Sweep
from trainers.engine import files
from trainers.engine.files import make_folder, path_of
from trainers.optimizers.choice import OPTIMIZERS, flags_of, trained

SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{last}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# One array task for each run of {folder}, written by scripts.sweep. Submit it with what one run
# needs; %4 is how many may run at once:
#
#   sbatch --cpus-per-task=8 --gpus=1 --time=12:00:00 --array=0-{last}%4 {file}
#
# 120 seconds before the time limit the run saves its state and goes back into the queue.
cd {root} || exit 2
{command} --index="$SLURM_ARRAY_TASK_ID" &
sweep=$! told='' code=0
trap 'told=1; kill -TERM "$sweep"' TERM
wait "$sweep" || code=$?
# The signal ends the first wait, not the run.
if [ -n "$told" ]; then code=0; wait "$sweep" || code=$?; fi
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def lock(folder, shared):
    """Keeps a second sweep out of a folder; the tasks of a SLURM array share it.

    Returns:
        The file that holds the lock while it is open.
    """
    try:
        return files.lock(folder / ".lock", shared)
    except BlockingIOError:
        raise ValueError(f"another sweep is using --folder={folder}") from None


def write_slurm(path, folder, count, discard_checkpoints, retry_failed):
    words = [sys.executable, "-m", "scripts.sweep", f"--folder={folder}"]
    words += ["--discard-checkpoints"] * discard_checkpoints + ["--retry-failed"] * retry_failed
    text = SLURM.format(
        last=count - 1,
        log=shlex.quote(str(folder / "slurm-%A_%a.log")),
        folder=folder,
        file=path,
        root=shlex.quote(str(ROOT)),
        command=shlex.join(words),
    )
    pathlib.Path(path).write_text(text)
    print(f"{count} runs. Submit them with what one run needs, for example:")
    print(f"  sbatch --cpus-per-task=8 --gpus=1 --time=12:00:00 {shlex.quote(str(path))}")


def comparable():
    """The names of optimizers, and of variants, that the trainers have."""
    return [name for name in OPTIMIZERS if flags_of(name)["optimizer"] in trained()]


def parsed_options(words):
    description, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sweep",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=path_of, required=True, help="of the whole sweep")
    parser.add_argument("--config", type=path_of, help="YAML file with the definition")
    parser.add_argument("--optimizers", nargs="+", choices=comparable())
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="global batches")
    parser.add_argument("--epochs", type=int, nargs="+", help="lengths of a run")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--vary", nargs="+", metavar="FLAG=V,V", default=[], help="any other flag")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, sharing the CPU cores")
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument(
        "--discard-checkpoints", action="store_true", help="of runs that have finished"
    )
    parser.add_argument("--slurm", type=path_of, metavar="FILE", help="write a SLURM array script")
    parser.add_argument("--index", type=int, help="run this one alone, counted from 0")
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.extra = words[end + 1 :]
    return options


def define(options):
    """The runs that the options name, the folder's own if they name none."""
    line = (options.optimizers, options.batch_sizes, options.epochs, options.seeds, options.vary)
    if options.index is not None and (options.config or any(line) or options.extra):
        raise ValueError("--index counts the runs that --folder knows: give no definition with it")
    if options.config and any(line):
        raise ValueError("give --config, or --optimizers and what belongs to it, not both")
    if options.config:
        definition = definitions.from_file(options.config)
    elif options.optimizers:
        definition = definitions.from_line(*line)
    elif any(line) or options.extra:
        raise ValueError("--optimizers or --config is missing")
    else:
        runs = definitions.load(options.folder)
        if not runs:
            raise ValueError(f"--folder={options.folder} holds no sweep: give --config as well")
        return runs
    return definitions.expand(definition, definitions.parse_flags(options.extra))


def check_launchers(runs):
    for launcher in {tuple(run["launcher"]) for run in runs.values()}:
        word = launcher[0] if launcher else sys.executable
        if not shutil.which(ROOT / word if "/" in word else word):
            raise ValueError(f"launcher: there is no command {word!r}")


def prepared_sweep(options):
    """The sweep that the options ask for, with its folder locked and its definition written.

    Returns:
        `(sweep, lock)`.

    Raises:
        ValueError, OSError: if it cannot be run.
    """
    runs = define(options)
    check_launchers(runs)
    if options.slurm and not pathlib.Path(options.slurm).absolute().parent.is_dir():
        raise ValueError(f"--slurm={options.slurm}: there is no such folder")
    make_folder(options.folder)
    locked = lock(options.folder, shared=options.index is not None)
    if options.index is None:
        sweep = Sweep(options.folder, runs, options.jobs, options.discard_checkpoints)
        definitions.save(options.folder, runs)
        return sweep, locked
    if not 0 <= options.index < len(runs):
        raise ValueError(f"--index must be 0 to {len(runs) - 1}. Received: {options.index}")
    name = list(runs)[options.index]
    one = {name: runs[name]}
    return Sweep(options.folder, one, options.jobs, options.discard_checkpoints), locked


def main():
    options = parsed_options(sys.argv[1:])
    options.folder = options.folder.absolute()
    try:
        sweep, locked = prepared_sweep(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.slurm:
        # An index counts all runs of the folder, those of earlier definitions too.
        count = len(definitions.load(options.folder))
        write_slurm(
            options.slurm, options.folder, count, options.discard_checkpoints, options.retry_failed
        )
        return
    code = sweep.run(options.retry_failed)
    locked.close()
    raise SystemExit(code)


if __name__ == "__main__":
    main()

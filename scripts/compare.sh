#!/usr/bin/env bash
# A comparison of optimizers from nothing to its figures: set-up, all runs, tables and plots. Goes on
# where it was stopped. Further flags go to the trainer.
#
#   scripts/compare.sh                                     the paper's Figure 7 in small, on digits
#   scripts/compare.sh configs/cifar100/study.yaml --data_dir=DIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=${1:-configs/digits_figure7.yaml}
if [ ! -f "$config" ]; then
  echo "error: there is no file $config; usage: scripts/compare.sh [CONFIG.yaml [trainer flags]]" >&2
  exit 2
fi
folder=runs/$(basename "$config" .yaml)
scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH TF_CPP_MIN_LOG_LEVEL=2
jobs=$(($(nproc) > 1 ? 2 : 1)) # runs at once; on a GPU one
if command -v nvidia-smi >/dev/null; then jobs=1; fi
set -x
# Read whole before it runs for hours: this file may change meanwhile.
{
  status=0
  python -m scripts.sweep --folder="$folder" --config="$config" --jobs="$jobs" -- "${@:2}" ||
    status=$?
  # Runs that failed are in the tables too; after a signal the same command goes on.
  if [ "$status" -le 1 ]; then python -m scripts.plot "$folder" --out="$folder/figures"; fi
  exit "$status"
}

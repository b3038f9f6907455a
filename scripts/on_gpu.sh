#!/usr/bin/env bash
# What only a GPU can tell: the CUDA kernels against the oracle, with their times, then the full-size
# study as far as the time goes. Each call goes on where the last one ended. Needs nvcc, JAX, Keras, and
# PyTorch or CuPy; no TensorFlow.
#
#   scripts/on_gpu.sh DATA OUT                DATA: what scripts.fullsize --export wrote
#   scripts/on_gpu.sh DATA OUT --minutes=9    OUT gets a small folder: results.tar.gz
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
data=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
if [ ! -e "$out/kernels.txt" ]; then
  for program in nvidia-smi nvcc; do
    command -v "$program" > /dev/null || { echo "error: $program not found: this needs a GPU" >&2; exit 2; }
  done
  nvidia-smi --query-gpu=name,driver_version --format=csv > "$out/gpu.csv"
  status=0
  python3 -m tests.fused.check_cuda > "$out/kernels.partial" 2>&1 || status=$?
  echo "exit status $status" >> "$out/kernels.partial"
  mv "$out/kernels.partial" "$out/kernels.txt"
  tail -n 12 "$out/kernels.txt"
fi
status=0
python3 -m scripts.fullsize --data="$data" --config="$data/runs.json" --folder="$out/study" "$@" || status=$?
# Without the states from which runs go on, and without what was compiled.
archive=$(mktemp) # not in the folder that is read
tar czf "$archive" -C "$out" --exclude=state.npz --exclude=.compiled --exclude=results.tar.gz .
mv "$archive" "$out/results.tar.gz"
ls -l "$out/results.tar.gz"
exit "$status"

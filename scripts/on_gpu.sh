#!/usr/bin/env bash
# What only a GPU can tell: the CUDA kernels against the oracle, with their times, then the full-size
# study as far as the time goes. Needs nvcc, JAX, Keras, and PyTorch or CuPy; no TensorFlow.
#
#   scripts/on_gpu.sh DATA OUT                DATA: what scripts.fullsize --export wrote
#   scripts/on_gpu.sh DATA OUT --minutes=9    ends within so many, from 3 on; further options: scripts.fullsize's
#
# Each call goes on where the last one ended. OUT/results.tar.gz has all that was found and is small;
# on another machine it is all that OUT needs. Exit status: 0 when all is done, 75 when runs are left,
# 1 when the kernels failed, 2 for what cannot be run.
set -euo pipefail
minutes=525600 options=() places=()
for word; do
  case $word in
    --minutes=*) minutes=${word#*=} ;;
    -*) options+=("$word") ;;
    *) places+=("$word") ;;
  esac
done
if [ ${#places[@]} != 2 ] || ! [[ $minutes =~ ^[1-9][0-9]*$ ]] || [ "$minutes" -lt 3 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
data=$(realpath "${places[0]}") out=$(realpath -m "${places[1]}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false} KERAS_BACKEND=jax
seconds_left() { echo $((60 * minutes - SECONDS - 15)); }

[ -e "$data/runs.json" ] || { echo "error: $data/runs.json not found: see --export" >&2; exit 2; }
python3 - << 'PYTHON' || exit 2
import os, sys
try:
    import jax, keras
except ImportError as error:
    sys.exit(f"error: {error}")
if jax.default_backend() == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
    sys.exit("error: JAX sees no GPU")
PYTHON
mkdir -p "$out"
if [ -e "$out/results.tar.gz" ] && [ ! -e "$out/gpu.csv" ]; then # made on another machine
  tar xzf "$out/results.tar.gz" -C "$out"
fi
if [ ! -e "$out/kernels.txt" ]; then
  for program in nvidia-smi nvcc; do
    command -v "$program" > /dev/null || { echo "error: $program not found: this needs a GPU" >&2; exit 2; }
  done
fi

pack() { # whatever ends this: all but what was compiled
  archive=$(mktemp) # not in the folder that is read
  tar czf "$archive" -C "$out" --exclude=.compiled --exclude=results.tar.gz .
  mv "$archive" "$out/results.tar.gz"
  ls -l "$out/results.tar.gz"
}
trap pack EXIT
if [ ! -e "$out/kernels.txt" ]; then
  nvidia-smi --query-gpu=name,driver_version --format=csv > "$out/gpu.csv"
  limit=$(($(seconds_left) < 300 ? $(seconds_left) : 300)) status=0
  timeout --foreground -k 5 "$limit" python3 -u -m tests.fused.check_cuda > "$out/kernels.partial" 2>&1 || status=$?
  echo "exit status $status" >> "$out/kernels.partial"
  mv "$out/kernels.partial" "$out/kernels.txt"
  tail -n 12 "$out/kernels.txt"
fi
status=75
if [ "$(seconds_left)" -gt 60 ]; then
  status=0
  # An epoch, or what is compiled before the first, may outlast the minutes of the program itself.
  timeout --foreground -k 5 "$(seconds_left)" python3 -m scripts.fullsize --data="$data" --config="$data/runs.json" \
    --folder="$out/study" --minutes="$(($(seconds_left) / 60))" "${options[@]}" || status=$?
  [ "$status" != 124 ] || status=75
fi
if ! grep -qx "exit status 0" "$out/kernels.txt"; then
  echo "the check of the kernels failed: $out/kernels.txt; without that file it is made again" >&2
  status=1
fi
exit "$status"

#!/usr/bin/env bash
# Starts a command on one or more machines, once for each worker, with Open MPI's launcher. Needs a
# Horovod built with MPI: `scripts/setup.sh` does so where it finds Open MPI, 4 or 5.
#
#   scripts/launch_mpirun.sh [-n WORKERS] [-H HOST:SLOTS,...] [--dry_run] [OPTIONS] -- COMMAND
#
#   scripts/launch_mpirun.sh -- python -m trainers.cifar --flagfile=configs/digits.cfg
#   scripts/launch_mpirun.sh -H host1:4,host2:4 -- python -m trainers.cifar --output_dir=runs/a
#
# -n         workers; by default all slots of -H, without -H the GPUs of this machine, without GPUs 2
# -H         machines, each with its slots: the workers it can take, one for a GPU
# --dry_run  prints the command instead of running it
# OPTIONS    go to mpirun, as --mca btl_tcp_if_include eth0; `mpirun --help` lists them
#
# Variables whose name begins with NLCG_, HOROVOD_, NCCL_, TF_, KERAS_ or XLA_ reach all workers.
set -euo pipefail
fail() { echo "launch_mpirun: error: $*" >&2; exit 2; }

self=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch_common.sh
read_arguments "$@"
export PATH=$path:$PATH "${variables[@]}"
[ -n "$hosts$hosts_elsewhere" ] || hosts=localhost:$workers
mpirun=mpirun
# By its whole path mpirun finds its parts on the other machines too.
[ ! -x "$path/mpirun" ] || mpirun=$path/mpirun
command=("$mpirun" -np "$workers" ${hosts:+-H "$hosts"} --bind-to none --map-by slot --tag-output)
[ "$(id -u)" != 0 ] || command+=(--allow-run-as-root)
for name in $(compgen -e); do
  case $name in PATH | LD_LIBRARY_PATH | NLCG_* | HOROVOD_* | NCCL_* | TF_* | KERAS_* | XLA_*) command+=(-x "$name") ;; esac
done
command+=(${options[@]+"${options[@]}"} "${rest[@]}")
if [ -n "$dry_run" ]; then print_command; exit; fi
cure="install Open MPI (see docs/cluster.md) and run scripts/setup.sh again, or use scripts/launch_horovodrun.sh"
[[ $("$mpirun" --version 2> /dev/null) == *"Open MPI"* ]] || fail "no mpirun of Open MPI: $cure"
# Asking Horovod itself would take the start of TensorFlow.
grep -qs libmpi "$path"/../lib/python3*/site-packages/horovod/tensorflow/mpi_lib*.so || fail "Horovod is not built with MPI: $cure"
exec "${command[@]}"

#!/usr/bin/env bash
# Starts a command on one or more machines, once for each worker, with Horovod's own launcher
# (Gloo: needs SSH between the machines, but no MPI).
#
#   scripts/launch_horovodrun.sh [-n WORKERS] [-H HOST:SLOTS,...] [--dry_run] [OPTIONS] -- COMMAND
#
#   scripts/launch_horovodrun.sh -- python -m trainers.cifar --flagfile=configs/digits.cfg
#   scripts/launch_horovodrun.sh -H host1:4,host2:4 -- python -m trainers.cifar --output_dir=runs/a
#   scripts/launch_horovodrun.sh -n 4 --min-np 2 --max-np 8 --host-discovery-script ./hosts.sh -- COMMAND
#
# -n         workers; by default all slots of -H, without -H the GPUs of this machine, without GPUs 2
# -H         machines, each with its slots: the workers it can take, one for a GPU
# --dry_run  prints the command instead of running it
# OPTIONS    go to horovodrun, as --network-interfaces eth0; `horovodrun --help` lists them
set -euo pipefail
fail() { echo "launch_horovodrun: error: $*" >&2; exit 2; }

self=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/launch_common.sh
read_arguments "$@"
command=(horovodrun --gloo -np "$workers" ${hosts:+-H "$hosts"} ${options[@]+"${options[@]}"} "${rest[@]}")
if [ -n "$dry_run" ]; then print_command; exit; fi
export PATH=$path:$PATH "${variables[@]}"
command -v horovodrun > /dev/null || fail "no horovodrun: run scripts/setup.sh on every machine"
exec "${command[@]}"

#!/usr/bin/env bash
# The main job: NLCG trains a ResNet on real images (handwritten digits, no download) with two
# Horovod workers. Sets everything up first. Further flags go to the trainer.
#
#   scripts/train.sh                 scripts/train.sh --optimizer=momentum --epochs=10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH TF_CPP_MIN_LOG_LEVEL=2 HOROVOD_LOG_LEVEL=error
set -x
exec horovodrun --gloo -np 2 python -m trainers.cifar --flagfile=configs/digits.cfg \
  --output_dir="runs/digits-$(date +%Y%m%d-%H%M%S)" "$@"

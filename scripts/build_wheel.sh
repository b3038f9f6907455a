#!/usr/bin/env bash
# One wheel of nlcg_tf for every Python, with the fused op (and its CUDA kernels where nvcc is), and
# beside it Horovod's for this Python. Sets everything up first.
#
#   scripts/build_wheel.sh           into dist/
#   scripts/build_wheel.sh DIR
#   pip install --find-links DIR 'nlcg_tf[horovod]'
set -euo pipefail
mkdir -p "${1:-$(dirname "${BASH_SOURCE[0]}")/../dist}"
out=$(cd "${1:-$(dirname "${BASH_SOURCE[0]}")/../dist}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH TF_CPP_MIN_LOG_LEVEL=2
rm -rf build "$out"/nlcg_tf-*.whl # setuptools would pack what is no longer in the repository
python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir "$out" .
cp "$(ls -t .cache/horovod-*/*.whl | head -n 1)" "$out" # that of the last set-up
library=nlcg_tf/fused/libnlcg_update.so
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! python -m zipfile -e "$out"/nlcg_tf-*.whl "$work" || [ ! -e "$work/$library" ]; then
  echo "error: the wheel lacks the fused op: python -m nlcg_tf.fused.build tells why" >&2
  exit 1
fi
needs() { grep -aoE "$1_[0-9.]+[0-9]" "$work/$library" | sort -uV | tail -n 1 | sed 's/.*_//'; }
echo "$(ls "$out"/nlcg_tf-*.whl): needs glibc $(needs GLIBC), libstdc++ with GLIBCXX_$(needs GLIBCXX)"

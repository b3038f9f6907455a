#!/usr/bin/env bash
# One wheel of nlcg_tf for every Python, with the fused op (and its CUDA kernels where nvcc is), and
# beside it Horovod's for this Python. After scripts/setup.sh.
#
#   scripts/build_wheel.sh           into dist/
#   scripts/build_wheel.sh DIR
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-dist}
if [ ! -e .venv/nlcg-horovod ]; then
  echo "error: run scripts/setup.sh first" >&2
  exit 2
fi
export PATH=$PWD/.venv/bin:$PATH TF_CPP_MIN_LOG_LEVEL=2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf build # setuptools would pack what is no longer in the repository
python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir "$work" .
library=nlcg_tf/fused/libnlcg_update.so
python -m zipfile -e "$work"/nlcg_tf-*.whl "$work/content"
if [ ! -e "$work/content/$library" ]; then
  echo "error: the wheel lacks the fused op: python -m nlcg_tf.fused.build tells why" >&2
  exit 1
fi
needs() { grep -aoE "$1_[0-9.]+[0-9]" "$work/content/$library" | sort -uV | tail -n 1 | sed 's/.*_//'; }
mkdir -p "$out"
cp "$work"/nlcg_tf-*.whl "$(cat .venv/nlcg-horovod)"/*.whl "$out"
echo "$out/$(cd "$work" && echo nlcg_tf-*.whl): needs glibc $(needs GLIBC), libstdc++ with GLIBCXX_$(needs GLIBCXX)"

#!/usr/bin/env bash
# The tests, after the set-up, ruff and mypy. Arguments go to pytest.
#
#   scripts/test.sh                  scripts/test.sh -k optimizer
#                                    scripts/test.sh -n 0 --pdb: in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH TF_CPP_MIN_LOG_LEVEL=2
set -x
ruff check .
ruff format --check .
mypy
# A file's tests stay together; two files at once, since most tests are one thread's work.
# In the order of tests/conftest.py: the longest files come first.
exec python -m pytest -n $(($(nproc) > 1 ? 2 : 1)) --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Builds the CPU kernel's C++ test without TensorFlow and runs it plain, then under AddressSanitizer,
# UndefinedBehaviorSanitizer and ThreadSanitizer. Needs g++ alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags=(-std=c++17 -O1 -g -ffp-contract=off -Wall -Wextra -Wno-psabi -pthread -Inlcg_tf/fused)
sources=(tests/fused/kernel_test.cc nlcg_tf/fused/nlcg_update_cpu.cc)
run() {
  echo "== $1"
  shift
  "${CXX:-g++}" "${flags[@]}" "$@" "${sources[@]}" -o "$work/test"
  "$work/test"
}
run "plain, as shipped" -O3
"$work/test" --large
# The loader picks among function versions before a sanitizer is ready: without them here.
run "AddressSanitizer" -DNLCG_NO_CLONES -fsanitize=address
run "UndefinedBehaviorSanitizer" -DNLCG_NO_CLONES -fsanitize=undefined -fno-sanitize-recover=all
run "ThreadSanitizer" -DNLCG_NO_CLONES -fsanitize=thread

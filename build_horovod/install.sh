#!/usr/bin/env bash
# install.sh PYTHON: Horovod for the torch of that interpreter, built from the unmodified source and installed beside it.
#
# Horovod publishes no wheels, and one that is built fits exactly one torch: each is built once, in minutes, and kept in
# the user's cache folder. Horovod's own variables choose what goes in: HOROVOD_WITH_MPI=1 and
# HOROVOD_GPU_OPERATIONS=NCCL where the machine has them; gloo is always there.
set -euo pipefail

python=$1
version=0.28.1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "build_horovod: $*" >&2; exit 1; }

pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install -r "$here/requirements.txt"

fits=$("$python" -c 'import platform, sys, torch
print(f"torch{torch.__version__}-py{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}")')
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')  # cmake is there
with=gloo${HOROVOD_WITH_MPI:+-mpi}${HOROVOD_GPU_OPERATIONS:+-${HOROVOD_GPU_OPERATIONS,,}}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gradient-compression-trainer/wheels
kept=$cache/horovod$version-$fits-$with

if [[ ! -d $kept ]]; then
  command -v c++ >/dev/null || fail "no C++ compiler (c++) found: install one, on Debian with: apt-get install g++"
  mkdir -p "$cache"
  fresh=$(mktemp -d "$cache/building.XXXXXX")
  trap 'rm -rf "$fresh"' EXIT
  echo "Building Horovod $version ($with) for $fits: about 5 minutes on 2 cores, once."
  SECONDS=0
  # pip's own cache knows wheels by name only, not by the torch they were built for: it stays out.
  [[ -n ${HOROVOD_WITH_MPI:-} ]] || export HOROVOD_WITHOUT_MPI=1
  HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 \
    CMAKE_TOOLCHAIN_FILE=$here/toolchain.cmake MAKEFLAGS=-j$(nproc) PATH=$scripts:$PATH \
    pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$fresh" "horovod==$version" ||
    fail "Horovod $version did not build; the compiler's words are above"
  mv -T "$fresh" "$kept" 2>/dev/null || [[ -d $kept ]]  # another build of the same may have been faster
  echo "Built in $SECONDS s and kept in $kept"
fi

pip install --no-deps --force-reinstall "$kept"/horovod-*.whl
"$python" -c 'import horovod, horovod.torch
print(f"Horovod {horovod.__version__} is ready: horovodrun -np 2 --gloo ...")'

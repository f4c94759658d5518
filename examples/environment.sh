#!/usr/bin/env bash
# environment.sh PYTHON: an environment with what the examples import, of that interpreter's Python; prints its Python.
#
# It is made once, in minutes, and kept in the user's cache folder, one for each Python and set of pins. gradwire is not
# in it: that changes with every checkout.
set -euo pipefail

python=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
made_of=$("$python" -c 'import platform, sys
print(platform.python_version(), platform.machine(), sys._base_executable)')
digest=$(cat - "$here/requirements.txt" "$here/../requirements.txt" <<<"$made_of" | sha256sum | cut -c 1-16)
kept=${XDG_CACHE_HOME:-$HOME/.cache}/gradient-compression-trainer/examples/$digest

mkdir -p "$(dirname "$kept")"
exec {lock}>"$kept.lock"
flock "$lock"  # another run may be making the same
if [[ ! -e $kept/complete ]]; then
  echo "Making the examples' environment: about 1.6 GB, or 6 where torch is a CUDA build, one to three minutes, once." >&2
  rm -rf "$kept"
  "$python" -m venv "$kept"
  "$kept/bin/python" -m pip --quiet --disable-pip-version-check install -r "$here/requirements.txt" >&2
  touch "$kept/complete"
  echo "Kept in $kept" >&2
fi
echo "$kept/bin/python"

#!/usr/bin/env bash
# The fast tests and a short run of the quick start on another Python, with the newest release of everything, nothing pinned:
#
#   tests/newest.sh PYTHON [pytest's arguments]
#
# Its environment is build/newest-VERSION; to have what is newest by then, remove it.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$("$1" -c 'import sys; print(*sys.version_info[:2], sep=".")')
env=$PWD/build/newest-$version
if [ ! -e "$env/.installed" ]; then
  "$1" -m venv --clear "$env"
  "$env/bin/python" -m pip install -q --disable-pip-version-check -e '.[test]'
  touch "$env/.installed"
fi
"$env/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(jax|flax|optax|orbax-checkpoint|grain|tensorflow|numpy) '
"$env/bin/python" -m pytest -m 'not slow and not interop' "${@:2}"
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
"$env/bin/siglip" train configs/quickstart.py --workdir "$run/run" --total-steps 20 --optim.warmup-steps 1
"$env/bin/siglip" export "$run/run" --format hf --tower image --out "$run/encoder"

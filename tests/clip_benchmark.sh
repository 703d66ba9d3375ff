#!/usr/bin/env bash
# Our metrics beside those of CLIP_benchmark and scikit-learn: tests/clip_benchmark.sh [PYTHON [pytest's arguments]]
#
# PYTHON (.venv/bin/python) has torch (the extra "interop"). The rest goes into build/clip_benchmark, after the packages of PYTHON
# on its path; a run after the first installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
overlay=$PWD/build/clip_benchmark
packages=(clip-benchmark==1.6.2 scikit-learn==1.9.1 joblib==1.6.0 threadpoolctl==3.8.0 narwhals==2.29.0)

wanted="${packages[*]} for $("$python" --version)"
if [ "$(cat "$overlay/.installed" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$overlay"
  # Without dependencies: CLIP_benchmark's metrics need torch, tqdm and scikit-learn only.
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$overlay" "${packages[@]}"
  echo "$wanted" > "$overlay/.installed"
fi

export PYTHONPATH="$overlay${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m pytest -m interop -rs tests/siglip/evaluation/test_agreement.py "${@:2}"

#!/usr/bin/env bash
# What we write for Hugging Face, read by the other major version of transformers: tests/transformers5.sh [PYTHON [pytest's arguments]]
#
# PYTHON (.venv/bin/python) has torch and transformers 4 (the extra "interop"). Version 5 and the few packages that it wants
# otherwise go into build/transformers5, before those of PYTHON on its path; a run after the first installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
overlay=$PWD/build/transformers5
packages=(
  transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==2.4.0 httpx2==2.16.2 httpcore2==2.16.2
  typer==0.29.2 shellingham==1.5.4 truststore==0.10.5 annotated-doc==0.0.7
)

wanted="${packages[*]} for $("$python" --version)"
if [ "$(cat "$overlay/.installed" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$overlay"
  # Without dependencies: the rest is in PYTHON already, and a second copy of it must not come first.
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$overlay" "${packages[@]}"
  echo "$wanted" > "$overlay/.installed"
fi

export PYTHONPATH="$overlay${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import torch, transformers; assert transformers.__version__ == "5.23.0", transformers.__version__'
exec "$python" -m pytest -m interop -rs \
  tests/siglip/formats/test_hugging_face.py tests/siglip/formats/test_hf_naflex.py tests/siglip/formats/test_pali_gemma.py \
  tests/siglip/exporting/test_export.py tests/siglip/exporting/test_model_card.py \
  tests/siglip/formats/test_hf_tokenizer.py tests/examples/test_hf_paligemma.py "${@:2}"

#!/usr/bin/env bash
# Makes a virtual environment with PaddleNLP 3.0.0b4, the judge of our Paddle files:
#
#   bash scripts/paddlenlp_environment.sh DIRECTORY
#   DIRECTORY/bin/python scripts/paddlenlp_judge.py
#
#   PYTHON=python3.11   which Python makes it; it must be 3.10, 3.11 or 3.12
#
# It has an environment of its own because it asks for transformers < 5. The other pins are what it
# was seen to work with: later versions of its dependencies lack names that it imports.
# Takes some minutes and about 2 GB; does nothing if DIRECTORY holds it already.

set -euo pipefail

if [ $# -ne 1 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
DIRECTORY=$1

PACKAGES=(
    "paddlepaddle==3.3.1"
    "paddlenlp==3.0.0b4"
    "transformers>=4.45.2,<5"
    "aistudio-sdk==0.2.6"
    "protobuf<7"
    "pyarrow<22"
    "datasets<5"
    "safetensors<0.9"
    "numpy<2"
)
STAMP=$DIRECTORY/.paddlenlp-installed

# GLOG_v, meant for MindSpore, makes Paddle print every operator.
unset GLOG_v
export PYTHONWARNINGS=ignore

if [ "$(cat "$STAMP" 2>/dev/null)" = "${PACKAGES[*]}" ]; then
    echo "$DIRECTORY holds PaddleNLP already"
    exit 0
fi
"${PYTHON:-python3}" -m venv "$DIRECTORY"
"$DIRECTORY/bin/python" -m pip install --disable-pip-version-check --progress-bar off --quiet \
    "${PACKAGES[@]}"
"$DIRECTORY/bin/python" - <<'CHECK'
import paddle
import paddlenlp
from paddlenlp.transformers import LlamaForCausalLM

print("PaddleNLP", paddlenlp.__version__, "on Paddle", paddle.__version__, LlamaForCausalLM.__name__)
CHECK
echo "${PACKAGES[*]}" >"$STAMP"

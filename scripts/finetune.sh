#!/usr/bin/env bash
# Stage 2: visual instruction tuning of language model and projector.
#
#   bash scripts/finetune.sh --pretrain_mm_mlp_adapter … --data_path … --output_dir …
#
# Takes the arguments of LLaVA's script of this name; what is not given is as in
# configs/llava_v1_5/finetune_7b.yaml (or RECIPE=…). Also key=value of a recipe, and the options of
# `unillava launch`: --backend torch, --nproc 8, --device a100, --print, …
set -eu -o pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m unillava.launch llava "${RECIPE:-$ROOT/configs/llava_v1_5/finetune_7b.yaml}" "$@"

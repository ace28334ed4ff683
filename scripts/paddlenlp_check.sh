#!/usr/bin/env bash
# PaddleNLP against transformers: logits of language models, features of towers and projectors that
# were converted to Paddle's layouts.
#
#   bash scripts/paddlenlp_check.sh DIRECTORY
#
# DIRECTORY is where scripts/paddlenlp_environment.sh put PaddleNLP; it is made if it is not there.
# Prints a line for each part of each conversion, with the largest difference relative to the
# largest value, and fails if one is above 1e-5. Takes some minutes; the tests do not need it.

set -euo pipefail
if [ $# -ne 1 ]; then
    sed -n '2,9p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
PADDLENLP=$(cd "$1" && pwd)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up
bash scripts/paddlenlp_environment.sh "$PADDLENLP"

export TQDM_DISABLE=1 PYTHONWARNINGS=ignore
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
"$PY" scripts/paddlenlp_check.py make "$FOLDER"
"$PADDLENLP/bin/python" scripts/paddlenlp_check.py judge "$FOLDER"

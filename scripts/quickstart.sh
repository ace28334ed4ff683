#!/usr/bin/env bash
# From nothing to a conversation on three frameworks and the proof that they agree:
# makes .venv, builds a tiny LLaVA-NeXT checkpoint (random weights: the replies are nonsense),
# asks about a photograph on each framework, compares the replies token by token, and writes the
# parity report. Everything it makes lies in ./quickstart; exit code 0 only if all agree.
set -eu -o pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up

UNILLAVA=$ROOT/.venv/bin/unillava
FOLDER=quickstart
MODEL=$FOLDER/tiny-llava-next
PHOTO=tests/data/photo.jpg
PROMPT="Describe the photo."

rm -rf "$FOLDER"
mkdir "$FOLDER"

echo "== a tiny checkpoint in the Hugging Face layout"
"$UNILLAVA" tiny "$MODEL"
ls "$MODEL"

for backend in torch mindspore paddle; do
    echo
    echo "== unillava chat $MODEL --image $PHOTO --prompt \"$PROMPT\" --max-new-tokens 16 --backend $backend"
    "$UNILLAVA" chat "$MODEL" --image "$PHOTO" --prompt "$PROMPT" --max-new-tokens 16 \
        --backend "$backend" --json >"$FOLDER/$backend.json"
    "$PY" -c 'import json, sys; print(json.load(open(sys.argv[1], encoding="utf-8"))["text"])' \
        "$FOLDER/$backend.json"
done

echo
echo "== do the replies agree, token by token?"
"$PY" scripts/compare_replies.py "$FOLDER"/{torch,mindspore,paddle}.json

echo
echo "== unillava parity $MODEL --image $PHOTO"
"$UNILLAVA" parity "$MODEL" --image "$PHOTO" --out "$FOLDER/parity.html"

cat <<END

What to look at
  $FOLDER/parity.html
      every layer, gradient and token of the three frameworks compared (open it in a browser)
  $MODEL
      the checkpoint: config.json, safetensors shards, tokenizer, processor files
Next, in this folder
  source .venv/bin/activate
  unillava chat $MODEL --image $PHOTO
      talk in the terminal; give your own checkpoint's folder or hub id instead
  unillava doctor
      what this machine has, and what does not fit together
END

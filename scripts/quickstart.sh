#!/usr/bin/env bash
# From nothing to a model that answers questions about pictures, trained on three frameworks:
# makes .venv, draws pictures of coloured shapes, and lets a LLaVA of a million parameters (random
# at first, vision tower included) learn in two stages on the CPU. Each stage begins on one
# framework and goes on on another. Then the held-out questions, the result in every dialect and
# back, the same conversation on all three frameworks, the loss curves and the parity report.
#
#   UNILLAVA_QUICKSTART=short bash scripts/quickstart.sh     the same path with few steps
#
# Everything it makes lies in ./quickstart (of UNILLAVA_QUICKSTART_IN, if that names a folder with
# links to configs and scripts). Exit code 0 only if at least 95 % of the held-out questions are
# answered exactly (not asked of the short way), and every comparison comes out equal.
set -eu -o pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set_up
cd "${UNILLAVA_QUICKSTART_IN:-$ROOT}"

if [ "${UNILLAVA_QUICKSTART:-}" = short ]; then
    PICTURES=300 HELD_OUT=24 BATCH=8 AT_LEAST=0 REPEATS=1
    PRETRAIN=6 PRETRAIN_FIRST=2 FINETUNE=8 FINETUNE_FIRST=3
    THREADS=1
else
    PICTURES=4000 HELD_OUT=400 BATCH=32 AT_LEAST=95 REPEATS=3
    PRETRAIN=400 PRETRAIN_FIRST=30 FINETUNE=600 FINETUNE_FIRST=80
    THREADS=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    THREADS=$((THREADS < 4 ? THREADS : 4))
fi
UNILLAVA=$ROOT/.venv/bin/unillava
FOLDER=quickstart
DATA=$FOLDER/data
MODEL=$FOLDER/finetune/final

say() { printf '\n== %s\n' "$*"; }

# Shows a command of unillava and runs it.
run() {
    echo "\$ unillava $*" >&2
    "$UNILLAVA" "$@"
}

# A part of a run: `train RECIPE STEPS BACKEND [--stop-at N]`. Goes on from the newest checkpoint,
# whichever framework wrote it. A run that was told to stop ends with 143.
train() {
    local recipe=$1 steps=$2 backend=$3 code=0
    shift 3
    OMP_NUM_THREADS=$THREADS run train "configs/quickstart/$recipe.yaml" "steps.max_steps=$steps" \
        "steps.batch=$BATCH" "steps.micro_batch=$BATCH" --backend "$backend" "$@" || code=$?
    [ "$code" = 0 ] || { [ "$code" = 143 ] && [ $# -gt 0 ]; }
}

rm -rf "$FOLDER"
mkdir "$FOLDER"

say "pictures, what is said about them, and a model that knows nothing"
"$PY" scripts/draw_shapes.py "$DATA" --pictures "$PICTURES" --held-out "$HELD_OUT"
run tiny "$FOLDER/model" --family llava --size small --corpus "$DATA/corpus.txt"
run data check "$DATA/questions.json" --model "$FOLDER/model" --out "$FOLDER/data.html"

say "stage 1: describe pictures; begun on MindSpore, finished on PyTorch"
train pretrain "$PRETRAIN" mindspore --stop-at "$PRETRAIN_FIRST"
train pretrain "$PRETRAIN" torch

say "stage 2: answer questions; begun on Paddle, finished on PyTorch"
train finetune "$FINETUNE" paddle --stop-at "$FINETUNE_FIRST"
train finetune "$FINETUNE" torch

say "questions about $HELD_OUT pictures that it has never seen"
run predict "$MODEL" --data "$DATA/held_out.jsonl" --out "$FOLDER/answers.jsonl" \
    --batch-size 64 --max-new-tokens 8 --backend torch
"$PY" scripts/score_answers.py "$DATA/held_out.jsonl" "$FOLDER/answers.jsonl" --at-least "$AT_LEAST"

say "the result in every dialect that holds a whole model, one made from the other, and back"
from=$MODEL
for dialect in original mindformers mindspore paddlemix moss2 parts hf; do
    to=$FOLDER/dialects/$dialect
    run convert "$from" "$to" --to "$dialect"
    from=$to
done
run verify "$MODEL" "$from"

say "its parts: the tower and the language model through their dialects, and put together again"
run convert "$MODEL" "$FOLDER/parts/clip.ckpt" --to mindformers-clip
run convert "$FOLDER/parts/clip.ckpt" "$FOLDER/parts/clip" --to clip --base "$MODEL"
run convert "$MODEL" "$FOLDER/parts/paddlenlp" --to paddlenlp
run convert "$FOLDER/parts/paddlenlp" "$FOLDER/parts/llama.ckpt" --to mindformers-llama
run convert "$FOLDER/parts/llama.ckpt" "$FOLDER/parts/llama" --to llama --base "$MODEL"
run convert "$MODEL" "$FOLDER/parts/mm_projector.bin" --to projector
run compose "$FOLDER/parts/whole" --vision "$FOLDER/parts/clip" \
    --language "$FOLDER/parts/llama" --projector "$FOLDER/parts/mm_projector.bin"
run verify "$MODEL" "$FOLDER/parts/whole"

PICTURE=$DATA/$("$PY" -c 'import json, sys; print(json.loads(input())["image"])' \
    <"$DATA/held_out.jsonl")
QUESTION=$("$PY" -c 'import json, sys; print(json.loads(input())["text"])' <"$DATA/held_out.jsonl")

say "a conversation about a held-out picture: each framework reads the dialect that it grew up with"
chat() {
    run chat "$FOLDER/dialects/$2" --image "$PICTURE" --prompt "$QUESTION" --max-new-tokens 8 \
        --backend "$1" --json >"$FOLDER/$1.json"
    "$PY" -c 'import json, sys; print(json.load(open(sys.argv[1], encoding="utf-8"))["text"])' \
        "$FOLDER/$1.json"
}
chat torch original
chat mindspore mindformers
chat paddle paddlemix
"$PY" scripts/compare_replies.py "$FOLDER"/{torch,mindspore,paddle}.json

say "do the frameworks compute the same thing, layer by layer?"
run parity "$MODEL" --image "$PICTURE" --prompt "$QUESTION" --max-new-tokens 8 --repeats "$REPEATS" \
    --out "$FOLDER/parity.html"

cat <<END

What to look at
  $FOLDER/pretrain/loss.png, $FOLDER/finetune/loss.png
      the loss of both stages; log.jsonl beside them says which framework took which step
  $FOLDER/data.html
      what is learnt of each conversation
  $FOLDER/parity.html
      every layer, gradient and token of the three frameworks compared
  $MODEL
      the model: a Hugging Face directory, as transformers, vLLM and unillava read it
Next, in this folder
  source .venv/bin/activate
  unillava chat $MODEL --image $PICTURE
      ask it something else: what colour, which shape, how many, where
  unillava train configs/quickstart/finetune.yaml output=$FOLDER/again steps.max_steps=50
      change what you like (docs/training.md)
END

# ruff: noqa: E402 (Paddle reads the environment when it is imported)
"""Logits of PaddleNLP's own LLaMA: the judge of checkpoints that we write for Paddle.

    DIRECTORY/bin/python scripts/paddlenlp_logits.py CHECKPOINT TOKENS.npy LOGITS.npy

CHECKPOINT is a directory with config.json and weights as PaddleNLP reads them (model_state.pdparams
or safetensors, whole or in shards). TOKENS.npy holds token ids, int [B,S]; LOGITS.npy gets float32
[B,S,V]. Fails if a tensor is absent, left over or of another shape; what PaddleNLP would do is go
on with random values.

Runs where scripts/paddlenlp_environment.sh put PaddleNLP.
"""

from __future__ import annotations

import os
import sys
import warnings

os.environ.pop("GLOG_v", None)  # meant for MindSpore; Paddle would print every operator
os.environ.setdefault("GLOG_minloglevel", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import numpy as np
import paddle
from paddlenlp.transformers import LlamaForCausalLM
from paddlenlp.utils.log import logger

logger.set_level("ERROR")
paddle.set_device("cpu")


def load_strictly(
    directory: str | os.PathLike[str], kind: type = LlamaForCausalLM, **options: object
) -> paddle.nn.Layer:
    """`kind.from_pretrained(directory, **options)`, if every tensor was there and used."""
    faults: list[str] = []
    original = kind._load_pretrained_model.__func__

    def load(cls: type, *arguments: object, **keywords: object) -> tuple[object, ...]:
        result = original(cls, *arguments, **keywords)
        named = zip(("missing", "left over", "of another shape"), result[1:], strict=True)
        faults.extend(f"{what}: {names}" for what, names in named if names)
        return result

    kind._load_pretrained_model = classmethod(load)
    try:
        model = kind.from_pretrained(str(directory), **options)
    finally:
        kind._load_pretrained_model = classmethod(original)
    if faults:
        raise SystemExit(f"{directory}: " + "; ".join(faults))
    model.eval()
    return model


def compute_logits(model: paddle.nn.Layer, tokens: np.ndarray) -> np.ndarray:
    """float32 [B,S,V] for token ids [B,S]."""
    with paddle.no_grad():
        result = model(paddle.to_tensor(np.asarray(tokens, np.int64)))
    return (result[0] if isinstance(result, (tuple, list)) else result).numpy()


def main(arguments: list[str]) -> int:
    """Read the arguments, write the logits."""
    if len(arguments) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    checkpoint, tokens, output = arguments
    # On CPU Paddle multiplies matrices in float32 only.
    model = load_strictly(checkpoint, dtype="float32")
    logits = compute_logits(model, np.load(tokens))
    np.save(output, logits)
    print(f"{output}: logits {list(logits.shape)} of {type(model).__name__} from {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

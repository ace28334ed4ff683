"""Does PaddleNLP compute with our Paddle files what transformers computes with the originals?

Run by scripts/paddlenlp_check.sh, in two environments that exclude each other:

    python paddlenlp_check.py make FOLDER    (ours) tiny checkpoints, conversions, references
    python paddlenlp_check.py judge FOLDER   (PaddleNLP's) the same numbers, and their differences

Language models are judged by their logits: PaddleNLP's LLaMA and Qwen2 against transformers' LLaVA,
given text alone. Of PaddleMIX, whose LLaVA consists of PaddleNLP's LLaMA and CLIP and of Paddle's
Linear layers, every part is judged on its own: language model, vision tower, projector. Last,
PaddleNLP saves models of its own in all its forms; read and written again in the plain form, they
must compute the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TOLERANCE = 1e-5
"""Of the largest value: both compute in float32, with other kernels."""
REFERENCE, TOKENS, PIXELS = "reference.npz", "tokens", "pixels"


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint, as `unillava.tiny` takes it."""

    name: str
    text: str = "llama"
    dtype: str = "float32"
    family: str = "llava"
    changes: dict[str, Any] = field(default_factory=dict)
    """Of text_config."""


CASES = (
    Case("llama"),
    Case("llama3, grouped heads, llama3 rotary", "llama3", family="llava_next"),
    Case("llama, linear rotary", changes={"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    Case(
        "llama, dynamic rotary",
        changes={
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 16,
        },
    ),
    Case("llama, tied head", changes={"tie_word_embeddings": True}),
    Case("llama, bfloat16", dtype="bfloat16"),
    Case("mistral without window", "mistral"),
    Case("qwen2, biases, tied head", "qwen2"),
)
FORMS: dict[str, dict[str, Any]] = {
    "pdparams": {"weights": "pdparams"},
    "pdparams in shards": {"weights": "pdparams", "max_shard_bytes": 200_000},
    "safetensors": {"weights": "safetensors"},
    "pdparams, fused": {"weights": "pdparams", "qkv_concat": True},
    "safetensors, fused, in shards": {
        "weights": "safetensors",
        "qkv_concat": True,
        "max_shard_bytes": 200_000,
    },
}
"""How a conversion is asked for: fields of `weight_convert.source.Options`."""
SAVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused": {"fuse_attention_qkv": True, "fuse_attention_ffn": True},
    "q, k, v fused": {"fuse_attention_qkv": True},
    "gate and up fused": {"fuse_attention_ffn": True},
    "tied head": {"tie_word_embeddings": True},
}
"""What PaddleNLP saves itself: fields of its configuration."""


# --- ours ------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Write every case as llava-hf, PaddleNLP and PaddleMIX, with transformers' results beside."""
    from unillava.tiny import build_tiny
    from weight_convert.convert import convert
    from weight_convert.source import Options

    for number, case in enumerate(CASES):
        place = folder / f"{number:02}"
        tied = case.changes.get("tie_word_embeddings")
        config = {
            "text_config": case.changes,
            **({} if tied is None else {"tie_word_embeddings": tied}),
        }
        build_tiny(
            place / "hf", case.family, case.text, dtype=case.dtype, seed=number, config=config
        )
        np.savez(place / REFERENCE, **reference(place / "hf"))
        for form, options in FORMS.items():
            convert(place / "hf", place / form, "paddlenlp", Options(**options))
        if not (tied and case.text == "llama"):
            for form in ("pdparams", "safetensors"):
                target = place / f"PaddleMIX, {form}"
                convert(place / "hf", target, "paddlemix", Options(**FORMS[form]))
        print(f"made: {case.name}", flush=True)


def reference(directory: Path) -> dict[str, np.ndarray]:
    """Token ids and pixels, and what transformers makes of them in float32."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    tokens = random.integers(3, model.config.image_token_id, (2, 24))
    side = model.config.vision_config.image_size
    pixels = random.standard_normal((2, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)).logits
        images = torch.from_numpy(pixels)
        tower = model.model.vision_tower(images, output_hidden_states=True)
        features = tower.hidden_states[model.config.vision_feature_layer]
        projected = model.model.multi_modal_projector(features)
    return {
        TOKENS: tokens,
        PIXELS: pixels,
        "language": logits.numpy(),
        "vision": features.numpy(),
        "projector": projected.numpy(),
    }


# --- PaddleNLP's -----------------------------------------------------------------------------


def judge(folder: Path) -> bool:
    """Print a line for every part of every conversion; whether all of them hold."""
    held = True
    for number, case in enumerate(CASES):
        place = folder / f"{number:02}"
        expected = dict(np.load(place / REFERENCE))
        for directory in sorted(path for path in place.iterdir() if path.is_dir()):
            if directory.name != "hf":
                for part, found in results(directory, expected):
                    held &= report(case, directory.name, part, found, expected[part])
    return judge_reading(folder / "saved") and held


def judge_reading(folder: Path) -> bool:
    """Models that PaddleNLP saved, read by us and written again in the plain form."""
    from paddlenlp_logits import compute_logits, load_strictly  # first: it quietens Paddle

    import paddlenlp.transformers as nlp  # isort: skip
    from weight_convert.convert import convert

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = np.random.default_rng(0).integers(3, 96, (2, 24))
    held = True
    for prefix in ("Llama", "Qwen2"):
        causal, kind = (getattr(nlp, f"{prefix}{end}") for end in ("ForCausalLM", "Config"))
        for number, (name, fields) in enumerate(SAVED.items()):
            settings = kind(**sizes, **heads)
            for key, value in fields.items():
                setattr(settings, key, value)
            model = causal(settings)
            for safe in (False, True):
                place = folder / f"{prefix}{number}{safe:d}"
                model.eval()
                model.save_pretrained(str(place / "saved"), safe_serialization=safe)
                convert(place / "saved", place / "again", "paddlenlp")
                again = load_strictly(place / "again", causal, dtype="float32")
                found, expected = (compute_logits(one, tokens) for one in (again, model))
                form = f"saved by PaddleNLP, {'safetensors' if safe else 'pdparams'}"
                case = Case(f"{prefix}, {name}")
                held &= report(case, form, "language", found, expected)
    return held


def report(case: Case, form: str, part: str, found: np.ndarray, expected: np.ndarray) -> bool:
    """One line; whether the difference is small enough."""
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    small = found.shape == expected.shape and difference <= TOLERANCE
    verdict = "ok  " if small else "FAIL"
    print(f"{verdict} {difference:.1e}  {part:9} {case.name}: {form}", flush=True)
    return small


def results(directory: Path, given: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """(part, what PaddleNLP computes) for a directory that was written for Paddle."""
    from paddlenlp_logits import compute_logits, load_strictly  # first: it quietens Paddle

    import paddle  # isort: skip
    import paddlenlp.transformers as nlp

    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "mm_vision_tower" not in settings:
        kind = getattr(nlp, settings["architectures"][0])
        model = load_strictly(directory, kind, dtype="float32")
        yield "language", compute_logits(model, given[TOKENS])
        return
    vision = json.loads((directory.parent / "hf" / "config.json").read_text())["vision_config"]
    base = "qwen2" if "Qwen" in settings["architectures"][0] else "llama"
    model = load_strictly(directory, llava_class(base, vision), dtype="float32")
    yield "language", compute_logits(model, given[TOKENS])
    inner = getattr(model, base)
    with paddle.no_grad():
        pixels = paddle.to_tensor(given[PIXELS])
        states = inner.vision_tower.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = states[settings["mm_vision_select_layer"]]
        yield "vision", features.numpy()
        yield "projector", inner.mm_projector(features).numpy()


def llava_class(base: str, vision: dict[str, Any]) -> type:
    """PaddleMIX's LlavaLlamaForCausalLM or LlavaQwenForCausalLM, as far as they have parameters.

    PaddleMIX itself would download its vision tower; the attributes, and so the names of the
    parameters, are those of its classes.
    """
    import paddle
    import paddlenlp.transformers as nlp

    prefix = {"llama": "Llama", "qwen2": "Qwen2"}[base]
    causal, model, config = (
        getattr(nlp, f"{prefix}{kind}") for kind in ("ForCausalLM", "Model", "Config")
    )
    known = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    known += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
    sizes = {key: vision[key] for key in known}

    class LlavaConfig(config):
        model_type = "llava"
        mm_patch_merge_type = "spatial_unpad"

    class Tower(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = nlp.CLIPVisionModel(nlp.CLIPVisionConfig(**sizes))

    class Model(model):
        config_class = LlavaConfig

        def __init__(self, config: LlavaConfig) -> None:
            super().__init__(config)
            self.vision_tower = Tower()
            linear, width = paddle.nn.Linear, config.hidden_size
            self.mm_projector = paddle.nn.Sequential(
                linear(config.mm_hidden_size, width), paddle.nn.GELU(), linear(width, width)
            )
            if "unpad" in config.mm_patch_merge_type:
                self.image_newline = self.create_parameter([width])

    class Llava(causal):
        config_class = LlavaConfig
        base_model_prefix = "llava"

        def __init__(self, config: LlavaConfig) -> None:
            super().__init__(config)
            setattr(self, base, Model(config))

    return Llava


COMMANDS: dict[str, Callable[[Path], Any]] = {"make": make, "judge": judge}


def main(arguments: list[str]) -> int:
    """Run one half."""
    if len(arguments) != 2 or arguments[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    return 1 if COMMANDS[arguments[0]](Path(arguments[1])) is False else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

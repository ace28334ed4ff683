"""Original LLaVA's directories, put together by hand from a tiny llava-hf one.

Written from the documentation of the layout alone, as a judge of `weight_convert.dialects`: names
by substitution, files read by the safetensors library. bfloat16 stays bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> (dtype code, shape, bytes)."""
MEDIA = ("<image>", "<video>", "<pad>")
TOWER = "model.vision_tower.vision_tower.vision_model."


def read_raw(directory: Path) -> Raw:
    """Every tensor of a directory's safetensors files."""
    found: Raw = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def write_raw(path: Path, tensors: Raw) -> None:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (code, shape, data) in tensors.items():
        span = [place, place + len(data)]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": span}
        place += len(data)
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + contents)


def original_name(name: str, *, linear: bool = False) -> str:
    """llava-hf's name in original LLaVA."""
    first = "model.mm_projector" if linear else "model.mm_projector.0"
    for pattern, new in (
        (r"^language_model\.", ""),
        (r"^vision_tower\.vision_model\.", TOWER),
        (r"^multi_modal_projector\.linear_1", first),
        (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
        (r"^multi_modal_projector\.linear_3", "model.mm_projector.4"),
        (r"^image_newline$", "model.image_newline"),
    ):
        name = re.sub(pattern, new, name)
    return name


def first_rows(tensor: tuple[str, tuple[int, ...], bytes], rows: int) -> Any:
    """The first rows of a matrix."""
    code, shape, data = tensor
    return code, (rows, *shape[1:]), data[: len(data) // shape[0] * rows]


def without_media(directory: Path) -> dict[str, Any]:
    """A tiny checkpoint's tokenizer files as they were before `<image>` and its like came in."""
    files = {
        name: json.loads((directory / name).read_text())
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    }
    fast, settings = files["tokenizer.json"], files["tokenizer_config.json"]
    fast["added_tokens"] = [t for t in fast["added_tokens"] if t["content"] not in MEDIA]
    settings["added_tokens_decoder"] = {
        number: token
        for number, token in settings["added_tokens_decoder"].items()
        if token["content"] not in MEDIA
    }
    del settings["extra_special_tokens"]
    unknown = settings.get("unk_token")
    for names in (settings, files["special_tokens_map.json"]):
        del names["pad_token"]
        names |= {"pad_token": unknown} if unknown else {}
    return files


def config_of(hf: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """config.json of original LLaVA for a tiny llava-hf configuration, as v1.5 and v1.6 have it."""
    text, vision = dict(hf["text_config"]), hf["vision_config"]
    kind = text.pop("model_type")
    text.pop("architectures")
    text["pad_token_id"] = 0
    named = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen"}[kind]
    siglip = vision["model_type"].startswith("siglip")
    config = {
        **text,
        "_name_or_path": "somewhere/llava",
        "architectures": [f"Llava{named}ForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "max_length": 4096,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tiny/clip",
        "model_type": f"llava_{named.lower()}",
        "transformers_version": "4.31.0",
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
    }
    if hf["model_type"] != "llava":
        config |= {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[w, h] for h, w in hf["image_grid_pinpoints"]],
            "mm_patch_merge_type": "spatial_unpad",
        }
    if hf["model_type"] == "llava_next_video":
        config |= {
            "mm_resampler_type": "spatial_pool",
            "mm_spatial_pool_mode": "average",
            "mm_spatial_pool_out_channels": vision["hidden_size"],
            "mm_spatial_pool_stride": 2,
        }
    if siglip:
        config["mm_vision_tower"] = "tiny/siglip"
    return config | fields


def tower_config(hf: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """config.json of the tower's directory: of the whole CLIPModel, or of the tower alone."""
    vision = dict(hf["vision_config"])
    kind = vision.pop("model_type")
    if kind.startswith("siglip"):
        vision["num_hidden_layers"] += 1  # LLaVA-NeXT deletes the last layer of SigLIP
    if whole:
        family = kind.removesuffix("_vision_model")
        text = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 99}
        return {"model_type": family, "vision_config": vision, "text_config": text}
    return {"model_type": kind, **vision}


def tower_tensors(tensors: Raw) -> Raw:
    """The vision tower of a llava-hf model under its own names."""
    prefix = "vision_tower."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class Original:
    """A directory that was built, and what must be found in it."""

    directory: Path
    tower: Path
    """The directory of the vision tower, or of its settings alone."""
    config: dict[str, Any]
    tensors: Raw
    """llava-hf's name -> what was written, embedding and head without the media tokens' rows."""
    rows: int


def build_original(
    hf: Path,
    directory: Path,
    *,
    inside: bool = True,
    buffers: bool = False,
    projector: Mapping[str, np.ndarray] | None = None,
    linear: bool = False,
    **fields: Any,
) -> Original:
    """Write an original checkpoint with the weights of a tiny llava-hf one.

    Args:
        hf: the tiny checkpoint.
        directory: to be made; the tower's directory is made beside it.
        inside: whether the tower is among the weights.
        buffers: add those that old files have.
        projector: other layers, under llava-hf's names.
        linear: whether the projector is one Linear.
        fields: of config.json, in place of `config_of`'s.
    """
    described = json.loads((hf / "config.json").read_text())
    tokenizer = without_media(hf)
    rows = 1 + max(
        *tokenizer["tokenizer.json"]["model"]["vocab"].values(),
        *(token["id"] for token in tokenizer["tokenizer.json"]["added_tokens"]),
    )
    tensors = read_raw(hf)
    if projector is not None:
        tensors = {n: t for n, t in tensors.items() if "multi_modal_projector" not in n}
        tensors |= {n: ("F32", a.shape, a.astype("<f4").tobytes()) for n, a in projector.items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            tensors[name] = first_rows(tensors[name], rows)
    config = config_of(described, vocab_size=rows, **fields)
    stored = {
        original_name(name, linear=linear): tensor
        for name, tensor in tensors.items()
        if inside or not name.startswith("vision_tower.")
    }
    if buffers:
        frequencies = np.ones(8, "<f4").tobytes()
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (8,), frequencies)
        positions = np.arange(17).astype("<i8").tobytes()
        stored[f"{TOWER}embeddings.position_ids"] = ("I64", (1, 17), positions)
    write_raw(directory / "model.safetensors", stored)
    for name, content in (tokenizer | {"config.json": config}).items():
        (directory / name).write_text(json.dumps(content))
    shutil.copy(hf / "generation_config.json", directory)
    tower = directory.with_name(f"{directory.name}-tower")
    build_tower(hf, tower, weights=not inside)
    return Original(directory, tower, config, tensors, rows)


def build_tower(hf: Path, directory: Path, *, weights: bool, whole: bool = True) -> None:
    """The vision tower's own directory, as `openai/clip-vit-…` is."""
    described = json.loads((hf / "config.json").read_text())
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(tower_config(described, whole=whole)))
    side = described["vision_config"]["image_size"]
    if described["vision_config"]["model_type"] == "clip_vision_model":
        processor = {
            "crop_size": side,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": side,
        }
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    if weights:
        tensors = tower_tensors(read_raw(hf))
        if described["vision_config"]["model_type"] == "siglip_vision_model":
            count = described["vision_config"]["num_hidden_layers"]
            last = {
                name.replace(f"layers.{count - 1}.", f"layers.{count}."): tensor
                for name, tensor in tensors.items()
                if f"layers.{count - 1}." in name
            }
            tensors |= last
        extra = ("F32", (3,), np.ones(3, "<f4").tobytes())
        names = ("logit_scale", "text_projection.weight", "text_model.final_layer_norm.weight")
        tensors |= dict.fromkeys(names, extra) if whole else {}
        write_raw(directory / "model.safetensors", tensors)

"""Foreign layouts put together by hand, as a judge of `weight_convert.dialects`.

Written from the documentation of the layouts alone: names by substitution, fused matrices by loops
over heads; files are read by the safetensors library. bfloat16 is uint16, as in the package.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from weight_convert import files

Arrays = dict[str, np.ndarray]
CODES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
"""NumPy's dtype -> code of the files."""
TOWER = "vision_tower.vision_tower.vision_model."
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MPT_TEXT: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 4}


# --- files -----------------------------------------------------------------------------------


def read_all(directory: Path) -> Arrays:
    """Every tensor of the safetensors files directly in a directory."""
    arrays: Arrays = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            dtype = next(dtype for dtype, code in CODES.items() if code == entry["dtype"])
            arrays[name] = np.frombuffer(bytes(entry["data"]), dtype).reshape(entry["shape"])
    return arrays


def read_bin(path: Path) -> Arrays:
    """Every tensor of a torch file (its reader is judged by torch in tests/torch)."""
    return {name: tensor.read().copy() for name, tensor in files.open_file(path).items()}


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One file: length of the header, header, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        code = CODES[str(array.dtype)]
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_bin(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One torch file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {name: (CODES[str(a.dtype)], a.shape) for name, a in arrays.items()}
    files.FORMATS["bin"].write_file(path, table, iter(arrays.items()))


def write_json(path: Path, value: Any) -> None:
    """As transformers does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def copy_files(source: Path, target: Path, names: tuple[str, ...] = TOKENIZER) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source / name, target / name)


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """The same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and one[n].tobytes() == other[n].tobytes()
        for n in one
    )


# --- parts -----------------------------------------------------------------------------------


def part(arrays: Arrays, prefix: str, stored: str = "") -> Arrays:
    """The tensors below a prefix, under another."""
    return {
        stored + name[len(prefix) :]: array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def vision_part(arrays: Arrays, prefix: str = "vision_model.") -> Arrays:
    """The tower alone: `vision_model.` before the names, or nothing."""
    return part(arrays, "vision_tower.vision_model.", prefix)


def language_part(arrays: Arrays) -> Arrays:
    """The language model alone."""
    return part(arrays, "language_model.")


def projector_part(arrays: Arrays, prefix: str = "model.") -> Arrays:
    """Projector and newline as original LLaVA calls them."""
    found = part(arrays, "multi_modal_projector.")
    linear = not any(name.startswith("linear_2") for name in found)
    renamed: Arrays = {}
    for name, array in found.items():
        layer, kind = name.split(".")
        place = "" if linear else f"{2 * (int(layer.removeprefix('linear_')) - 1)}."
        renamed[f"{prefix}mm_projector.{place}{kind}"] = array
    if "image_newline" in arrays:
        renamed[f"{prefix}image_newline"] = arrays["image_newline"]
    return renamed


# --- Meta ------------------------------------------------------------------------------------

META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to neighbouring pairs."""
    size = len(rows) // heads
    turned = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            turned[head * size + 2 * i] = rows[head * size + i]
            turned[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return turned


def meta_part(arrays: Arrays, heads: int, kv_heads: int) -> Arrays:
    """The language model as Meta's own files have it."""
    outer = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    stored: Arrays = {}
    for name, array in language_part(arrays).items():
        stem = name.removesuffix(".weight")
        if stem in outer:
            stored[f"{outer[stem]}.weight"] = array
            continue
        _, _, number, *rest = stem.split(".")
        inner = ".".join(rest)
        if inner == "self_attn.q_proj":
            array = interleave(array, heads)
        if inner == "self_attn.k_proj":
            array = interleave(array, kv_heads)
        stored[f"layers.{number}.{META[inner]}.weight"] = array
    return stored


def meta_ranks(stored: Arrays, count: int, *, rows_of_embedding: bool) -> list[Arrays]:
    """Cut over model-parallel ranks, as fairscale does."""
    by_columns = ("attention.wo", "feed_forward.w2")
    ranks: list[Arrays] = [{} for _ in range(count)]
    for name, array in stored.items():
        stem = name.removesuffix(".weight")
        axis: int | None = 0
        if stem.endswith("norm"):
            axis = None
        elif stem.endswith(by_columns) or (stem == "tok_embeddings" and not rows_of_embedding):
            axis = 1
        pieces = [array] * count if axis is None else np.split(array, count, axis)
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = np.ascontiguousarray(piece)
    return ranks


# --- MOSS2 -----------------------------------------------------------------------------------

MOSS2 = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def fuse(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Rows by key/value head: its query heads, its key, its value."""
    size, per_group = len(q) // heads, heads // kv_heads
    rows: list[np.ndarray] = []
    for group in range(kv_heads):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(q[head * size : (head + 1) * size])
        rows += [k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
    return np.concatenate(rows)


def moss2_part(arrays: Arrays, heads: int, kv_heads: int) -> Arrays:
    """The language model as MOSS2 and InternLM2 have it."""
    mine = language_part(arrays)
    stored: Arrays = {
        "model.tok_embeddings.weight": mine["model.embed_tokens.weight"],
        "model.norm.weight": mine["model.norm.weight"],
        "output.weight": mine["lm_head.weight"],
    }
    for name, array in mine.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if not match:
            continue
        number, inner, kind = match.groups()
        if inner in MOSS2:
            stored[f"model.layers.{number}.{MOSS2[inner]}.{kind}"] = array
        elif inner == "self_attn.q_proj":
            k, v = (mine[name.replace("q_proj", f"{one}_proj")] for one in "kv")
            fused = fuse(array, k, v, heads, kv_heads)
            stored[f"model.layers.{number}.attention.wqkv.{kind}"] = fused
    return stored


def llava_moss2(arrays: Arrays, heads: int, kv_heads: int, *, tower: bool = True) -> Arrays:
    """LLaVA-MOSS2, with the tower inside or without."""
    inside = vision_part(arrays, f"model.{TOWER}") if tower else {}
    return moss2_part(arrays, heads, kv_heads) | projector_part(arrays) | inside


# --- MPT -------------------------------------------------------------------------------------


def mpt_part(rows: int, dtype: str = "float16", seed: int = 5) -> Arrays:
    """A random MPT."""
    random = np.random.default_rng(seed)
    width, layers = MPT_TEXT["d_model"], MPT_TEXT["n_layers"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (rows, width), "norm_f": (width,)}
    for n in range(layers):
        shapes |= {
            f"blocks.{n}.norm_1": (width,),
            f"blocks.{n}.attn.Wqkv": (3 * width, width),
            f"blocks.{n}.attn.out_proj": (width, width),
            f"blocks.{n}.norm_2": (width,),
            f"blocks.{n}.ffn.up_proj": (4 * width, width),
            f"blocks.{n}.ffn.down_proj": (width, 4 * width),
        }
    return {
        f"transformer.{name}.weight": random.standard_normal(shape).astype(dtype)
        for name, shape in shapes.items()
    }

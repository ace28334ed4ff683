"""PaddleNLP's and PaddleMIX's layouts, written a second time, from their documentation alone.

Tests compare `weight_convert.dialects.paddlenlp` and `paddlemix` with this. Nothing here knows
their tables: names are put together with string functions, fused matrices head by head with slices,
and files are read and written with pickle, json and struct. bfloat16 is uint16.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
CODES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U16": np.uint16}


# --- files -----------------------------------------------------------------------------------


def read_safetensors(path: Path) -> tuple[Arrays, dict[str, str], dict[str, Any]]:
    """Arrays, dtype tags and metadata of one file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    arrays = {
        name: np.frombuffer(
            data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
            CODES[entry["dtype"]],
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }
    return arrays, {name: entry["dtype"] for name, entry in header.items()}, metadata


def read_all_safetensors(directory: Path) -> Arrays:
    """The arrays of every safetensors file of a directory."""
    found: Arrays = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= read_safetensors(path)[0]
    return found


def write_safetensors(path: Path, arrays: Arrays, metadata: Mapping[str, str] | None) -> None:
    """As PaddleNLP saves: bfloat16 under the tag U16."""
    tags = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "U16"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, array in arrays.items():
        end = position + array.nbytes
        header[name] = {
            "dtype": tags[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def read_pdparams(path: Path) -> Arrays:
    """The arrays of a file that a test itself has caused to be written."""
    held = pickle.loads(path.read_bytes())
    names = held.pop("StructuredToParameterName@@")
    assert set(names) == set(held) and len(set(names.values())) == len(names)
    return held


def write_pdparams(path: Path, arrays: Arrays, protocol: int = 4) -> None:
    """As paddle.save does, with names of parameters as Paddle gives them."""
    names = {name: f"linear_{number}.w_0" for number, name in enumerate(arrays)}
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    path.write_bytes(pickle.dumps({**whole, "StructuredToParameterName@@": names}, protocol))


def write_sharded_pdparams(directory: Path, arrays: Arrays, count: int) -> None:
    """`count` files and their index."""
    names = list(arrays)
    weight_map = {}
    for k in range(count):
        part = names[k::count]
        file = f"model_state-{k + 1:05d}-of-{count:05d}.pdparams"
        write_pdparams(directory / file, {name: arrays[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model_state.pdparams.index.json").write_text(json.dumps(index))


# --- names -----------------------------------------------------------------------------------


def language(
    canonical: Arrays,
    heads: int,
    kv_heads: int,
    *,
    base: str = "llama",
    qkv: bool = False,
    ffn: bool = False,
    tied: bool = False,
) -> Arrays:
    """The language model of a llava-hf checkpoint as PaddleNLP's `state_dict()` has it."""
    prefix = "language_model.model."
    own = {n[len(prefix) :]: a for n, a in canonical.items() if n.startswith(prefix)}
    stored: Arrays = {}
    for name, array in own.items():
        turned = array.T if name.endswith("_proj.weight") else array
        stored[f"{base}.{name}"] = turned
    if tied:
        stored["lm_head.weight"] = own["embed_tokens.weight"]
    else:
        stored["lm_head.weight"] = canonical["language_model.lm_head.weight"].T
    if qkv:
        stored = _fuse_qkv(stored, heads, kv_heads)
    return _fuse_ffn(stored) if ffn else stored


def _fuse_qkv(stored: Arrays, heads: int, kv_heads: int) -> Arrays:
    fused = dict(stored)
    for name in [n for n in stored if ".q_proj." in n]:
        query, key, value = (fused.pop(name.replace(".q_proj.", f".{c}_proj.")) for c in "qkv")
        size, per = query.shape[-1] // heads, heads // kv_heads
        columns = []
        for group in range(kv_heads):
            columns.append(query[..., group * per * size : (group + 1) * per * size])
            columns.append(key[..., group * size : (group + 1) * size])
            columns.append(value[..., group * size : (group + 1) * size])
        fused[name.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(columns, -1)
    return fused


def _fuse_ffn(stored: Arrays) -> Arrays:
    fused = dict(stored)
    for name in [n for n in stored if ".gate_proj." in n]:
        gate, up = fused.pop(name), fused.pop(name.replace(".gate_proj.", ".up_proj."))
        fused[name.replace(".gate_proj.", ".gate_up_fused_proj.")] = np.concatenate([gate, up], -1)
    return fused


def split_ranks(stored: Arrays, ranks: int, kv_heads: int) -> list[Arrays]:
    """Tensor parallelism: what each rank saves."""
    column = ("q_proj.weight", "q_proj.bias", "gate_proj.weight", "up_proj.weight")
    column += ("lm_head.weight",)
    if kv_heads % ranks == 0:
        column += ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")
    row = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight")
    parts: list[Arrays] = [{} for _ in range(ranks)]
    for name, array in stored.items():
        pieces = [array] * ranks
        if "vision_tower" not in name and name.endswith(column):
            pieces = np.split(array, ranks, axis=-1)
        elif "vision_tower" not in name and name.endswith(row):
            pieces = np.split(array, ranks, axis=0)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return parts


def vision(canonical: Arrays, base: str = "llama") -> Arrays:
    """The CLIP tower as PaddleMIX has it."""
    prefix = "vision_tower.vision_model."
    stored: Arrays = {}
    for name, array in canonical.items():
        if not name.startswith(prefix):
            continue
        own = name[len(prefix) :].replace("encoder.layers.", "transformer.layers.")
        own = own.replace("layer_norm1", "norm1").replace("layer_norm2", "norm2")
        own = own.replace("mlp.fc1", "linear1").replace("mlp.fc2", "linear2")
        own = own.replace("pre_layrnorm", "ln_pre").replace("post_layernorm", "ln_post")
        own = own.replace("embeddings.class_embedding", "class_embedding")
        own = own.replace("embeddings.patch_embedding", "conv1")
        own = own.replace("embeddings.position_embedding", "positional_embedding")
        linear = "transformer." in own and own.endswith(".weight") and ".norm" not in own
        stored[f"{base}.vision_tower.vision_tower.vision_model.{own}"] = (
            array.T if linear else array
        )
    return stored


def siglip(canonical: Arrays, base: str = "llama") -> Arrays:
    """The SigLIP tower as PaddleMIX has it, without its pooling head."""
    prefix = "vision_tower.vision_model."
    stored: Arrays = {}
    for name, array in canonical.items():
        if name.startswith(prefix) and ".head." not in name:
            linear = name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))
            own = f"{base}.vision_tower.vision_tower.vision_model.{name[len(prefix) :]}"
            stored[own] = array.T if linear else array
    return stored


def projector(canonical: Arrays, base: str = "llama", *, linear: bool = False) -> Arrays:
    """The projector: an nn.Sequential with GELU between, or one nn.Linear."""
    stored: Arrays = {}
    for name, array in canonical.items():
        if name.startswith("multi_modal_projector.linear_"):
            number, kind = name.removeprefix("multi_modal_projector.linear_").split(".")
            place = "" if linear else f"{2 * (int(number) - 1)}."
            stored[f"{base}.mm_projector.{place}{kind}"] = array.T if kind == "weight" else array
    return stored


def newline(canonical: Arrays, base: str = "llama") -> Arrays:
    """`image_newline`, where there is one."""
    return {f"{base}.image_newline": a for n, a in canonical.items() if n == "image_newline"}

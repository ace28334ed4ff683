"""MindFormers' layouts, written down anew for the tests: names by substitution, as its converters
make them, and arrays by plain NumPy. bfloat16 is uint16."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
TYPES = {"float32": "Float32", "float16": "Float16", "uint16": "BFloat16", "int64": "Int64"}
LLAMA_WORDS = (
    ("embed_tokens.weight", "tok_embeddings.embedding_weight"),
    (".self_attn.q_proj.", ".attention.wq."),
    (".self_attn.k_proj.", ".attention.wk."),
    (".self_attn.v_proj.", ".attention.wv."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    ("model.norm.", "model.norm_out."),
)
TOWER_WORDS = (
    ("vision_tower.vision_model.", "vision_encoder."),
    ("encoder.layers", "transformer.resblocks"),
    ("embeddings.", ""),
    ("position_embedding.weight", "positional_embedding"),
    ("patch_embedding", "conv1"),
    ("self_attn", "attn"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    ("multi_modal_projector.linear_1", "adapter.adapter"),
    ("multi_modal_projector.linear_2", "adapter.adapter_2"),
)
NORMS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "pre_layrnorm": "ln_pre"} | {
    "post_layernorm": "ln_post"
}


def _replaced(name: str, words: tuple[tuple[str, str], ...]) -> str:
    for old, new in words:
        name = name.replace(old, new)
    return name


def _tower_name(name: str) -> str:
    for norm, short in NORMS.items():
        for kind, term in (("weight", "gamma"), ("bias", "beta")):
            name = name.replace(f".{norm}.{kind}", f".{short}.{term}")
    return _replaced(name, TOWER_WORDS)


def llava(hub: Arrays) -> Arrays:
    """A LLaVA, or a part of one, from arrays under the names of the hub."""
    made: Arrays = {}
    split: Arrays = {}
    for name, array in hub.items():
        if name.startswith("language_model."):
            made[_replaced(name, LLAMA_WORDS)] = array
        elif re.search(r"vision_tower.*\.[qkv]_proj\.", name):
            split[_tower_name(name)] = array
        else:
            made[_tower_name(name)] = array
    for name in [name for name in split if ".q_proj." in name]:
        three = [split[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
        made[name.replace("q_proj", "in_proj")] = np.concatenate(three, 0)
    return made


def llama(hub: Arrays) -> Arrays:
    """The language model alone, without `language_model.` before its names."""
    names = [name for name in hub if name.startswith("language_model.")]
    return {
        _replaced(name, LLAMA_WORDS).removeprefix("language_model."): hub[name] for name in names
    }


def clip(hub: Arrays) -> Arrays:
    """MindFormers' CLIP: the tower as `visual`, and a text side."""
    tower = {name: array for name, array in hub.items() if name.startswith("vision_tower.")}
    made = {name.replace("vision_encoder.", "visual."): a for name, a in llava(tower).items()}
    rest = ("visual.proj", "positional_embedding", "text_projection", "logit_scale")
    rest += ("token_embedding.embedding_table", "ln_final.gamma", "ln_final.beta")
    rest += ("transformer.resblocks.0.attn.in_proj.weight", "transformer.resblocks.0.ln_1.gamma")
    return made | {name: np.zeros((2, 3), np.float32) for name in rest}


def fused(arrays: Arrays, heads: int, kv_heads: int, *, plain: bool = False) -> Arrays:
    """The inference form: by default as MindFormers 1.5 makes it, row by row."""
    made = dict(arrays)
    for name in [name for name in arrays if ".attention.wq." in name]:
        q, k, v = (made.pop(name.replace(".wq.", f".w{x}.")) for x in "qkv")
        size, share = len(q) // heads, heads // kv_heads
        rows: list[np.ndarray] = []
        for group in range(kv_heads):
            rows += [q[(group * share + i) * size + j] for i in range(share) for j in range(size)]
            rows += [k[group * size + j] for j in range(size)]
            rows += [v[group * size + j] for j in range(size)]
        whole = np.concatenate([q, k, v]) if plain else np.stack(rows)
        made[name.replace(".wq.", ".w_qkv.")] = whole
    for name in [name for name in arrays if ".feed_forward.w1." in name]:
        gate, up = made.pop(name), made.pop(name.replace(".w1.", ".w3."))
        rows = [row for pair in zip(gate, up, strict=True) for row in pair]
        whole = np.concatenate([gate, up]) if plain else np.stack(rows)
        made[name.replace(".w1.", ".w_gate_hidden.")] = whole
    return made


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def write_ckpt(path: Path, arrays: Arrays) -> Path:
    """A file such as `mindspore.save_checkpoint` writes."""
    records = []
    for name, array in arrays.items():
        dims = b"".join(b"\x08" + _varint(size) for size in array.shape)
        kind = TYPES[array.dtype.name].encode()
        tensor = dims + _field(2, kind) + _field(3, array.tobytes())
        records.append(_field(1, _field(1, name.encode()) + _field(2, tensor)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(records))
    return path


def assert_equal(found: Arrays, expected: Arrays) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name

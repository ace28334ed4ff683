"""A projector on its own: `mm_projector.bin`, what stage 1 of LLaVA leaves.

A file of torch, safetensors or Paddle, alone or in a directory with config.json. Names are those
of the live model, under whatever it was wrapped in: what follows the first `mm_projector.` counts
(`model.`, `transformer.`, `base_model.model.model.`, nothing at all). Paddle's matrices are turned,
[in, out]: in a `.pdparams`, or under `llama.`.

With `mm_use_im_start_end` the file also has embedding rows: the whole matrix, of which LLaVA uses
the last two, or those two alone. They are kept as they are under the embedding's canonical name.

Source: LLaVA, llava/train/train.py and llava_trainer.py (saving), llava/model/llava_arch.py
(loading), scripts/extract_mm_projector.py; PaddleMIX, paddlemix/tools/supervised_finetune.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from weight_convert import canonical, files
from weight_convert.canonical import (
    EMBEDDING,
    MPT_EMBEDDING,
    NEWLINE,
    PROJECTOR,
    Config,
)
from weight_convert.contents import Contents
from weight_convert.dialects.base import Dialect, check_complete, to_canonical, to_stored
from weight_convert.dialects.configs import dtype_of
from weight_convert.dialects.llava_config import NAMED, STRATEGIES, stored_config, whole_layers
from weight_convert.dialects.mm_settings import projector_of
from weight_convert.dialects.towers import FOLDER, known_name
from weight_convert.dialects.vocabulary import trim
from weight_convert.errors import CheckpointError
from weight_convert.mapping import RENAME, TRANSPOSE, NameTable, rule
from weight_convert.source import Options, Source, Target, as_json
from weight_convert.storage.tensor import Tensor, few

NAME, STEM = "projector", "mm_projector"
FILES = tuple(f"{STEM}{form.suffix}" for form in files.FORMATS.values())
ADAPTERS = frozenset({"adapter_config.json", "lora_config.json"})
"""Beside one of these the projector belongs to an adapter."""
BARE = re.compile(r"\d+\.(weight|bias)")
INNER = re.compile(r"(?P<wrapped>.*?)mm_projector\.(?P<place>(\d+\.)?(weight|bias))")
OTHERS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "wte.weight": "transformer.wte.weight",
    "image_newline": "model.image_newline",
}
"""End of a name -> the name that the table has for it."""
PADDLE = "llama."


@functools.cache
def table(projector: str, turned: bool) -> NameTable:
    """Canonical <-> stored names.

    Args:
        projector: linear or mlp{N}x_gelu.
        turned: whether matrices are [in, out].
    """
    depth = canonical.projector_depth({"unillava": {"projector": projector}})
    places = [""] if projector == "linear" else [f"{2 * n}." for n in range(depth)]
    layers = [
        rule(
            f"{PROJECTOR}linear_{n}.{{p}}",
            f"model.mm_projector.{place}{{p}}",
            TRANSPOSE if turned else RENAME,
        )
        for n, place in enumerate(places, 1)
    ]
    return NameTable(
        [
            *layers,
            rule(NEWLINE, "model.image_newline"),
            rule(EMBEDDING, "model.embed_tokens.weight"),
            rule(MPT_EMBEDDING, "transformer.wte.weight"),
        ]
    )


# --- recognition -----------------------------------------------------------------------------


def _path(contents: Contents) -> Path | None:
    """The file with the projector."""
    if contents.is_file:
        return contents.path
    if ADAPTERS & contents.names or contents.tensors:
        return None
    return next((contents.path / name for name in FILES if name in contents.names), None)


def _evidence(contents: Contents) -> str:
    path = _path(contents)
    if path is None:
        return ""
    names = contents.tensors if contents.is_file else files.open_file(path)
    inner = [name for name in names if INNER.fullmatch(name) or BARE.fullmatch(name)]
    known = all(_table_name(name) for name in names)
    if not inner or not (known or path.stem == STEM):
        return ""
    return f"{path.name}: nothing but a projector, {few(inner, 1)}"


def _table_name(name: str) -> str:
    """The name of the table that a stored name stands for; empty if it is of something else."""
    match = INNER.fullmatch(name)
    if match:
        return f"model.mm_projector.{match['place']}"
    if BARE.fullmatch(name):
        return f"model.mm_projector.{name}"
    return next((meaning for end, meaning in OTHERS.items() if _ends(name, end)), "")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


# --- reading ---------------------------------------------------------------------------------


def _read(contents: Contents, options: Options) -> Source:
    path = _path(contents)
    if path is None:
        raise CheckpointError(f"{contents.path} holds no projector", expected=" or ".join(FILES))
    opened = files.open_file(path)
    kind = files.format_of(path)
    stored = _renamed(opened, path)
    projector = projector_of(stored)
    if projector is None:
        raise CheckpointError(f"{path} holds no projector", given=few(opened))
    wrapped = _wrapping(opened)
    names = table(projector, turned=kind == "pdparams" or wrapped == PADDLE)
    tensors, dropped = to_canonical(stored, names, options)
    config = _canonical_config(contents.config, projector, tensors)
    layers = {name: tensor for name, tensor in tensors.items() if name.startswith(PROJECTOR)}
    check_complete(layers, config, ("projector",), options)
    memory = {"config": contents.config, "wrapped": wrapped, "weights": kind}
    return Source(NAME, contents.path, config, tensors, dropped=dropped, memory={NAME: memory})


def _renamed(opened: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under the table's names; what it does not know keeps its own."""
    stored: dict[str, Tensor] = {}
    for name, tensor in opened.items():
        meant = _table_name(name) or name
        if meant in stored:
            raise CheckpointError(
                f"{path} holds one tensor twice", given=f"{stored[meant].places[0].name}, {name}"
            )
        stored[meant] = tensor
    return stored


def _wrapping(opened: Mapping[str, Tensor]) -> str | None:
    """What stands before `mm_projector.` in the names; None if the names are bare."""
    found = (INNER.fullmatch(name) for name in opened)
    return next((match["wrapped"] for match in found if match), None)


def _canonical_config(given: Config, projector: str, tensors: Mapping[str, Tensor]) -> Config:
    """What a projector says of the model: itself, and the features that it was trained on."""
    config: Config = {
        "multimodal_projector_bias": f"{PROJECTOR}linear_1.bias" in tensors,
        "projector_hidden_act": "gelu",
        "torch_dtype": dtype_of({}, tensors),
    }
    if projector != "mlp2x_gelu":
        config["unillava"] = {"projector": projector}
    layer, feature = (given.get(f"mm_vision_select_{key}") for key in ("layer", "feature"))
    if type(layer) is int:
        config["vision_feature_layer"] = layer
    if feature in STRATEGIES:
        config["vision_feature_select_strategy"] = STRATEGIES[feature]
    return config


# --- writing ---------------------------------------------------------------------------------


def _write(source: Source, options: Options) -> Target:
    kept = source.memory.get(NAME, {})
    kind = options.weights or kept.get("weights") or "bin"
    projector = canonical.projector_kind(source.config)
    held = {n: t for n, t in source.tensors.items() if n.startswith(PROJECTOR)}
    if not held:
        raise CheckpointError(f"{source.path} has no projector to write")
    if source.dialect == NAME:  # the newline and the embedding rows that came with it
        held = dict(source.tensors)
    turned = kind == "pdparams"
    stored, left_out = to_stored(held, table(projector, turned), options)
    wrapped = _prefix(source, kept, turned)
    stored = {_wrapped_name(name, wrapped): tensor for name, tensor in stored.items()}
    weights, index = files.shards(stored, kind, options.max_shard_bytes, stem=STEM)
    left_out += tuple(name for name in source.tensors if name not in held)
    config = _config(source, kept)
    return Target(NAME, weights, {"config.json": as_json(config), **index}, left_out=left_out)


def _prefix(source: Source, kept: Config, turned: bool) -> str:
    if turned:
        return PADDLE
    wrapped = kept.get("wrapped")
    if wrapped and wrapped != PADDLE:
        return wrapped
    kind = (source.config.get("text_config") or {}).get("model_type")
    return "transformer." if kind == "mpt" else "model."


def _wrapped_name(name: str, wrapped: str) -> str:
    """A name of the table in the model that the projector is for."""
    return wrapped + name.removeprefix("model.") if name.startswith("model.") else name


def _config(source: Source, kept: Config) -> Config:
    """config.json as stage 1 writes it: that of the whole model, as far as it is known."""
    config = source.config
    if kept.get("config"):
        return kept["config"]
    kind = (config.get("text_config") or {}).get("model_type")
    if kind in NAMED and "vision_config" in config:
        vision, layers = canonical.vision_config(config), whole_layers(config)
        has_tower = "vision" in source.parts
        tower = known_name(source.tensors, vision, layers) if has_tower else None
        return stored_config(trim(source).config, tower or FOLDER, inside=False)
    first = source.tensors[f"{PROJECTOR}linear_1.weight"]
    return {
        "hidden_size": first.shape[0],
        "mm_hidden_size": first.shape[1],
        "mm_projector_type": canonical.projector_kind(config),
        "use_mm_proj": True,
    }


DIALECTS = (
    Dialect(
        NAME,
        "projector alone (mm_projector.bin, .safetensors or .pdparams; extracted from any model)",
        _evidence,
        _read,
        _write,
    ),
)

"""Language models on their own: the LLaMA family of transformers, and Meta's own files.

`llama` is LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM, whose tensors have the
canonical names without their prefix. `meta` is read only: params.json and one
`consolidated.NN.pth` per model-parallel rank. Meta rotates neighbouring pairs of each head where
transformers rotates its two halves, so the rows of the query and key projections change places.

Source: transformers, models/llama/convert_llama_weights_to_hf.py; Meta's llama/model.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weight_convert import canonical, files
from weight_convert.canonical import (
    EMBEDDING,
    HEAD,
    LANGUAGE,
    TEXT_DEFAULTS,
    Config,
    is_buffer,
    part_of,
)
from weight_convert.contents import Contents
from weight_convert.dialects.base import Dialect, check_complete, to_canonical, to_stored
from weight_convert.dialects.configs import as_it_was, check_types, dtype_of, restored
from weight_convert.dialects.hf import TOKENIZER_FILES, without_repeated_head
from weight_convert.dialects.vocabulary import grow, trim
from weight_convert.errors import CheckpointError
from weight_convert.mapping import RENAME, NameTable, Op, derive, prefixed, rule
from weight_convert.opening import borrowed
from weight_convert.source import Options, Source, Target, as_json, pick_files, read_json
from weight_convert.storage.tensor import Tensor, few

SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json")
CONFIG_KEYS = ("torch_dtype", "dtype", "text_config", "tie_word_embeddings")
"""What a canonical configuration says about the language model."""
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.{n}.self_attn.q_proj.{p}",
    "model.layers.{n}.self_attn.k_proj.{p}",
    "model.layers.{n}.self_attn.v_proj.{p}",
    "model.layers.{n}.self_attn.o_proj.{p}",
    "model.layers.{n}.mlp.gate_proj.{p}",
    "model.layers.{n}.mlp.up_proj.{p}",
    "model.layers.{n}.mlp.down_proj.{p}",
    "model.layers.{n}.input_layernorm.weight",
    "model.layers.{n}.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
)
TABLE = NameTable(prefixed([rule(name, name) for name in NAMES], LANGUAGE, ""))


# --- LlamaForCausalLM and its kin ------------------------------------------------------------


def _evidence(contents: Contents) -> str:
    config = contents.config
    kind = config.get("model_type")
    multimodal = "text_config" in config or any(key.startswith("mm_") for key in config)
    if multimodal or (config and kind not in ARCHITECTURES):
        return ""
    query = "model.layers.0.self_attn.q_proj.weight"
    if query not in contents.tensors or not all(map(_is_known, contents.tensors)):
        return ""
    return f"config.json: model_type {kind!r}" if config else f"a tensor {query}"


def _is_known(name: str) -> bool:
    """Whether a name belongs to a language model, as far as its first parts tell."""
    return name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."))


def _read(contents: Contents, options: Options) -> Source:
    tensors, dropped = to_canonical(files.open_weights(contents.path), TABLE, options)
    side = pick_files(contents.path, SIDE_FILES)
    if contents.config:
        dtype = dtype_of(contents.config, tensors)
        config = canonical_config(contents.config, dtype, str(contents.path))
    else:
        base, side, _ = borrowed(contents, options)
        config = partial_config(base)
    if canonical.text_config(config).get("tie_word_embeddings") and HEAD in tensors:
        tensors = without_repeated_head(contents, tensors)
    memory = {"llama": {"config": contents.config}} if contents.config else {}
    source = Source("llama", contents.path, config, tensors, side, dropped=dropped, memory=memory)
    source = _regrown(source, contents)
    if contents.config:
        config = as_it_was(contents, source.config, there_and_back, CONFIG_KEYS)
        source = replace(source, config=config)
    check_complete(source.tensors, source.config, ("language",), options)
    return source


def _regrown(source: Source, contents: Contents) -> Source:
    """With the rows and tokens that were taken away when the manifest was written."""
    family = (contents.manifest.get("config") or {}).get("model_type")
    if not contents.manifest.get("vocabulary") or family not in canonical.TOP_DEFAULTS:
        return source
    grown = grow(replace(source, config={**source.config, "model_type": family}))
    return replace(grown, config=partial_config(grown.config))


def partial_config(config: Config) -> Config:
    """What a canonical configuration says about the language model, and nothing else."""
    part = {key: config[key] for key in CONFIG_KEYS if key in config}
    return {"torch_dtype": canonical.stored_dtype(config)} | part


def alone(source: Source) -> Source:
    """The language model of a source, without everything else."""
    return replace(
        source,
        config=partial_config(source.config),
        tensors={n: t for n, t in source.tensors.items() if part_of(n) == "language"},
    )


def canonical_config(config: Config, dtype: str, where: str) -> Config:
    """The canonical configuration from a language model's own config.json.

    Args:
        config: config.json as transformers 4.31 to 5.x write it.
        dtype: what the weights are stored in.
        where: names the file in errors.

    Raises:
        CheckpointError: a field has a value that cannot be.
    """
    check_types(config, TEXT_DEFAULTS[config["model_type"]], f"config.json of {where}")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"config.json of {where}: {key} is no object")
    given = {key: v for key, v in config.items() if key not in ("dtype", "transformers_version")}
    text = canonical.text_config({"text_config": given | {"torch_dtype": dtype}})
    return {
        "text_config": dict(sorted(text.items())),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": dtype,
    }


def _write(source: Source, options: Options) -> Target:
    if "language" not in source.parts:
        raise CheckpointError(f"{source.path} has no language model to write")
    source = trim(source)
    kind = canonical.text_config(source.config)["model_type"]
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            "dialect llama cannot hold this language model",
            given=f"text_config.model_type {kind!r}",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            fix=f"--to {kind}",
        )
    tensors, left_out = to_stored(
        source.tensors, TABLE, options, unheld=lambda name: part_of(name) != "language"
    )
    weights, index = files.shards(
        tensors, options.weights or "safetensors", options.max_shard_bytes
    )
    side = {name: content for name, content in source.files.items() if name in SIDE_FILES}
    documents = {"config.json": as_json(_config(source)), **side, **index}
    return Target("llama", weights, documents, left_out=left_out)


def _config(source: Source) -> Config:
    now = _stored_config(source.config)
    kept = source.memory.get("llama", {}).get("config")
    if not kept or kept.get("model_type") != now["model_type"]:
        return now
    dtype = dtype_of(kept, source.tensors)
    return restored(kept, _stored_config(canonical_config(kept, dtype, "the manifest")), now)


def _stored_config(config: Config) -> Config:
    """config.json of the language model alone, in the spelling that transformers 4 and 5 read."""
    text = canonical.text_config(config)
    stored = {
        **{key: value for key, value in text.items() if key != "dtype"},
        "architectures": [ARCHITECTURES[text["model_type"]]],
        "torch_dtype": canonical.stored_dtype(config),
    }
    return dict(sorted(stored.items()))


def there_and_back(config: Config) -> Config:
    """What a canonical configuration of a language model becomes when it is written and read."""
    stored = _stored_config(config)
    return canonical_config(stored, stored["torch_dtype"], "the manifest")


# --- Meta's files ----------------------------------------------------------------------------

PARAMS = "params.json"
RANK_FILE = re.compile(r"consolidated\.(\d+)\.pth")
_PARAMS: Config = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": None,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
"""Meta's class defaults (ModelArgs)."""
_IMPLIED = (
    *("vocab_size", "multiple_of", "ffn_dim_multiplier"),
    *("max_batch_size", "max_seq_len", "model_parallel_size"),
)
"""What the shapes say as well, or what does not concern the weights."""
_AXES = {
    r"layers\.\d+\.attention\.w[qkv]\.weight": 0,
    r"layers\.\d+\.attention\.wo\.weight": 1,
    r"layers\.\d+\.feed_forward\.w[13]\.weight": 0,
    r"layers\.\d+\.feed_forward\.w2\.weight": 1,
    r"output\.weight": 0,
}
"""Along which axis a tensor is cut over the ranks; every rank has the others whole."""


def halves(heads: int) -> Op:
    """Rows of transformers' order <-> Meta's: per head (first half, second half) <-> pairs.

    Row 2i + s of a head of Meta's is row s * D/2 + i of transformers'.
    """

    def order(tensors: Sequence[Tensor], grid: tuple[int, int], how: str) -> list[Tensor]:
        (tensor,) = tensors
        rows = tensor.shape[0]
        if rows % (2 * heads):
            raise CheckpointError(
                f"{tensor.places[0].name} cannot be {heads} heads",
                given=list(tensor.shape),
                expected=f"a multiple of {2 * heads} rows",
            )
        shape = tuple(rows // heads // 2 if side == -1 else side for side in (heads, *grid))

        def turn(array: np.ndarray) -> np.ndarray:
            return array.reshape(*shape, *array.shape[1:]).swapaxes(1, 2)

        return [derive([tensor], tensor.shape, turn, how)]

    return Op(
        lambda tensors: order(tensors, (2, -1), "halves to pairs"),
        lambda tensors: order(tensors, (-1, 2), "pairs to halves"),
    )


def meta_table(heads: int, kv_heads: int) -> NameTable:
    """Canonical <-> Meta's names."""
    block = (
        ("self_attn.q_proj", "attention.wq", halves(heads)),
        ("self_attn.k_proj", "attention.wk", halves(kv_heads)),
        ("self_attn.v_proj", "attention.wv", RENAME),
        ("self_attn.o_proj", "attention.wo", RENAME),
        ("mlp.gate_proj", "feed_forward.w1", RENAME),
        ("mlp.down_proj", "feed_forward.w2", RENAME),
        ("mlp.up_proj", "feed_forward.w3", RENAME),
        ("input_layernorm", "attention_norm", RENAME),
        ("post_attention_layernorm", "ffn_norm", RENAME),
    )
    return NameTable(
        [
            rule(EMBEDDING, "tok_embeddings.weight"),
            *(
                rule(f"{LANGUAGE}model.layers.{{n}}.{a}.weight", f"layers.{{n}}.{b}.weight", op)
                for a, b, op in block
            ),
            rule(f"{LANGUAGE}model.norm.weight", "norm.weight"),
            rule(HEAD, "output.weight"),
        ]
    )


def _meta_evidence(contents: Contents) -> str:
    ranks = rank_files(contents)
    if not ranks or not (contents.directory / PARAMS).is_file():
        return ""
    return f"{PARAMS} and {few(path.name for path in ranks)}"


def rank_files(contents: Contents) -> list[Path]:
    """`consolidated.NN.pth`, in the order of the ranks; all of them, also if one is named."""
    name = contents.path.name
    if contents.is_file and not RANK_FILE.fullmatch(name):
        return []
    found = [path for path in contents.directory.iterdir() if RANK_FILE.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(RANK_FILE.fullmatch(path.name)[1]))


def _read_meta(contents: Contents, options: Options) -> Source:
    params = read_json(contents.directory / PARAMS)
    ranks = rank_files(contents)
    stored = _whole([files.open_file(path) for path in ranks], params, contents.directory)
    stored = {name: t for name, t in stored.items() if not _is_meta_buffer(name)}
    side = pick_files(contents.directory, SIDE_FILES)
    if options.base is None:
        config = _meta_config(params, stored, contents.directory)
    else:
        base, side, _ = borrowed(contents, options)
        config = partial_config(base)
    text = canonical.text_config(config)
    table = meta_table(text["num_attention_heads"], text["num_key_value_heads"])
    tensors, dropped = to_canonical(stored, table, options)
    if text["tie_word_embeddings"] and HEAD in tensors:
        tensors = without_repeated_head(contents, tensors)
    check_complete(tensors, config, ("language",), options)
    return Source("meta", contents.path, config, tensors, side, dropped=dropped)


def _is_meta_buffer(name: str) -> bool:
    return is_buffer(name) or name == "rope.freqs"


def _whole(
    ranks: Sequence[Mapping[str, Tensor]], params: Config, directory: Path
) -> dict[str, Tensor]:
    """The tensors of all ranks put together."""
    first = ranks[0]
    for number, rank in enumerate(ranks):
        if rank.keys() != first.keys():
            raise CheckpointError(
                f"the ranks of {directory} do not belong together",
                given=f"rank {number}: {few(sorted(rank.keys() ^ first.keys()))}",
                expected="the same names in every file",
            )
    if len(ranks) == 1:
        return dict(first)
    return {
        name: _joined([rank[name] for rank in ranks], _axis(name, tensor, params))
        for name, tensor in first.items()
    }


def _axis(name: str, tensor: Tensor, params: Config) -> int | None:
    if name == "tok_embeddings.weight":
        # LLaMA 1 and 2 cut the columns of the embedding, LLaMA 3 its rows.
        return 0 if tensor.shape[1:] == (params.get("dim"),) else 1
    return next((axis for pattern, axis in _AXES.items() if re.fullmatch(pattern, name)), None)


def _joined(pieces: Sequence[Tensor], axis: int | None) -> Tensor:
    if axis is None:
        return pieces[0]
    shapes = [piece.shape for piece in pieces]
    rest = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(rest) != 1:
        raise CheckpointError(
            f"the ranks' pieces of {pieces[0].places[0].name} do not fit together",
            given=", ".join(map(str, shapes)),
        )
    shape = list(shapes[0])
    shape[axis] = sum(s[axis] for s in shapes)
    how = f"concatenate ranks along axis {axis}"
    return derive(pieces, tuple(shape), lambda *arrays: np.concatenate(arrays, axis), how)


def _meta_config(params: Config, stored: Mapping[str, Tensor], directory: Path) -> Config:
    where = f"{PARAMS} of {directory}"
    unknown = sorted(params.keys() - _PARAMS.keys() - set(_IMPLIED))
    unknown = [key for key in unknown if params[key] not in (None, False)]
    if unknown:
        raise CheckpointError(
            f"{where} says more than its fields tell the meaning of",
            given=few(f"{key} {params[key]!r}" for key in unknown),
            expected=f"only {', '.join((*_PARAMS, *_IMPLIED))}",
            fix="name a checkpoint of the same model in transformers' layout: --base DIR",
        )
    check_types(params, _PARAMS, where)
    said = {**_PARAMS, **params}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    absent = [
        n for n in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight") if n not in shapes
    ]
    if absent:
        raise CheckpointError(f"{directory} is no whole language model", given=f"no {absent[0]}")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": said["dim"],
        "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0],
        "max_position_embeddings": _context(said),
        "num_attention_heads": said["n_heads"],
        "num_hidden_layers": said["n_layers"],
        "num_key_value_heads": said["n_kv_heads"] or said["n_heads"],
        "rms_norm_eps": said["norm_eps"],
        "rope_theta": float(said["rope_theta"]),
        "vocab_size": shapes["tok_embeddings.weight"][0],
    }
    if config["vocab_size"] >= 128256:  # LLaMA 3: <|begin_of_text|>, <|end_of_text|>
        config |= {"bos_token_id": 128000, "eos_token_id": 128001}
    return canonical_config(config, dtype_of({}, stored), where)


def _context(params: Config) -> int:
    """The context of LLaMA 1, 2, 3 and Code LLaMA, which Meta's files do not state."""
    known = {1e6: 16384, 5e5: 8192}
    return known.get(params["rope_theta"], 4096 if params["norm_eps"] == 1e-5 else 2048)


DIALECTS = (
    Dialect(
        "llama",
        "LLaMA-family language model (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)",
        _evidence,
        _read,
        _write,
    ),
    Dialect(
        "meta",
        "Meta's LLaMA files (params.json, consolidated.NN.pth)",
        _meta_evidence,
        _read_meta,
        None,
    ),
)

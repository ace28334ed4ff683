"""LoRA and QLoRA: which layers are adapted, how adapters begin, and what is saved of them.

An adapted layer `language_model.model.layers.0.self_attn.q_proj` has, beside its frozen weight,
the trained parameters

    language_model.model.layers.0.self_attn.q_proj.lora_A.weight    [rank, in]
    language_model.model.layers.0.self_attn.q_proj.lora_B.weight    [out, rank]

and adds `scale * B A x` to its output (arXiv 2106.09685). With QLoRA (arXiv 2305.14314) the
weights of all Linear layers in the blocks are stored in few bits (`backends.quantised`).

Beginnings and dropout come from NumPy and the recipe's seed, so that every framework computes the
same.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from backends.quantised import layout, quantise
from unillava.errors import ConfigError
from unillava.spec import AdapterSpec, LlavaSpec, parameter_table
from unillava.training.recipe import Lora, Recipe
from unillava.training.state import Saved
from weight_convert.canonical import NEWLINE, PROJECTOR
from weight_convert.convert import plan
from weight_convert.dialects import original
from weight_convert.dialects.peft import NEWEST
from weight_convert.source import Adapter, Content, Options, Source
from weight_convert.storage.tensor import Tensor

Shapes = dict[str, tuple[int, ...]]

LANGUAGE = "language_model."
LINEAR = re.compile(r"language_model\.((?:model\.layers|transformer\.blocks)\.\d+\..+)\.weight")
"""Weights of the decoder's blocks; those with two axes are of Linear layers."""
LOW = (".lora_A.weight", ".lora_B.weight")
KEPT = "parameter/"
"""How the state's names of parameters begin."""


# --- which layers ----------------------------------------------------------------------------


def linear_layers(spec: LlavaSpec) -> Shapes:
    """Path under `language_model` -> (out, in) of every layer that can be adapted."""
    found = {LINEAR.fullmatch(name): shape for name, shape in parameter_table(spec).items()}
    return {match[1]: shape for match, shape in found.items() if match and len(shape) == 2}


def adapter_spec(spec: LlavaSpec, lora: Lora) -> AdapterSpec:
    """The adapters that a recipe asks for.

    Raises:
        ConfigError: a pattern that no layer matches (names the nearest), or layers that cannot be
            stored in the bits asked for.
    """
    layers = linear_layers(spec)
    for pattern in lora.targets:
        if not fnmatch.filter(layers, pattern):
            raise _no_match(pattern, layers)
    if lora.base != "full":
        _check_sizes(layers, lora.base)
    return AdapterSpec(
        modules=frozenset(
            n for n in layers if any(fnmatch.fnmatchcase(n, p) for p in lora.targets)
        ),
        rank=lora.rank,
        scale=lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank),
        dropout=lora.dropout,
        base=lora.base,
    )


def _no_match(pattern: str, layers: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(pattern, layers, 2, cutoff=0.3)
    kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in layers)
    return ConfigError(
        f"no layer matches lora.targets {pattern!r}",
        given=f"nearest: {', '.join(near) or 'none'}",
        expected=f"patterns of whole paths under language_model: {', '.join(kinds)}",
        fix="* stands for anything, dots too: '*.self_attn.q_proj'",
    )


def _check_sizes(layers: Shapes, kind: str) -> None:
    for name, (rows, columns) in layers.items():
        try:
            layout(columns, rows, kind)
        except ValueError as error:
            raise ConfigError(
                f"lora.base {kind} cannot hold {name}", given=error, fix="use int8 or full"
            ) from None


def adapter_table(spec: LlavaSpec, lora: Lora) -> Shapes:
    """Canonical name -> shape of every adapter's matrices, in the order of the layers.

    Raises:
        ConfigError: see `adapter_spec`.
    """
    chosen = adapter_spec(spec, lora).modules
    table: Shapes = {}
    for path, (rows, columns) in linear_layers(spec).items():
        if path in chosen:
            shapes = ((lora.rank, columns), (rows, lora.rank))
            table |= {f"{LANGUAGE}{path}{end}": s for end, s in zip(LOW, shapes, strict=True)}
    return table


def stored_bits(spec: LlavaSpec, kind: str) -> dict[str, float]:
    """Canonical name of a weight in few bits -> bits per element, scales included."""
    if kind == "full":
        return {}
    bits = {}
    for path, (rows, columns) in linear_layers(spec).items():
        held = layout(columns, rows, kind).values()
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in held)
        bits[f"{LANGUAGE}{path}.weight"] = 8 * size / (rows * columns)
    return bits


# --- values ----------------------------------------------------------------------------------


def first_values(
    table: Mapping[str, tuple[int, ...]], seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array float32) of every adapter's matrix before the first step.

    A is uniform within 1 / sqrt(in), as PEFT's (Kaiming's rule with a = sqrt(5)); B is zero.
    """
    for name, shape in table.items():
        if name.endswith(LOW[1]):
            yield name, np.zeros(shape, np.float32)
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        bound = 1 / math.sqrt(shape[1])
        yield name, rng.uniform(-bound, bound, shape).astype(np.float32)


def in_few_bits(
    tensors: Iterable[tuple[str, np.ndarray, bool]], kind: str
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """A stream of weights with `codes` and `scale` in place of each that is stored in few bits.

    Args:
        tensors: (canonical name, array, whether uint16 means bfloat16), as a checkpoint gives.
        kind: of `backends.quantised`, or full, which changes nothing.
    """
    for name, array, is_bfloat16 in tensors:
        if kind == "full" or array.ndim != 2 or not LINEAR.fullmatch(name):
            yield name, array, is_bfloat16
            continue
        codes, scale = quantise(array, kind)
        yield f"{name.removesuffix('weight')}codes", codes, False
        yield f"{name.removesuffix('weight')}scale", scale, False


def dropout_noise(
    arrays: Mapping[str, np.ndarray], spec: LlavaSpec, recipe: Recipe, step: int
) -> dict[str, np.ndarray]:
    """What dropout in adapters is decided by (`ops.dropout`): `noise_rows`, `noise_columns`.

    Drawn anew for each step, and for each row from what is written in it: so it does not matter
    which rank or micro-batch a row falls to, nor how far it is padded.

    Args:
        arrays: a batch; `input_ids` and `segment_ids` [B, S] matter.
        spec: the model.
        recipe: without dropout the result is empty.
        step: finished updates.
    """
    if recipe.lora is None or recipe.lora.dropout == 0:
        return {}
    ids_BS, segments_BS = arrays["input_ids"], arrays["segment_ids"]
    seed = [recipe.running.seed, step]
    rows = [
        _odd([*seed, zlib.crc32(ids[segments > 0].tobytes())], len(ids))
        for ids, segments in zip(ids_BS, segments_BS, strict=True)
    ]
    widest = max(shape[1] for shape in linear_layers(spec).values())
    return {"noise_rows": np.stack(rows), "noise_columns": _odd(seed, widest)}


def _odd(seed: list[int], count: int) -> np.ndarray:
    """Odd int32 numbers, as int64."""
    return np.random.default_rng(seed).integers(-(2**30), 2**30, count) * 2 + 1


# --- what is saved ---------------------------------------------------------------------------


def adapter_source(start: Source, recipe: Recipe, saved: Saved) -> Source:
    """What a run has learnt, as an adapter that can be written in PEFT's or Paddle's form.

    Besides the adapters it holds, in full, the other parts that were trained; and the projector
    also where the base on the disk has another one or none.

    Args:
        start: the model that the run began with.
        recipe: its recipe.
        saved: a checkpoint of the run.
    """
    learnt = {n.removeprefix(KEPT): t for n, t in saved.tensors.items() if n.startswith(KEPT)}
    modules = [n.removesuffix(LOW[0]) for n in learnt if n.endswith(LOW[0])]
    pairs = {module: (learnt[module + LOW[0]], learnt[module + LOW[1]]) for module in modules}
    lora, model = recipe.lora, recipe.model
    return Source(
        "unillava",
        start.path,
        start.config,
        {**_own_projector(start, recipe), **{n: t for n, t in learnt.items() if _is_whole(n)}},
        files=_files(start, recipe),
        adapter=Adapter(
            lora.rank,
            lora.alpha,
            {
                "base_model_name_or_path": model.path or model.language,
                "bias": "none",
                "lora_dropout": lora.dropout,
                "use_rslora": lora.rslora,
            },
            pairs,
        ),
    )


def _is_whole(name: str) -> bool:
    return not name.endswith(LOW)


def _own_projector(start: Source, recipe: Recipe) -> dict[str, Tensor]:
    """The projector that the run began with, unless it is the one of the base."""
    if recipe.model.path is not None and recipe.model.pretrain_mm_mlp_adapter is None:
        return {}
    return {n: t for n, t in start.tensors.items() if n.startswith((PROJECTOR, NEWLINE))}


def spelling_of(start: Source, recipe: Recipe) -> str:
    """Whose names the adapter is saved with: original LLaVA's, or transformers'.

    As `lora.names` says; auto: those of the base, and original LLaVA's for a base that is a plain
    language model, since no transformers model has that as a base.
    """
    names = recipe.lora.names
    if names == "auto":
        plain = recipe.model.path is None or start.dialect == original.NAME
        names = "original" if plain else "transformers"
    return "original" if names == "original" else NEWEST


def _files(start: Source, recipe: Recipe) -> dict[str, Content]:
    """Tokenizer and processor; and config.json, which original LLaVA wants beside an adapter."""
    if spelling_of(start, recipe) != "original":
        return dict(start.files)
    written = plan(start, original.NAME, Path(recipe.output) / "final", Options()).target.documents
    return {**start.files, "config.json": written["config.json"]}

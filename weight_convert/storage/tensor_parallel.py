"""Tensor-parallel checkpoints of PaddleNLP: one file for each rank, put together lazily.

Every rank saves `model_state.tpNN.pdparams` with all names, and its part of each tensor that is
split. Matrices have Paddle's orientation, [in, out]. Column-parallel layers are split on the last
axis, row-parallel ones and the embedding on the first; everything else is on every rank alike, and
so are keys and values where there are fewer heads than ranks to share them, and the embedding and
the head where the vocabulary cannot be divided. How many heads and words there are stands in
config.json only, so that it is needed; what it says is held against the tensors.

Source: PaddleNLP 3.0.0b4, transformers/conversion_utils.py, llama and qwen2 modeling.py
(`_get_tensor_parallel_mappings`), peft/lora/lora_model.py (`_get_tensor_parallel_mappings`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.storage.pdparams import open_file
from weight_convert.storage.tensor import NUMPY_DTYPES, Place, Tensor, few

CONFIG_FILE = "config.json"
_LAYER = r"(?:\w+\.)?layers\.\d+\."
"""At most one name stands before: the layers of a vision tower lie deeper, and are not split."""
_STEP = 2**22


@dataclass(frozen=True)
class Rule:
    """How tensors of some names are split."""

    names: str
    """Regular expression for the whole name."""
    axis: int
    """0 or -1."""
    size: str
    """What the axis counts when it is whole: a field of `Sizes`."""
    parts: int = 1
    """Matrices that lie side by side on the axis; each of them is split."""


RULES = (
    Rule(r"(?:\w+\.)?embed_tokens\.weight", 0, "words"),
    Rule(r"lm_head\.weight", -1, "words"),
    Rule(_LAYER + r"self_attn\.q_proj\.(?:weight|bias|lora_B)", -1, "queries"),
    Rule(_LAYER + r"self_attn\.[kv]_proj\.(?:weight|bias|lora_B)", -1, "keys"),
    # Grouped by head of the keys, so that the ranks' parts follow each other.
    Rule(_LAYER + r"self_attn\.qkv_proj\.(?:weight|bias|lora_B)", -1, "queries_keys_values"),
    Rule(_LAYER + r"self_attn\.o_proj\.(?:weight|lora_A)", 0, "queries"),
    Rule(_LAYER + r"mlp\.(?:gate|up)_proj\.(?:weight|bias|lora_B)", -1, "inner"),
    # PaddleNLP joins this lora_B as if it were one matrix, which does not fit the joined weight.
    Rule(_LAYER + r"mlp\.gate_up_fused_proj\.(?:weight|bias|lora_B)", -1, "gate_and_up", parts=2),
    Rule(_LAYER + r"mlp\.down_proj\.(?:weight|lora_A)", 0, "inner"),
)
"""The first rule that matches decides. What no rule names must be the same on every rank."""
TIED_HEAD = Rule(r"lm_head\.weight", 0, "words")
"""A head that shares the embedding has its shape."""


@dataclass(frozen=True)
class Sizes:
    """Whole sizes of the axes that are split, by config.json."""

    words: int
    queries: int
    keys: int
    queries_keys_values: int
    inner: int
    gate_and_up: int
    shares: Mapping[str, int]
    """Size -> how many things there are to share out, where ranks may be too many for them."""
    tied: bool

    def is_split(self, size: str, ranks: int) -> bool:
        """Whether an axis of this size is split; if not, every rank has all of it."""
        return self.shares.get(size, ranks) % ranks == 0


# --- opening ---------------------------------------------------------------------------------


def open_tensor_parallel(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    config: Mapping[str, Any] | None = None,
    *,
    stem: str = "model_state",
) -> dict[str, Tensor]:
    """Every tensor of a tensor-parallel checkpoint, whole, not read yet.

    One rank's part is read after the other: there is never more in memory than the whole tensor
    and one part of it.

    Args:
        source: a directory with `{stem}.tp00.pdparams`, `{stem}.tp01.pdparams`, ... (each may be
            cut into `-00001-of-0000N`); or the files, in the order of the ranks.
        config: the contents of config.json; that of the directory by default.
        stem: "lora_model_state" for the adapters of LoRA.

    Raises:
        CheckpointError: a rank or the configuration is absent, or they contradict each other; when
            a tensor is read that every rank should have alike, also if the ranks differ.
    """
    if isinstance(source, (str, os.PathLike)):
        directory = Path(source)
        files = _find_ranks(directory, stem)
        config = _read_config(directory / CONFIG_FILE) if config is None else config
    else:
        files = [[Path(path)] for path in source]
    if config is None:
        raise CheckpointError(
            "files of ranks cannot be put together without their configuration",
            fix="name the directory with its config.json instead of the files",
        )
    return merge_ranks([_open_rank(paths) for paths in files], config)


def merge_ranks(
    ranks: Sequence[Mapping[str, Tensor]], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The whole tensors of which each rank has a part; see `open_tensor_parallel`.

    Args:
        ranks: the tensors of every rank, in order.
        config: the contents of config.json.
    """
    if not ranks:
        raise CheckpointError("a tensor-parallel checkpoint without ranks")
    degree = config.get("tensor_parallel_degree")
    if isinstance(degree, int) and degree > 1 and degree != len(ranks):
        raise CheckpointError(
            "ranks of a tensor-parallel checkpoint are missing, or there are too many",
            given=f"{len(ranks)} ranks",
            expected=f"{degree}, as config.json says",
        )
    sizes = _read_sizes(config)
    _check_names(ranks)
    return {name: _merge(name, [rank[name] for rank in ranks], sizes) for name in ranks[0]}


def _find_ranks(directory: Path, stem: str) -> list[list[Path]]:
    """The files of each rank."""
    pattern = re.compile(
        re.escape(stem) + r"\.tp(\d+)(_\w+)?(?:-(\d{5})-of-(\d{5}))?\.pdparams", re.ASCII
    )
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read", given=error.strerror) from None
    found = [match for match in map(pattern.fullmatch, names) if match]
    others = [match[0] for match in found if match[2]]
    if others:
        raise CheckpointError(
            f"{directory} is parallel in more ways than tensors, which is not supported",
            given=few(others),
            fix="let PaddleNLP save it with merge_tensor_parallel, or on one pipeline stage",
        )
    ranks = sorted({int(match[1]) for match in found})
    if not ranks or ranks != list(range(len(ranks))):
        raise CheckpointError(
            f"ranks are missing in {directory}",
            given=few(match[0] for match in found) or f"no {stem}.tpNN.pdparams",
            expected=f"{stem}.tp00.pdparams and on, without a gap",
        )
    return [_order_pieces(directory, [m for m in found if int(m[1]) == rank]) for rank in ranks]


def _order_pieces(directory: Path, matches: list[re.Match[str]]) -> list[Path]:
    """The files of one rank: one, or pieces 1 to N of N."""
    numbers = [(match[3], match[4]) for match in matches]
    count = len(matches)
    if numbers != [(None, None)] and numbers != [
        (f"{number:05d}", f"{count:05d}") for number in range(1, count + 1)
    ]:
        raise CheckpointError(
            f"{directory} does not hold one complete set of files for each rank",
            given=few(match[0] for match in matches),
        )
    return [directory / match[0] for match in matches]


def _open_rank(paths: Iterable[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        piece = open_file(path)
        twice = sorted(tensors.keys() & piece.keys())
        if twice:
            raise CheckpointError(f"{path} holds tensors that another piece has", given=few(twice))
        tensors.update(piece)
    return tensors


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON, and it says how the ranks belong together", given=error
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object", given=type(config).__name__)
    return config


def _read_sizes(config: Mapping[str, Any]) -> Sizes:
    heads = _read_count(config, "num_attention_heads")
    kv_heads = heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = _read_count(config, "num_key_value_heads")
    head_size = _read_count(config, "hidden_size") // heads
    words, inner = _read_count(config, "vocab_size"), _read_count(config, "intermediate_size")
    return Sizes(
        words=words,
        queries=heads * head_size,
        keys=kv_heads * head_size,
        queries_keys_values=(heads + 2 * kv_heads) * head_size,
        inner=inner,
        gate_and_up=2 * inner,
        shares={"words": words, "keys": kv_heads},
        tied=config.get("tie_word_embeddings") is True,
    )


def _read_count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"config.json does not say how the ranks belong together: {key}",
            given=value,
            expected="a number above 0",
        )
    return value


def _check_names(ranks: Sequence[Mapping[str, Tensor]]) -> None:
    for number, rank in enumerate(ranks):
        odd = sorted(rank.keys() ^ ranks[0].keys())
        if odd:
            raise CheckpointError(
                "ranks of a tensor-parallel checkpoint hold different tensors",
                given=f"only one of rank 0 and rank {number} has {few(odd)}",
                fix="the files come from different saves; copy all of one save",
            )


# --- merging ---------------------------------------------------------------------------------


def _merge(name: str, tensors: list[Tensor], sizes: Sizes) -> Tensor:
    kinds = {(tensor.dtype, tensor.shape) for tensor in tensors}
    if len(kinds) > 1:
        raise _contradiction(name, few(f"{t.dtype} {t.shape}" for t in tensors), "the same")
    rule = _find_rule(name, sizes)
    if rule is None:
        return _replicated(name, tensors)
    return _join(name, tensors, rule, sizes)


def _find_rule(name: str, sizes: Sizes) -> Rule | None:
    rules = (TIED_HEAD, *RULES) if sizes.tied else RULES
    return next((rule for rule in rules if re.fullmatch(rule.names, name)), None)


def _join(name: str, tensors: list[Tensor], rule: Rule, sizes: Sizes) -> Tensor:
    """The tensor whose parts these are; or any of them, if there is nothing to share out."""
    ranks, expected = len(tensors), getattr(sizes, rule.size)
    split = sizes.is_split(rule.size, ranks)
    dtype, part = tensors[0].dtype, tensors[0].shape
    held = part[rule.axis] if part else 0
    if held * (ranks if split else 1) != expected or held % rule.parts:
        raise _contradiction(
            name,
            f"{ranks} ranks with {part}",
            f"{expected} on axis {rule.axis}, by config.json, "
            + ("in equal parts" if split else "whole on every rank"),
        )
    if not split:
        return _replicated(name, tensors)
    axis = rule.axis % len(part)
    before, step, behind = part[:axis], held // rule.parts, part[axis + 1 :]
    shape = (*before, expected, *behind)

    def read() -> np.ndarray:
        whole = np.empty((*before, rule.parts, ranks, step, *behind), NUMPY_DTYPES[dtype])
        by_rank = np.moveaxis(whole, axis + 1, 0)
        for target, tensor in zip(by_rank, tensors, strict=True):
            target[...] = tensor.read().reshape(*before, rule.parts, step, *behind)
        return whole.reshape(shape)

    how = f"join {ranks} ranks on axis {rule.axis}"
    return Tensor(dtype, shape, read, _all_places(tensors), (how,))


def _replicated(name: str, tensors: list[Tensor]) -> Tensor:
    """The first of tensors that must all be equal, which is seen when it is read."""
    first = tensors[0]

    def read() -> np.ndarray:
        array = first.read()
        for rank, tensor in enumerate(tensors[1:], 1):
            if not _equal_bits(array, tensor.read()):
                raise _contradiction(
                    name,
                    f"ranks 0 and {rank} hold different values",
                    "the same on every rank, for PaddleNLP does not split it",
                )
        return array

    return Tensor(first.dtype, first.shape, read, _all_places(tensors), first.how)


def _equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the bytes are equal (NaN too), in steps that take little memory."""
    a, b = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    return all(
        np.array_equal(a[begin : begin + _STEP], b[begin : begin + _STEP])
        for begin in range(0, a.size, _STEP)
    )


def _all_places(tensors: Iterable[Tensor]) -> tuple[Place, ...]:
    return tuple(place for tensor in tensors for place in tensor.places)


def _contradiction(name: str, given: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name!r} is not what the ranks of one checkpoint hold",
        given=given,
        expected=expected,
        fix="the files, or they and config.json, come from different saves; copy all of one save",
    )

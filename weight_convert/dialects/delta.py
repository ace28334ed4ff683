"""LLaVA's delta weights: what fine-tuning changed, to be added to a LLaMA that one has already.

A delta looks like the original LLaVA checkpoint that it was made of, with differences in place of
weights: nothing in it tells. It is therefore recognised only if this program made it, by
`BASE_FILE`; otherwise say `--from delta`. The model it belongs to is given with `--base`.

As LLaVA does it: element by element in the dtype that the file has, base and target in the same
one. What the base lacks (projector, newline, vision tower) is stored as it is; so are the rows
and columns by which the embedding and the head outgrow those of the base. In half precision
adding the difference back does not always give the target bit for bit: where target and base are
far apart, the difference is rounded. The model is then what this addition gives, for LLaVA's own
tool and for this one. A delta made with `--dtype float32` gives the target back exactly where both
are in half precision and below 0.5, and serves LLaVA's tool, which rounds it, as well.

Source: LLaVA, llava/model/{make_delta,apply_delta}.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from weight_convert.blocks import for_blocks
from weight_convert.canonical import EMBEDDING, HEAD, LANGUAGE, Config, part_of
from weight_convert.cast import cast, from_float, to_float
from weight_convert.contents import Contents, Replaced
from weight_convert.dialects import registry
from weight_convert.dialects.base import Dialect
from weight_convert.dialects.hf import SIDE_FILES
from weight_convert.dialects.vocabulary import trim
from weight_convert.errors import CheckpointError
from weight_convert.mapping import derive
from weight_convert.opening import open_source
from weight_convert.source import Options, Source, Target, WeightFile, as_json
from weight_convert.storage.tensor import Tensor, few

BASE_FILE = "unillava_delta.json"
GROWING = (EMBEDDING, HEAD)
"""Matrices that may be larger than the base's."""

# --- arithmetic ------------------------------------------------------------------------------

Combine = Callable[..., np.ndarray]


def subtracted(target: Tensor, base: Tensor) -> Tensor:
    """target - base where both have values, target elsewhere; lazily, in the dtype of target.

    Args:
        target: of any shape.
        base: of no larger shape.
    """
    return _combined(target, base, np.subtract, "- base", in_place=False)


def added(delta: Tensor, base: Tensor) -> Tensor:
    """delta + base where both have values, delta elsewhere; lazily, in the dtype of delta.

    The sum takes the place of what reading `delta` gives, which saves one tensor of memory.

    Args:
        delta: of any shape.
        base: of no larger shape.
    """
    return _combined(delta, base, np.add, "+ base", in_place=True)


def _combined(first: Tensor, base: Tensor, combine: Combine, how: str, *, in_place: bool) -> Tensor:
    code = first.dtype
    if len(first.shape) == 0:
        raise CheckpointError(f"{first.places[0].name} is a single number, not a weight")

    def compute(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        result = values if in_place and values.flags.writeable else np.empty_like(values)
        common = tuple(slice(size) for size in others.shape)
        if others.shape != values.shape and result is not values:
            result[...] = values

        def work(rows: slice) -> None:
            _store(code, combine, result[common][rows], values[common][rows], others[rows])

        for_blocks(len(others), others[:1].size, work)
        return result

    return derive([first, cast(base, code)], first.shape, compute, how, code)


def _store(
    code: str, combine: Combine, result: np.ndarray, first: np.ndarray, second: np.ndarray
) -> None:
    """result = combine(first, second), rounded as torch does: float16 and bfloat16 by float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        if code == "BF16":
            result[...] = from_float(combine(to_float(first, code), to_float(second, code)), code)
        else:
            combine(first, second, out=result)


# --- the base --------------------------------------------------------------------------------


def _open_base(options: Options, what: str) -> dict[str, Tensor]:
    """The base's language model under its names in original LLaVA.

    Raises:
        CheckpointError: none is named, or it has no language model.
    """
    if options.base is None:
        raise CheckpointError(
            f"{what} needs the model that it is the difference to",
            fix="name it, usually the LLaMA that training began with: --base DIR",
        )
    source = trim(open_source(options.base, replace(options, base=None)))
    held = {n: tensor for n, tensor in source.tensors.items() if part_of(n) == "language"}
    if not held:
        raise CheckpointError(f"{options.base} has no language model", given=source.dialect)
    return {name.removeprefix(LANGUAGE): tensor for name, tensor in held.items()}


def _check_fits(name: str, tensor: Tensor, base: Tensor, where: object) -> None:
    same = len(tensor.shape) == len(base.shape)
    grown = same and all(a >= b for a, b in zip(tensor.shape, base.shape, strict=True))
    if tensor.shape == base.shape or (grown and f"{LANGUAGE}{name}" in GROWING):
        return
    raise CheckpointError(
        f"{name} does not fit the base",
        given=f"{list(tensor.shape)}, base {list(base.shape)}",
        expected="one shape; only the embedding and the head may have more rows than the base's",
        fix=f"{where} is not the base of these weights: name the right one with --base",
    )


def _norms(base: Mapping[str, Tensor], code: str) -> Config:
    """sha256 of the base's smallest tensors, by which a wrong base is noticed."""
    vectors = {n: t for n, t in base.items() if len(t.shape) == 1}
    arrays = {name: cast(tensor, code).read() for name, tensor in vectors.items()}
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


# --- applying --------------------------------------------------------------------------------


def _evidence(contents: Contents) -> str:
    return f"a file {BASE_FILE}" if BASE_FILE in contents.names else ""


def _read(contents: Contents, options: Options) -> Source:
    """The model that the delta makes of its base, as original LLaVA's directory would have it."""
    base = _open_base(options, f"{contents.path}, a delta,")
    stored = contents.tensors
    language = {n: tensor for n, tensor in stored.items() if n in base}
    absent = sorted(base.keys() - language.keys())
    if absent:
        raise CheckpointError(
            f"{contents.path} is no delta of {options.base}",
            given=f"tensors of the base that it lacks: {few(absent)}",
            fix="name the right base with --base",
        )
    for name, tensor in language.items():
        _check_fits(name, tensor, base[name], options.base)
    _check_base(contents, base, options)
    tensors = {n: added(t, base[n]) if n in base else t for n, t in stored.items()}
    side = contents.side_files(SIDE_FILES)
    model = Replaced(contents.path, tensors, contents.config, side, contents.manifest)
    source = registry.named("original").read(model, replace(options, base=None))
    note = f"{len(language)} tensors were added to those of {options.base}"
    return replace(source, dialect="delta", notes=(*source.notes, note))


def _check_base(contents: Contents, base: Mapping[str, Tensor], options: Options) -> None:
    """With another base the sums are numbers without meaning, and nothing else would tell."""
    promised = contents.json(BASE_FILE).get("base", {})
    if not isinstance(promised, dict):
        raise CheckpointError(f"{contents.path / BASE_FILE} is damaged", given=repr(promised)[:50])
    code = next(iter(contents.tensors.values())).dtype
    found = _norms(base, code) if promised else {}
    wrong = [name for name, digest in promised.items() if found.get(name) != digest]
    if wrong:
        raise CheckpointError(
            f"{options.base} is not the base that the delta was made with",
            given=f"{len(wrong)} of {len(promised)} norms are others: {few(wrong)}",
            fix="name the right base with --base",
        )


# --- making ----------------------------------------------------------------------------------


def _write(source: Source, options: Options) -> Target:
    """What original LLaVA's directory would be, with differences in place of weights."""
    base = _open_base(options, "a delta")
    target = registry.named("original").write(source, replace(options, base=None))
    written = {name for file in target.weights for name in file.tensors}
    absent = sorted(base.keys() - written)
    if absent:
        raise CheckpointError(
            f"{source.path} was not made of {options.base}", given=f"it has no {few(absent)}"
        )
    weights = tuple(_difference(file, base, options) for file in target.weights)
    code = next(t.dtype for file in weights for n, t in file.tensors.items() if n in base)
    documents = {**target.documents, BASE_FILE: as_json({"base": _norms(base, code)})}
    return replace(target, dialect="delta", weights=weights, documents=documents)


def _difference(file: WeightFile, base: Mapping[str, Tensor], options: Options) -> WeightFile:
    tensors = {}
    for name, tensor in file.tensors.items():
        if name in base:
            _check_fits(name, tensor, base[name], options.base)
            tensor = subtracted(tensor, base[name])
        tensors[name] = tensor
    return replace(file, tensors=tensors)


DELTA = Dialect(
    "delta",
    "LLaVA delta weights: differences to --base (say --from delta: nothing in them tells)",
    _evidence,
    _read,
    _write,
)
DIALECTS = (DELTA,)

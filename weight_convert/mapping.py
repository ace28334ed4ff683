"""Rules between the names of two layouts: renaming, turning, cutting and joining, both ways.

A rule pairs canonical names with stored names and an operation that carries its inverse. Names
are templates: `{n}` stands for a number, `{p}` for `weight` or `bias`. A `NameTable` checks when
it is built that it is a bijection. Everything is lazy: mapped tensors are read when they are
written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from weight_convert.errors import CheckpointError
from weight_convert.storage.tensor import Tensor

Transform = Callable[[Sequence[Tensor]], list[Tensor]]
VARIABLES = {"n": r"\d+", "p": "weight|bias"}


@dataclass(frozen=True)
class Op:
    """What happens to the tensors of a rule, from canonical to stored and back."""

    to_stored: Transform
    to_canonical: Transform


@dataclass(frozen=True)
class Rule:
    """Canonical names, stored names, and what lies between them."""

    canonical: tuple[str, ...]
    stored: tuple[str, ...]
    op: Op


# --- operations ------------------------------------------------------------------------------


def derive(
    tensors: Sequence[Tensor],
    shape: tuple[int, ...],
    function: Callable[..., np.ndarray],
    how: str,
    dtype: str | None = None,
) -> Tensor:
    """A lazy tensor: `function` of the arrays of `tensors`, when it is read.

    Args:
        tensors: the inputs; they must have one dtype unless `dtype` is given.
        shape: of the result.
        function: gets the arrays, returns one array of that shape in any memory order.
        how: a word for people, e.g. `transpose`.
        dtype: code of the result; that of the inputs if absent.

    Raises:
        CheckpointError: the inputs have several dtypes.
    """
    codes = sorted({tensor.dtype for tensor in tensors})
    if dtype is None and len(codes) > 1:
        names = ", ".join(f"{t.places[0].name} {t.dtype}" for t in tensors)
        raise CheckpointError(
            f"tensors that belong together have different dtypes ({how})",
            given=names,
            fix="convert with --dtype, which makes them the same",
        )

    def read() -> np.ndarray:
        return np.ascontiguousarray(function(*(tensor.read() for tensor in tensors))).reshape(shape)

    places = tuple(dict.fromkeys(place for tensor in tensors for place in tensor.places))
    steps = tuple(dict.fromkeys(step for tensor in tensors for step in tensor.how))
    return Tensor(dtype or codes[0], tuple(shape), read, places, (*steps, how))


def _same(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


def _transposed(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_turn(tensor) if len(tensor.shape) == 2 else tensor for tensor in tensors]


TILE_ROWS, TILE_COLUMNS = 512, 128
"""The rectangles in which a matrix is turned; measured with 2- and 4-byte values."""


def _turn(tensor: Tensor) -> Tensor:
    return derive([tensor], tensor.shape[::-1], transposed, "transpose")


def transposed(array_IJ: np.ndarray) -> np.ndarray:
    """A contiguous transpose, [I, J] -> [J, I], several times faster than one sweep.

    Each tile is first copied: its rows then lie side by side in the cache, where in the matrix
    they would push one another out.
    """
    rows, columns = array_IJ.shape
    turned_JI = np.empty((columns, rows), array_IJ.dtype)
    for i in range(0, rows, TILE_ROWS):
        for j in range(0, columns, TILE_COLUMNS):
            tile = np.ascontiguousarray(array_IJ[i : i + TILE_ROWS, j : j + TILE_COLUMNS])
            turned_JI[j : j + TILE_COLUMNS, i : i + TILE_ROWS] = tile.T
    return turned_JI


RENAME = Op(_same, _same)
TRANSPOSE = Op(_transposed, _transposed)
"""Matrices are turned; vectors (biases, norms) stay."""


def joined(count: int) -> Op:
    """`count` tensors of one shape <-> one, stacked along the first axis."""

    def join(tensors: Sequence[Tensor]) -> list[Tensor]:
        first = _alike(tensors, "joined along the first axis")
        shape = (count * first.shape[0], *first.shape[1:])
        return [derive(tensors, shape, lambda *arrays: np.concatenate(arrays), "concatenate")]

    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        rows = _divided(whole, count, f"{count} equal parts")
        shape = (rows, *whole.shape[1:])
        return [
            derive([whole], shape, lambda a, k=k: a[k * rows : (k + 1) * rows], f"part {k + 1}")
            for k in range(count)
        ]

    return Op(join, cut)


def interleaved(count: int) -> Op:
    """`count` tensors of one shape <-> one whose rows alternate between them."""

    def join(tensors: Sequence[Tensor]) -> list[Tensor]:
        first = _alike(tensors, "interleaved")
        shape = (count * first.shape[0], *first.shape[1:])
        return [derive(tensors, shape, lambda *arrays: np.stack(arrays, 1), "interleave rows")]

    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        rows = _divided(whole, count, f"{count} alternating parts")
        shape = (rows, *whole.shape[1:])
        return [
            derive([whole], shape, lambda a, k=k: a[k::count], f"rows {k + 1} of {count}")
            for k in range(count)
        ]

    return Op(join, cut)


def grouped_qkv(heads: int, kv_heads: int) -> Op:
    """q, k, v <-> one tensor whose rows are grouped by key/value head: [its q heads | k | v].

    The layout of InternLM2 and MOSS2 (`wqkv`), MindFormers (`w_qkv`) and, turned, PaddleNLP.
    Weights [heads * D, ...] and biases alike.
    """
    per_group = heads // kv_heads
    slots = per_group + 2

    def join(tensors: Sequence[Tensor]) -> list[Tensor]:
        query, key, value = tensors
        size = _divided(query, heads, f"{heads} heads")
        if not key.shape == value.shape == (kv_heads * size, *query.shape[1:]):
            raise _unlike(tensors, f"k and v with {kv_heads} heads of {size} rows")
        tail = query.shape[1:]

        def fuse(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            fused = np.empty((kv_heads, slots, size, *tail), q.dtype)
            fused[:, :per_group] = q.reshape(kv_heads, per_group, size, *tail)
            fused[:, per_group] = k.reshape(kv_heads, size, *tail)
            fused[:, per_group + 1] = v.reshape(kv_heads, size, *tail)
            return fused

        return [derive(tensors, (kv_heads * slots * size, *tail), fuse, "group q,k,v by kv head")]

    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        size = _divided(whole, kv_heads * slots, f"{kv_heads} groups of {slots} heads")
        tail = whole.shape[1:]

        def part(which: slice, count: int, label: str) -> Tensor:
            def take(fused: np.ndarray) -> np.ndarray:
                return fused.reshape(kv_heads, slots, size, *tail)[:, which]

            return derive([whole], (count * size, *tail), take, label)

        return [
            part(slice(0, per_group), heads, "q of the groups"),
            part(slice(per_group, per_group + 1), kv_heads, "k of the groups"),
            part(slice(per_group + 1, slots), kv_heads, "v of the groups"),
        ]

    return Op(join, cut)


def then(first: Op, second: Op) -> Op:
    """`first`, then `second` on the way to the stored tensors; the inverses in reverse order."""
    return Op(
        lambda tensors: second.to_stored(first.to_stored(tensors)),
        lambda tensors: first.to_canonical(second.to_canonical(tensors)),
    )


def _alike(tensors: Sequence[Tensor], what: str) -> Tensor:
    if len({tensor.shape for tensor in tensors}) != 1:
        raise _unlike(tensors, f"one shape, to be {what}")
    return tensors[0]


def _divided(tensor: Tensor, parts: int, what: str) -> int:
    if not tensor.shape or tensor.shape[0] % parts:
        raise _unlike([tensor], f"rows that divide into {what}")
    return tensor.shape[0] // parts


def _unlike(tensors: Sequence[Tensor], expected: str) -> CheckpointError:
    given = ", ".join(f"{t.places[0].name} {list(t.shape)}" for t in tensors)
    return CheckpointError("a tensor has a shape that cannot be", given=given, expected=expected)


# --- tables ----------------------------------------------------------------------------------


def rule(canonical: str | Iterable[str], stored: str | Iterable[str], op: Op = RENAME) -> Rule:
    """A rule; a single name may be given as a string."""
    sides = ((side,) if isinstance(side, str) else tuple(side) for side in (canonical, stored))
    return Rule(*sides, op)


def prefixed(rules: Iterable[Rule], canonical: str, stored: str) -> list[Rule]:
    """The rules with a prefix before all names of each side."""
    return [
        replace(
            item,
            canonical=tuple(canonical + name for name in item.canonical),
            stored=tuple(stored + name for name in item.stored),
        )
        for item in rules
    ]


@dataclass
class Mapped:
    """The outcome of a table: the tensors under their new names, and what did not fit."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)
    """Names that no rule knows."""
    lacking: dict[str, list[str]] = field(default_factory=dict)
    """Names that belong to an incomplete group -> the names that the group lacks."""


class NameTable:
    """Rules in both directions.

    Raises:
        CheckpointError: the rules are not a bijection: a template of one side matches a name of
            another one, or the two sides of a rule have different variables.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        for item in self.rules:
            _check_variables(item)
        self._by_canonical = _Side([item.canonical for item in self.rules])
        self._by_stored = _Side([item.stored for item in self.rules])

    def to_canonical(self, stored: Mapping[str, Tensor]) -> Mapped:
        """Stored tensors under canonical names, in the order given."""
        return _apply(
            stored,
            self._by_stored,
            [(item.stored, item.canonical, item.op.to_canonical) for item in self.rules],
        )

    def to_stored(self, canonical: Mapping[str, Tensor]) -> Mapped:
        """Canonical tensors under stored names, in the order given."""
        return _apply(
            canonical,
            self._by_canonical,
            [(item.canonical, item.stored, item.op.to_stored) for item in self.rules],
        )


class _Side:
    """One side of all rules: finds the rule and the variables of a name."""

    def __init__(self, templates: Sequence[tuple[str, ...]]) -> None:
        flat = [(t, k, i) for k, group in enumerate(templates) for i, t in enumerate(group)]
        self._exact = {t: (k, i) for t, k, i in flat if "{" not in t}
        self._patterns = [(_pattern(t), k, i) for t, k, i in flat if "{" in t]
        for template, k, i in flat:
            for name in _samples(template):
                found = self._all(name)
                if found != [(k, i)]:
                    raise CheckpointError(
                        f"the name table is not a bijection: {name!r} has {len(found)} rules"
                    )

    def find(self, name: str) -> tuple[int, dict[str, str]] | None:
        if name in self._exact:
            return self._exact[name][0], {}
        for pattern, k, _ in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                return k, match.groupdict()
        return None

    def _all(self, name: str) -> list[tuple[int, int]]:
        exact = [self._exact[name]] if name in self._exact else []
        return exact + [(k, i) for pattern, k, i in self._patterns if pattern.fullmatch(name)]


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w)\}", template)
    text = "".join(
        f"(?P<{piece}>{VARIABLES[piece]})" if k % 2 else re.escape(piece)
        for k, piece in enumerate(pieces)
    )
    return re.compile(text)


def _variables(template: str) -> set[str]:
    return set(re.findall(r"\{(\w)\}", template))


def _samples(template: str) -> list[str]:
    values = {"n": ("0", "12"), "p": ("weight", "bias")}
    names = sorted(_variables(template))
    return [
        template.format(**dict(zip(names, chosen, strict=True)))
        for chosen in itertools.product(*(values[name] for name in names))
    ]


def _check_variables(item: Rule) -> None:
    variables = {frozenset(_variables(name)) for name in (*item.canonical, *item.stored)}
    if len(variables) != 1:
        raise CheckpointError(
            "a rule has other variables on its two sides",
            given=f"{', '.join(item.canonical)} <-> {', '.join(item.stored)}",
        )


def _apply(
    tensors: Mapping[str, Tensor],
    side: _Side,
    rules: Sequence[tuple[tuple[str, ...], tuple[str, ...], Transform]],
) -> Mapped:
    result = Mapped()
    done: set[tuple[int, tuple[str, ...]]] = set()
    for name in tensors:
        found = side.find(name)
        if found is None:
            result.unnamed.append(name)
            continue
        number, values = found
        key = number, tuple(values.values())
        if key in done:
            continue
        done.add(key)
        inputs, outputs, transform = rules[number]
        wanted = [template.format(**values) for template in inputs]
        lacking = [one for one in wanted if one not in tensors]
        if lacking:
            result.lacking |= {one: lacking for one in wanted if one in tensors}
            continue
        made = transform([tensors[one] for one in wanted])
        for template, tensor in zip(outputs, made, strict=True):
            result.tensors[template.format(**values)] = tensor
    return result

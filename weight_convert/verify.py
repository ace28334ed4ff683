"""Is this checkpoint what it should be? Against its manifest, or against another checkpoint.

Everything is compared in canonical orientation, bit by bit, so two checkpoints of different
dialects can be compared. Reading every byte anyway, values that are no numbers are counted too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from weight_convert.cast import to_float
from weight_convert.contents import look
from weight_convert.convert import hash_array
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options, Source
from weight_convert.storage.tensor import FLOATS, Tensor

Verdict = Literal["equal", "differs", "other dtype", "other shape", "missing", "surplus"]
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Finding:
    """One tensor that is not as it should be."""

    name: str
    """Canonical."""
    verdict: Verdict
    detail: str = ""


@dataclass
class Outcome:
    """What was compared, and what was found."""

    tensors: int = 0
    """Compared and equal bit for bit."""
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    not_numbers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Canonical name -> how many values are (NaN, infinite); only where there are any."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.findings


def canonical_tensors(source: Source) -> dict[str, Tensor]:
    """The tensors of a source, those of its adapter included, under canonical names."""
    low = source.adapter.tensors() if source.adapter else {}
    return {**source.tensors, **low}


def verify(
    path: str | Path,
    options: Options | None = None,
    *,
    dialect: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Compare a checkpoint with the manifest that the conversion left.

    Args:
        path: directory or file.
        options: as in `open_source`.
        dialect: its name, if it shall not be recognised.
        progress: told the name and bytes of each tensor.

    Raises:
        CheckpointError: it has no manifest, or cannot be opened.
    """
    manifest = look(path).manifest
    if not manifest.get("tensors"):
        raise CheckpointError(
            f"{path} has no manifest",
            expected="unillava_manifest.json, as `unillava convert` writes it",
            fix="name a second checkpoint to compare with: unillava verify A B",
        )
    promised = manifest["tensors"]
    tensors = canonical_tensors(open_source(path, options, dialect))
    outcome = Outcome()
    outcome.findings += [Finding(n, "missing") for n in promised if n not in tensors]
    for name, tensor in tensors.items():
        entry = promised.get(name)
        if entry is None:
            outcome.findings.append(Finding(name, "surplus"))
        elif entry["dtype"] != tensor.dtype or entry["shape"] != list(tensor.shape):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            verdict = "other shape" if entry["shape"] != list(tensor.shape) else "other dtype"
            detail = f"manifest {entry['dtype']} {entry['shape']}, file {found}"
            outcome.findings.append(Finding(name, verdict, detail))
        else:
            array = tensor.read()
            _count(outcome, name, tensor, array)
            if hash_array(array) != entry["sha256"]:
                outcome.findings.append(Finding(name, "differs", "other bits than the manifest"))
            else:
                outcome.tensors += 1
        if progress:
            progress(name, tensor.nbytes)
    return outcome


def compare(
    first: str | Path,
    second: str | Path,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> Outcome:
    """Compare two checkpoints of any dialects tensor by tensor.

    Rows that a conversion added to the vocabulary are not compared where only one side has them.

    Raises:
        CheckpointError: one of them cannot be opened.
    """
    sources = [open_source(path, options) for path in (first, second)]
    a, b = (canonical_tensors(source) for source in sources)
    outcome = Outcome()
    outcome.findings += [Finding(n, "missing", f"only in {first}") for n in a if n not in b]
    outcome.findings += [Finding(n, "surplus", f"only in {second}") for n in b if n not in a]
    for name in (n for n in a if n in b):
        _compare_one(outcome, name, a[name], b[name])
        if progress:
            progress(name, a[name].nbytes)
    return outcome


def _compare_one(outcome: Outcome, name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        detail = f"{list(a.shape)} and {list(b.shape)}"
        outcome.findings.append(Finding(name, "other shape", detail))
        return
    left, right = a.read(), b.read()
    _count(outcome, name, a, left)
    if a.dtype == b.dtype:
        if np.array_equal(left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8)):
            outcome.tensors += 1
        else:
            outcome.findings.append(Finding(name, "differs", _distance(a, left, b, right)))
        return
    detail = f"{a.dtype} and {b.dtype}"
    if a.dtype in FLOATS and b.dtype in FLOATS:
        detail += f"; {_distance(a, left, b, right)}"
    outcome.findings.append(Finding(name, "other dtype", detail))


def _distance(a: Tensor, left: np.ndarray, b: Tensor, right: np.ndarray) -> str:
    """How far two floating-point tensors are apart, by slices so that it costs no memory."""
    if a.dtype not in FLOATS:
        return f"{int((left != right).sum())} values differ"
    flat = [left.reshape(-1), right.reshape(-1)]
    worst, count = 0.0, 0
    for begin in range(0, left.size, SLICE):
        piece = slice(begin, begin + SLICE)
        x, y = (to_float(side[piece], t.dtype) for side, t in zip(flat, (a, b), strict=True))
        with np.errstate(invalid="ignore"):
            difference = np.abs(x.astype(np.float64) - y)
        count += int((x != y).sum())
        worst = max(worst, float(np.nanmax(difference, initial=0.0)))
    return f"{count} of {left.size} values differ, by at most {worst:.3g}"


SLICE = 1 << 20
"""Values that are turned into float32 at a time."""


def _count(outcome: Outcome, name: str, tensor: Tensor, array: np.ndarray) -> None:
    """Count NaN and infinite values, and the bytes."""
    outcome.bytes += tensor.nbytes
    if tensor.dtype not in FLOATS:
        return
    flat = array.reshape(-1)
    nan = infinite = 0
    for begin in range(0, flat.size, SLICE):
        values = to_float(flat[begin : begin + SLICE], tensor.dtype)
        if not np.isfinite(values).all():
            nan += int(np.isnan(values).sum())
            infinite += int(np.isinf(values).sum())
    if nan or infinite:
        outcome.not_numbers[name] = (nan, infinite)

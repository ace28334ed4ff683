"""The storage formats, and weights in one file, in shards with an index, or in a folder of files.

A format is told by a file's first bytes; the suffix only decides where these do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weight_convert.errors import CheckpointError
from weight_convert.source import WeightFile
from weight_convert.storage import mindspore_ckpt, pdparams, safetensors, torch_file
from weight_convert.storage.index import open_shards
from weight_convert.storage.tensor import Table, Tensor, few

HEAD_BYTES = 512


@dataclass(frozen=True)
class Format:
    """How weights lie in files of one kind."""

    open_file: Callable[[Path], dict[str, Tensor]]
    write_file: Callable[..., None]
    """(path, table, tensors, **settings): tensors in the table's order."""
    suffix: str
    stem: str
    """Name of a whole checkpoint's file, without suffix."""
    indexed: bool = True
    """Whether shards have an index file."""

    @property
    def single(self) -> str:
        """Name of the file that holds everything."""
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        """Name of the index of shards."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int) -> str:
        """Name of one of several files."""
        return f"{self.stem}-{number:05d}-of-{count:05d}{self.suffix}"


FORMATS: dict[str, Format] = {
    "safetensors": Format(
        lambda path: safetensors.open_file(path).tensors(),
        safetensors.write_file,
        ".safetensors",
        "model",
    ),
    "bin": Format(torch_file.open_file, torch_file.write_file, ".bin", "pytorch_model"),
    "pdparams": Format(pdparams.open_file, pdparams.write_file, ".pdparams", "model_state"),
    "ckpt": Format(
        mindspore_ckpt.open_file, mindspore_ckpt.write_file, ".ckpt", "model", indexed=False
    ),
}
SUFFIXES = {
    ".safetensors": "safetensors",
    ".bin": "bin",
    ".pth": "bin",
    ".pt": "bin",
    ".pdparams": "pdparams",
    ".ckpt": "ckpt",
}


# --- reading ---------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """The key of FORMATS that a file is of, by its first bytes.

    Raises:
        CheckpointError: unreadable, or of no known format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", given=error.strerror) from None
    if head.startswith(b"PK\x03\x04"):
        return "bin"
    if len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "pdparams" if path.suffix in (".pdparams", ".pdopt") else "bin"
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    if head[:1] == b"\x0a":
        return "ckpt"
    if path.suffix in SUFFIXES:  # damaged: let its reader say how
        return SUFFIXES[path.suffix]
    raise CheckpointError(
        f"{path} is of no known weight format",
        given=f"first bytes {head[:16]!r}",
        expected="safetensors, torch .bin or .pth, MindSpore .ckpt or Paddle .pdparams",
    )


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file of any format, under their stored names.

    Raises:
        CheckpointError: unreadable, damaged, or refused by its reader.
    """
    return FORMATS[format_of(path)].open_file(path)


def open_set(directory: Path, kind: str, stem: str | None = None) -> dict[str, Tensor] | None:
    """A whole checkpoint in one format: one file, or shards and their index; None if not there.

    Args:
        directory: where to look.
        kind: a key of FORMATS.
        stem: of the file names, if it is not the format's own.

    Raises:
        CheckpointError: both are there, a shard is absent, or index and shards disagree.
    """
    form = FORMATS[kind]
    name = (stem or form.stem) + form.suffix
    single, index = directory / name, directory / f"{name}.index.json"
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{directory} holds two sets of weights",
            given=f"{single.name} and {index.name}",
            fix="remove the one that is out of date",
        )
    if single.is_file():
        return form.open_file(single)
    if index.is_file():
        return open_shards(index, form.open_file)
    return None


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a directory in the first format of FORMATS that it has.

    Hub repositories often hold the same weights as safetensors and as pickles; the safetensors
    are read then. A folder of several `.ckpt` files is merged, as MindFormers does.

    Raises:
        CheckpointError: nothing there, or a file that cannot be used.
    """
    if path.is_file():
        return open_file(path)
    tensors = find_weights(path)
    if tensors is not None:
        return tensors
    raise CheckpointError(
        f"{path} holds no weights",
        given=f"files: {few(sorted(p.name for p in path.iterdir())) or 'none'}",
        expected=" or ".join(form.single for form in FORMATS.values()),
    )


def find_weights(directory: Path) -> dict[str, Tensor] | None:
    """Like `open_weights` for a directory; None if it holds no weights."""
    for kind in FORMATS:
        tensors = open_folder(directory) if kind == "ckpt" else open_set(directory, kind)
        if tensors is not None:
            return tensors
    return None


def open_folder(directory: Path, kind: str = "ckpt") -> dict[str, Tensor] | None:
    """Every file of one kind in a folder, merged; None if there is none.

    MindSpore's strategy files, which end in `.ckpt` too, are left out.

    Args:
        directory: where to look.
        kind: a key of FORMATS.

    Raises:
        CheckpointError: two files hold the same tensor, or one cannot be read.
    """
    form = FORMATS[kind]
    files = [path for path in sorted(directory.glob(f"*{form.suffix}")) if not _is_strategy(path)]
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in form.open_file(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"two files of {directory} hold the same tensor, {name}",
                    given=f"{tensors[name].places[0].path.name} and {path.name}",
                    fix="move the one that is out of date elsewhere",
                )
            tensors[name] = tensor
    return tensors if files else None


def _is_strategy(path: Path) -> bool:
    """Whether a `.ckpt` begins as MindSpore's strategy files do: field 1 is a number."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".ckpt" and file.read(1) == b"\x08"
    except OSError:  # its reader says what is wrong with it
        return False


# --- writing ---------------------------------------------------------------------------------


def shards(
    tensors: Mapping[str, Tensor],
    kind: str,
    max_bytes: int,
    *,
    stem: str | None = None,
    folder: str = "",
    settings: Mapping[str, Any] | None = None,
) -> tuple[tuple[WeightFile, ...], dict[str, bytes]]:
    """Weight files of one format, and the index document if there are several.

    Args:
        tensors: stored name -> tensor, in the order in which shards are cut.
        kind: a key of FORMATS.
        max_bytes: a file is closed before the tensor that would exceed it.
        stem: of the file names, if it is not the format's own.
        folder: put before the names, with its slash.
        settings: see WeightFile.
    """
    form = FORMATS[kind]
    if stem:
        form = Format(form.open_file, form.write_file, form.suffix, stem, form.indexed)
    groups = list(_cut(tensors, max_bytes))
    names = [form.shard(k, len(groups)) for k in range(1, len(groups) + 1)]
    names = [form.single] if len(groups) == 1 else names
    files = tuple(
        WeightFile(folder + name, kind, {one: tensors[one] for one in group}, settings or {})
        for name, group in zip(names, groups, strict=True)
    )
    if len(groups) == 1 or not form.indexed:
        return files, {}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {
            one: name for name, group in zip(names, groups, strict=True) for one in group
        },
    }
    text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return files, {folder + form.index: text.encode()}


def _cut(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def write_order(file: WeightFile) -> list[str]:
    """The order in which the format wants its tensors: the bytes then come one after another."""
    if file.format == "safetensors":
        return safetensors.layout_order(table_of(file.tensors))
    return list(file.tensors)


def table_of(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Table:
    """What a writer is told beforehand."""
    return {n: (tensors[n].dtype, tensors[n].shape) for n in (tensors if names is None else names)}


def single_file(tensors: Mapping[str, Tensor], kind: str, **settings: Any) -> WeightFile:
    """The weights of a target that is one file."""
    return WeightFile("", kind, dict(tensors), settings)

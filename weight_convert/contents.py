"""What lies at a path: file names, JSON settings, tensor names. Dialects are recognised by it.

Folder names never count, and nothing is executed: pickles are read with an allow-list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from weight_convert import files
from weight_convert.canonical import Config
from weight_convert.errors import CheckpointError
from weight_convert.source import Content, pick_files, read_json
from weight_convert.storage import safetensors
from weight_convert.storage.tensor import Tensor

MANIFEST = "unillava_manifest.json"
SMALL_FILES = frozenset({".json", ".txt", ".md", ".jinja", ".model", ".yaml", ".yml", ".py"})


@dataclass(frozen=True)
class Contents:
    """A directory, or a single file of weights."""

    path: Path

    @property
    def is_file(self) -> bool:
        """Whether it is a single file of weights."""
        return self.path.is_file()

    @property
    def directory(self) -> Path:
        """Where the files beside the weights are looked for."""
        return self.path.parent if self.is_file else self.path

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the files and folders; for a single file, only its own."""
        if self.is_file:
            return frozenset({self.path.name})
        return frozenset(path.name for path in self.path.iterdir())

    def json(self, name: str) -> Config:
        """An object from a JSON file of the directory; `{}` if there is none."""
        return {} if self.is_file else read_json(self.path / name, optional=True)

    @cached_property
    def config(self) -> Config:
        """config.json, or `{}`.

        Raises:
            CheckpointError: not readable, or with a model_type that is no text.
        """
        config = self.json("config.json")
        if not isinstance(config.get("model_type"), str | None):
            raise CheckpointError(
                f"config.json of {self.path}: model_type is no text", given=config["model_type"]
            )
        return config

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Stored name -> tensor of the whole checkpoint's files; empty if there are none.

        Raises:
            CheckpointError: there are weights, but they cannot be used.
        """
        if self.is_file:
            return files.open_file(self.path)
        return files.find_weights(self.path) or {}

    @cached_property
    def is_mindspore(self) -> bool:
        """Whether MindSpore's writers made the weights: `.ckpt`, or safetensors that say so."""
        path = next((tensor.places[0].path for tensor in self.tensors.values()), None)
        if path is None or path.suffix not in (".ckpt", ".safetensors"):
            return False
        kind = files.format_of(path)
        if kind == "safetensors":
            return safetensors.open_file(path).metadata.get("format") == "ms"
        return kind == "ckpt"

    @cached_property
    def manifest(self) -> Config:
        """The manifest that an earlier conversion left, or `{}`.

        Raises:
            CheckpointError: it is there, and is not what conversions write.
        """
        path = manifest_path(self.path, single_file=self.is_file)
        manifest = read_json(path, optional=True)
        if manifest:
            _check_manifest(path, manifest)
        return manifest

    def side_files(self, names: Iterable[str]) -> dict[str, Content]:
        """Those of the named small files that lie beside the weights."""
        return pick_files(self.directory, names)

    def first(self, *prefixes: str) -> str:
        """The first tensor name that begins with one of the prefixes, or an empty string."""
        return next((name for name in self.tensors if name.startswith(prefixes)), "")


@dataclass(frozen=True)
class Replaced(Contents):
    """A directory as it would be with other weights, another config.json and other small files."""

    weights: Mapping[str, Tensor]
    """Stored name -> tensor."""
    settings: Config
    """Contents of config.json."""
    side: Mapping[str, Content]
    manifest: Config = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Those given."""
        return self.weights

    @property
    def config(self) -> Config:
        """The one given."""
        return self.settings

    def side_files(self, names: Iterable[str]) -> dict[str, Content]:
        """Those of the files given."""
        return {name: self.side[name] for name in names if name in self.side}


def _check_manifest(path: Path, manifest: Config) -> None:
    """It may have been edited, or made by somebody else: nothing in it is believed unseen."""
    vocabulary = manifest.get("vocabulary")
    sound = {
        "tensors": _is_table(manifest.get("tensors", {}), _is_entry),
        "memory": _is_table(manifest.get("memory", {}), lambda value: isinstance(value, dict)),
        "config": isinstance(manifest.get("config", {}), dict),
        "vocabulary": vocabulary is None
        or (
            isinstance(vocabulary, dict)
            and type(vocabulary.get("rows")) is int
            and _is_table(vocabulary.get("tokens"), lambda value: type(value) is int)
        ),
    }
    wrong = [name for name, fine in sound.items() if not fine]
    if wrong:
        raise CheckpointError(
            f"{path} is no manifest that a conversion wrote",
            given=f"unusable: {', '.join(wrong)}",
            fix="remove it, or restore it; without it, name the model with --base DIR",
        )


def _is_table(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_entry(value: object) -> bool:
    """`{"dtype": code, "shape": [...], "sha256": digits}` of a tensor."""
    if not isinstance(value, dict):
        return False
    shape = value.get("shape")
    return (
        isinstance(value.get("dtype"), str)
        and isinstance(value.get("sha256"), str)
        and isinstance(shape, list)
        and all(type(size) is int for size in shape)
    )


def manifest_path(path: Path, *, single_file: bool) -> Path:
    """Where the manifest of a checkpoint lies: inside a directory, beside a single file."""
    return path.with_name(f"{path.name}.{MANIFEST}") if single_file else path / MANIFEST


def look(path: str | Path) -> Contents:
    """The contents of a path.

    Raises:
        CheckpointError: there is nothing, or an empty directory.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"there is nothing at {path}", expected="a checkpoint")
    if path.suffix in SMALL_FILES:
        raise CheckpointError(
            f"{path} is a file without weights",
            expected="a checkpoint directory, or a file of weights",
            fix=f"give {path.parent}",
        )
    if path.is_dir() and not any(path.iterdir()):
        raise CheckpointError(f"{path} is empty", expected="a checkpoint directory")
    return Contents(path)

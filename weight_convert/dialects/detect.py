"""What a directory holds, told from its contents: tensor names, config keys, first bytes of files.

Folder names never count. Pickles are not opened: their first bytes are enough to name them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weight_convert.errors import CheckpointError
from weight_convert.storage.safetensors import open_file

HEAD_BYTES = 512
TEXT_SUFFIXES = frozenset(".json .txt .md .jinja .model .py .yaml .yml .safetensors".split())
"""Files that are no foreign weights; safetensors are looked at by their tensor names."""


@dataclass(frozen=True)
class Contents:
    """What is looked at: file names with their first bytes, config.json, tensor names."""

    heads: dict[str, bytes]
    config: dict[str, Any]
    adapter: bool
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """One layout that was recognised, and by what."""

    layout: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.layout} ({self.evidence})"


def recognise(directory: Path) -> list[Finding]:
    """Every known layout that `directory` shows signs of, in the order of RULES."""
    contents = _look(directory)
    found = ((layout, rule(contents)) for layout, rule in RULES)
    return [Finding(layout, evidence) for layout, evidence in found if evidence]


def _look(directory: Path) -> Contents:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    heads = {path.name: _head(path) for path in files if path.suffix not in TEXT_SUFFIXES}
    names: list[str] = []
    for path in files:
        if path.suffix == ".safetensors":
            try:
                names += open_file(path).entries
            except CheckpointError:
                continue  # a damaged file is reported when it is opened for reading
    return Contents(
        heads, _config(directory), (directory / "adapter_config.json").exists(), tuple(names)
    )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


# --- first bytes -----------------------------------------------------------------------------


def _is_zip(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


def _is_pickle(head: bytes) -> bool:
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def _is_mindspore(head: bytes) -> bool:
    """A protobuf message: field 1, holding field 1, holding the tensor's printable name."""
    inner = _field_one(head)
    name = _field_one(inner) if inner else b""
    return len(name) > 0 and all(32 <= byte < 127 for byte in name)


def _field_one(data: bytes) -> bytes:
    """The bytes of a leading length-delimited field 1, as far as `data` reaches; else empty."""
    if not data or data[0] != 0x0A:
        return b""
    length, shift = 0, 0
    for position, byte in enumerate(data[1:11], 2):
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return data[position : position + length]
    return b""


# --- rules -----------------------------------------------------------------------------------


def _list(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _files(contents: Contents, *tests: Callable[[bytes], bool], suffix: str = "") -> str:
    return _list(
        name
        for name, head in contents.heads.items()
        if name.endswith(suffix) and any(test(head) for test in tests)
    )


def _adapter(contents: Contents) -> str:
    if contents.adapter:
        return "adapter_config.json"
    return _list(name for name in contents.tensors if ".lora_A" in name)


def _original(contents: Contents) -> str:
    flat = "text_config" not in contents.config
    keys = [key for key in contents.config if flat and key.startswith(("mm_", "use_mm_proj"))]
    return _list(f"config.json has {key}" for key in keys[:1]) or _list(
        name for name in contents.tensors if "mm_projector." in name
    )


def _paddle(contents: Contents) -> str:
    return _files(contents, _is_pickle, suffix=".pdparams") or _list(
        name for name in contents.tensors if name.startswith("llama.")
    )


def _torch_pickle(contents: Contents) -> str:
    pickles = {
        name: head
        for name, head in contents.heads.items()
        if _is_zip(head) or (_is_pickle(head) and not name.endswith((".pdparams", ".pdopt")))
    }
    return _list(pickles)


def _mindspore(contents: Contents) -> str:
    return _files(contents, _is_mindspore)


def _gguf(contents: Contents) -> str:
    return _files(contents, lambda head: head.startswith(b"GGUF"))


def _model_type(contents: Contents) -> str:
    kind = contents.config.get("model_type")
    return f"model_type {kind!r} in config.json" if isinstance(kind, str) else ""


ADAPTER = "PEFT adapter (LoRA)"
ORIGINAL = "original LLaVA layout"
RULES: tuple[tuple[str, Callable[[Contents], str]], ...] = (
    (ADAPTER, _adapter),
    (ORIGINAL, _original),
    ("PyTorch weights in pickles (.bin, .pth)", _torch_pickle),
    ("MindSpore .ckpt", _mindspore),
    ("Paddle weights (.pdparams names)", _paddle),
    ("GGUF weights", _gguf),
    ("Hugging Face configuration", _model_type),
)
"""Layout, and the rule that returns its evidence or an empty string."""

"""A checkpoint of any dialect in canonical terms, and the files that a dialect would write for it.

`Source` is what reading a dialect gives; `Target` is what writing one takes. Both are plans: their
tensors are lazy, so nothing is read before a target is written.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weight_convert.canonical import PARTS, Config, part_of
from weight_convert.errors import CheckpointError
from weight_convert.storage.tensor import Tensor, few

Content = bytes | Path
"""A small file: its bytes, or the file to copy."""


@dataclass(frozen=True)
class Options:
    """What the person who converts may decide. Each dialect uses what concerns it."""

    base: Path | None = None
    """A checkpoint that gives what SRC lacks: configuration and tokenizer, or the weights that an
    adapter or a delta belongs to."""
    vision: Path | None = None
    """The CLIP or SigLIP directory of a checkpoint whose vision tower is not inside it."""
    strategy: Path | None = None
    """MindSpore: the strategy file, or the directory of them, that says how ranks cut tensors."""
    dtype: str | None = None
    """float32, float16 or bfloat16: what floating-point tensors are cast to."""
    max_shard_bytes: int = 5_000_000_000
    weights: str | None = None
    """The storage format where a dialect has several: a key of `files.FORMATS`."""
    qkv_concat: bool = False
    """Fuse q, k, v (and the two feed-forward inputs) where the dialect knows such a form."""
    spelling: str | None = None
    """Which names are written. hf: of `dialects.hf.SPELLINGS`, by default `hub`. peft: of
    `dialects.peft.SPELLINGS`, by default those that the adapter had, or transformers 5's."""
    parts: frozenset[str] = frozenset(PARTS)
    """Write only these, where the dialect can be partial."""
    allow_missing: tuple[str, ...] = ()
    allow_unused: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensor names that may be absent, or be left out."""


@dataclass(frozen=True)
class Vocabulary:
    """Rows and tokens that a conversion added, so that the way back can remove them."""

    rows: int
    """Rows of the embedding (and head) before."""
    tokens: dict[str, int]
    """Token -> id, as added to the tokenizer."""

    def as_json(self) -> Config:
        """For the manifest."""
        return {"rows": self.rows, "tokens": self.tokens, "new_rows": "mean of the others"}


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates: canonical module -> A [r, in] and B [out, r], W += scaling * B @ A."""

    rank: int
    alpha: float
    """What holds for every module that `alphas` does not name. Ranks are those of the tensors."""
    settings: Config = field(default_factory=dict)
    """What else adapter_config.json says that means the same in every layout: `use_rslora`,
    `lora_dropout`, `bias`, `base_model_name_or_path`."""
    pairs: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Canonical module name (no `.weight`) -> (A, B), canonical orientation: for an embedding
    matrix [V, H], A is [r, H] and B is [V, r]."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Modules with an alpha of their own."""
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """DoRA: module -> lengths [out] that the rows of the updated matrix are brought to."""

    def scaling(self, module: str) -> float:
        """What B @ A of a module is multiplied by: alpha / r, with rsLoRA alpha / sqrt(r)."""
        rank, alpha = self.pairs[module][0].shape[0], self.alphas.get(module, self.alpha)
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under one name, `MODULE.lora_A` and so on."""
        named = {}
        for module, (a, b) in self.pairs.items():
            named |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        return named | {f"{m}.lora_magnitude_vector": t for m, t in self.magnitudes.items()}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Adapter:
        """The adapter with `function(name, tensor)`, names as in `tensors`, for every tensor."""
        pairs = {
            module: (function(f"{module}.lora_A", a), function(f"{module}.lora_B", b))
            for module, (a, b) in self.pairs.items()
        }
        magnitudes = {
            m: function(f"{m}.lora_magnitude_vector", t) for m, t in self.magnitudes.items()
        }
        return replace(self, pairs=pairs, magnitudes=magnitudes)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, in canonical terms."""

    dialect: str
    path: Path
    config: Config
    """Canonical configuration; without `vision_config` or `text_config` where a part is absent."""
    tensors: Mapping[str, Tensor]
    """Canonical name -> tensor in canonical orientation."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """Tokenizer, processor and generation files under their llava-hf names."""
    vocabulary: Vocabulary | None = None
    adapter: Adapter | None = None
    """For a LoRA directory; `tensors` are then those saved in full beside it (the projector)."""
    dropped: tuple[str, ...] = ()
    """Stored names that are no weights and were left out: buffers, optimizer state."""
    notes: tuple[str, ...] = ()
    """What reading did beyond opening, in sentences for people: what was merged, for instance."""
    memory: Mapping[str, Config] = field(default_factory=dict)
    """Dialect -> what its configuration said that the canonical one cannot hold."""

    @property
    def parts(self) -> frozenset[str]:
        """Those of PARTS that have tensors."""
        return frozenset(part_of(name) for name in self.tensors)


@dataclass(frozen=True)
class WeightFile:
    """One file of weights to be written."""

    name: str
    """Relative to the target directory; empty when the target is one file."""
    format: str
    """A key of `files.FORMATS`."""
    tensors: Mapping[str, Tensor]
    """Stored name -> tensor, lazily transformed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the format's `write_file`."""


@dataclass(frozen=True)
class Target:
    """Everything that will be written."""

    dialect: str
    weights: tuple[WeightFile, ...]
    documents: Mapping[str, Content] = field(default_factory=dict)
    """Relative path -> JSON, YAML, tokenizer files, ..."""
    single_file: bool = False
    """The target is one file of weights, not a directory."""
    left_out: tuple[str, ...] = ()
    """Canonical names that this dialect does not hold."""


def as_json(value: Any) -> bytes:
    """JSON as it is written everywhere: indented, UTF-8, a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, *, optional: bool = False) -> Config:
    """An object from a JSON file; `{}` if it is absent and optional.

    Raises:
        CheckpointError: absent, unreadable, or no object.
    """
    if optional and not path.is_file():
        return {}
    return parse_json(path, str(path))


def parse_json(content: Content, name: str) -> Config:
    """An object from a small file.

    Raises:
        CheckpointError: unreadable, or no object; names `name`.
    """
    try:
        data = content if isinstance(content, bytes) else content.read_bytes()
        value = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not readable JSON", given=error) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object", given=type(value).__name__)
    return value


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits any of the patterns (fnmatch: `*`, `?`, `[...]`)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def pick_files(directory: Path, names: Iterable[str]) -> dict[str, Content]:
    """Those of the named files that a directory has."""
    return {name: directory / name for name in names if (directory / name).is_file()}


def describe_parts(parts: Iterable[str]) -> str:
    """`vision, language`, in the order of PARTS."""
    chosen = set(parts)
    return few([part for part in PARTS if part in chosen]) or "nothing"

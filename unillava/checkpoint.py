"""A checkpoint directory in the Hugging Face layout: opened, checked, read lazily.

Everything is judged by content. Opening reads the JSON files and the headers of the weight
files; tensors are mapped one at a time. Nothing is ever unpickled, and the network is used only
for a hub id, never for a path that exists.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unillava.config import read_spec
from unillava.errors import CheckpointError, ConfigError
from unillava.spec import LlavaSpec, parameter_table
from weight_convert.dialects.detect import ORIGINAL, recognise
from weight_convert.dialects.hf import canonical_name, is_buffer
from weight_convert.storage.safetensors import INDEX_FILE, SINGLE_FILE, Stored, open_directory

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is downloaded: no pickles, no code."""
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Any one of these sets is a tokenizer."""
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
MOST_NAMES = 5
"""How many tensors of one kind an error lists."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `check` compares the tensors with the configuration."""

    directory: Path
    config: dict[str, Any]
    """config.json as it stands."""
    spec: LlavaSpec
    processor_config: dict[str, Any]
    """Image processor settings, merged over processor_config.json; video ones nested."""
    chat_template: str | None
    """The Jinja template that the checkpoint brings."""
    stored: Mapping[str, Stored]
    """Canonical name -> where the tensor lies; buffers and a repeated tied head left out."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, as stored."""
        return {name: place.entry.shape for name, place in self.stored.items()}

    def tensors(self) -> Iterator[tuple[str, np.ndarray, bool]]:
        """Every tensor as (canonical name, array, whether uint16 means bfloat16).

        In the order of the files, each mapped when it is reached: [out, in] orientation, dtype
        as stored. Drop an array before asking for the next one to stay at one tensor of memory.
        """
        for name, place in self.stored.items():
            yield name, place.read(), place.entry.dtype == "BF16"

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply, as generation_config.json and config.json state them."""
        ids: set[int] = set()
        text = self.config.get("text_config") or {}
        for source in (_read_json_if_there(self.directory / "generation_config.json"), text):
            stated = source.get("eos_token_id")
            ids |= set(stated if isinstance(stated, list) else [stated]) - {None}
        return tuple(sorted(ids))

    def tokenizer(self) -> Any:
        """The tokenizer (transformers), from the files of this directory alone.

        transformers imports torch where it is installed: select a MindSpore backend first.

        Raises:
            CheckpointError: the files are missing or cannot be used.
        """
        held = {path.name for path in self.directory.iterdir()}
        if not any(held.issuperset(files) for files in TOKENIZER_FILES):
            raise CheckpointError(
                f"{self.directory} has no tokenizer",
                given=f"none of {' | '.join(' + '.join(files) for files in TOKENIZER_FILES)}",
                fix="copy the tokenizer files of the original checkpoint into it",
            )
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.directory), local_files_only=True)
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer in {self.directory} cannot be used",
                given=f"{type(error).__name__}: {error}",
            ) from error

    def check(self) -> None:
        """Compare names and shapes of the tensors with what config.json describes.

        Raises:
            CheckpointError: tensors are missing, surplus or of another shape; lists them with
                the nearest names and the fields of config.json that explain the shapes.
        """
        expected = parameter_table(self.spec)
        missing = [name for name in expected if name not in self.stored]
        surplus = [name for name in self.stored if name not in expected]
        wrong = [
            name for name in expected if self.shapes.get(name, expected[name]) != expected[name]
        ]
        if not (missing or surplus or wrong):
            return
        reports = [
            *_listed("missing", missing, lambda name: _with_nearest(name, surplus)),
            *_listed("surplus", surplus, lambda name: _with_nearest(name, missing)),
            *_listed("wrong shape", wrong, lambda n: _shape_report(n, self.shapes[n], expected[n])),
            *_depth_reports(self.stored, expected),
        ]
        raise CheckpointError(
            f"config.json and the weights of {self.directory} contradict each other",
            given="".join(f"\n    {line}" for line in reports),
            expected=f"{len(expected)} tensors, as config.json says",
            fix="use the config.json that was saved with these weights",
        )


# --- opening ---------------------------------------------------------------------------------


def open_checkpoint(path_or_hub_id: str | Path) -> Checkpoint:
    """Open a checkpoint directory, or download one from the Hugging Face hub.

    Args:
        path_or_hub_id: a directory in the Hugging Face layout. If no such path exists and it
            looks like `organisation/name`, it is fetched from the hub (or found in its cache).

    Raises:
        CheckpointError: not a checkpoint (the message says what is there instead), a missing or
            damaged file, an index that disagrees with its shards, a hub that does not answer.
        ConfigError: config.json cannot be used.
    """
    directory = _locate(path_or_hub_id)
    _check_layout(directory)
    config = _read_json(directory / "config.json")
    processor = _processor_config(directory)
    stored = _canonical(open_directory(directory))
    shapes = {name: place.entry.shape for name, place in stored.items()}
    spec = _spec(directory, config, processor, shapes)
    if spec.text.tie_embeddings and HEAD in stored:
        stored = _without_head(directory, stored)
    return Checkpoint(directory, config, spec, processor, _chat_template(directory), stored)


def _locate(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file", expected="a checkpoint directory", fix=f"give {path.parent}"
        )
    if isinstance(path_or_hub_id, str) and HUB_ID.fullmatch(path_or_hub_id):
        return _download(path_or_hub_id)
    raise CheckpointError(
        f"there is no directory {path}",
        expected="a checkpoint directory, or a hub id such as llava-hf/llava-1.5-7b-hf",
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"there is no directory {hub_id}, and the hub does not give a checkpoint of that name",
            given=f"{type(error).__name__}: {reason[0] if reason else ''}",
            fix="check the name and the network, or give the path of a directory",
        ) from error


def _check_layout(directory: Path) -> None:
    """Refuse what is not in the Hugging Face layout, saying what it is instead."""
    held = sorted(path.name for path in directory.iterdir())
    if not held:
        raise CheckpointError(f"{directory} is empty", expected="a checkpoint directory")
    lacks = [] if "config.json" in held else ["config.json"]
    if not {SINGLE_FILE, INDEX_FILE}.intersection(held):
        lacks.append(f"{SINGLE_FILE} or {INDEX_FILE}")
    findings = recognise(directory)
    if not lacks:  # a training run leaves pickles (optimizer, arguments) beside the weights
        findings = [finding for finding in findings if finding.layout == ORIGINAL]
        if not findings:
            return
    inner = [p.parent.name for p in sorted(directory.glob("*/config.json"))]
    raise CheckpointError(
        f"{directory} is not a checkpoint in the Hugging Face layout",
        given="; ".join([*map(str, findings), f"files: {_few(held)}"]),
        expected=f"also {' and '.join(lacks)}" if lacks else "a llava-hf checkpoint",
        fix=f"did you mean {directory / inner[-1]}?"
        if inner
        else "convert it to config.json and safetensors of the Hugging Face layout first",
    )


def _canonical(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors under canonical names, without buffers, in the order of the files."""
    stored: dict[str, Stored] = {}
    for name, place in sorted(tensors.items(), key=_file_order):
        canonical = canonical_name(name)
        if canonical in stored:
            other = stored[canonical]
            raise CheckpointError(
                f"one tensor is stored twice: {canonical}",
                given=f"{other.name} in {other.file.path.name}, {name} in {place.file.path.name}",
            )
        if not is_buffer(name):
            stored[canonical] = place
    return stored


def _file_order(item: tuple[str, Stored]) -> tuple[str, int, str]:
    name, place = item
    return place.file.path.name, place.entry.begin, name


def _spec(
    directory: Path,
    config: dict[str, Any],
    processor: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> LlavaSpec:
    try:
        return read_spec(config, processor=processor, keys=shapes)
    except ConfigError as error:
        raise ConfigError(
            f"{directory}: {error.problem}",
            given=error.given,
            expected=error.expected,
            fix=error.fix,
        ) from None


def _without_head(directory: Path, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Leave out a head that repeats the embedding, as some tools save it."""
    embedding, head = stored.get(EMBEDDING), stored[HEAD]
    same = embedding is not None and embedding.entry.dtype == head.entry.dtype
    if not (same and np.array_equal(_bytes(embedding.read()), _bytes(head.read()))):
        raise CheckpointError(
            f"config.json of {directory} says that the output head is the embedding matrix, "
            "but the file holds another head",
            given=f"tie_word_embeddings true, and a {HEAD} unlike {EMBEDDING}",
            fix="if the head was trained on its own, set tie_word_embeddings to false, at the "
            "top of config.json and in text_config",
        )
    return {name: place for name, place in stored.items() if name != HEAD}


def _bytes(array: np.ndarray) -> np.ndarray:
    """Bits rather than values: NaN equals itself, 0.0 and -0.0 differ."""
    return array.reshape(-1).view(np.uint8)


# --- JSON files ------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON", given=error) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object", given=type(content).__name__)
    return content


def _read_json_if_there(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.exists() else {}


def _processor_config(directory: Path) -> dict[str, Any]:
    """Settings of the image processor over those of the processor; the video ones nested.

    transformers 5 nests both in processor_config.json, and then reads no other file.
    """
    processor = _read_json_if_there(directory / "processor_config.json")
    image = processor.pop("image_processor", None)
    video = processor.pop("video_processor", None)
    if image is None:
        image = _read_json_if_there(directory / "preprocessor_config.json")
    if video is None:
        video = _read_json_if_there(directory / "video_preprocessor_config.json")
    return processor | image | ({"video_processor": video} if video else {})


def _chat_template(directory: Path) -> str | None:
    """The first of: chat_template.jinja, chat_template.json, processor's, tokenizer's."""
    jinja = directory / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = _read_json_if_there(directory / name).get("chat_template")
        if isinstance(template, list):  # several named templates
            named = [item for item in template if isinstance(item, dict)]
            default = (i.get("template") for i in named if i.get("name") == "default")
            template = next(default, None)
        if isinstance(template, str):
            return template
    return None


# --- reports ---------------------------------------------------------------------------------

_VOCABULARY = ("text_config.vocab_size", "text_config.hidden_size")
_QUERY = "text_config.num_attention_heads * head_dim"
_KEY = "text_config.num_key_value_heads * head_dim"
_WIDTH, _INNER = "text_config.hidden_size", "text_config.intermediate_size"
_TOWER, _TOWER_INNER = "vision_config.hidden_size", "vision_config.intermediate_size"
_PATCH = "vision_config.patch_size"
_POSITIONS = "vision_config.image_size / patch_size"
_FEATURES = "vision_config.hidden_size * number of vision_feature_layer"

EXPLAINED_BY: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"language_model\.(model\.embed_tokens|lm_head)\.weight", _VOCABULARY),
    (r"language_model\..*\.q_proj\.\w+", (_QUERY, _WIDTH)),
    (r"language_model\..*\.[kv]_proj\.\w+", (_KEY, _WIDTH)),
    (r"language_model\..*\.o_proj\.\w+", (_WIDTH, _QUERY)),
    (r"language_model\..*\.(gate|up)_proj\.\w+", (_INNER, _WIDTH)),
    (r"language_model\..*\.down_proj\.\w+", (_WIDTH, _INNER)),
    (r"language_model\..*norm\.weight|image_newline", (_WIDTH,)),
    (r"multi_modal_projector\.linear_1\.\w+", (_WIDTH, _FEATURES)),
    (r"multi_modal_projector\..*", (_WIDTH, _WIDTH)),
    (r"vision_tower\..*\.position_embedding\.weight", (_POSITIONS, _TOWER)),
    (
        r"vision_tower\..*\.patch_embedding\.weight",
        (_TOWER, "vision_config.num_channels", _PATCH, _PATCH),
    ),
    (r"vision_tower\..*\.fc1\.\w+", (_TOWER_INNER, _TOWER)),
    (r"vision_tower\..*\.fc2\.\w+", (_TOWER, _TOWER_INNER)),
    (r"vision_tower\..*", (_TOWER, _TOWER)),
)
"""Name pattern -> the fields of config.json that the axes of its shape follow from."""

_STACKS = {
    "language_model.model.layers.": "text_config.num_hidden_layers",
    "vision_tower.vision_model.encoder.layers.": "vision_config.num_hidden_layers",
}


def _shape_report(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    fields = next((f for pattern, f in EXPLAINED_BY if re.fullmatch(pattern, name)), ())
    differing = [
        field
        for field, a, b in zip(fields, found, expected, strict=False)
        if a != b and len(found) == len(expected)
    ]
    why = f"; see {', '.join(dict.fromkeys(differing))}" if differing else ""
    return f"{name}: stored {list(found)}, config.json says {list(expected)}{why}"


def _with_nearest(name: str, candidates: list[str]) -> str:
    near = difflib.get_close_matches(name, candidates, 1, 0.8)
    return f"{name} (nearest: {near[0]})" if near else name


def _depth_reports(stored: Iterable[str], expected: Iterable[str]) -> list[str]:
    """One line per stack of blocks whose depth differs: it explains many missing tensors."""
    reports = []
    for prefix, field in _STACKS.items():
        found, wanted = _depth(stored, prefix), _depth(expected, prefix)
        if found != wanted:
            reports.append(f"the weights have {found} blocks, {field} says {wanted}")
    return reports


def _depth(names: Iterable[str], prefix: str) -> int:
    numbers = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return len(numbers)


def _listed(what: str, names: list[str], describe: Callable[[str], str]) -> list[str]:
    lines = [f"{what}: {describe(name)}" for name in names[:MOST_NAMES]]
    more = len(names) - MOST_NAMES
    return [*lines, f"{what}: {more} more"] if more > 0 else lines


def _few(names: list[str]) -> str:
    more = [f"and {len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
    return ", ".join(names[:MOST_NAMES] + more)

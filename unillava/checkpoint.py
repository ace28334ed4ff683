"""A checkpoint of any dialect: opened, checked, read lazily, in canonical terms.

Everything is judged by content. Opening reads the JSON files and the headers of the weight
files; tensors are mapped one at a time. Pickles are read with an allow-list, and the network is
used only for a hub id, never for a path that exists.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unillava.config import read_spec
from unillava.errors import CheckpointError, ConfigError
from unillava.spec import LlavaSpec, parameter_table
from weight_convert.contents import look
from weight_convert.dialects import registry
from weight_convert.opening import open_source
from weight_convert.source import Content, Options, Source, as_json, describe_parts, parse_json
from weight_convert.storage.tensor import Tensor

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is downloaded first: no code, and no pickles where there are safetensors."""
HUB_PICKLES = ["*.bin", "*.pdparams"]
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Any one of these sets is a tokenizer."""
MOST_NAMES = 5
"""How many tensors of one kind an error lists."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `check` compares the tensors with the configuration."""

    directory: Path
    """The directory, or the file of weights."""
    dialect: str
    """The layout it is stored in, as `unillava convert --list` names it."""
    config: dict[str, Any]
    """The canonical config.json."""
    spec: LlavaSpec
    processor_config: dict[str, Any]
    """Image processor settings, merged over processor_config.json; video ones nested."""
    chat_template: str | None
    """The Jinja template that the checkpoint brings."""
    stored: Mapping[str, Tensor]
    """Canonical name -> where the tensor lies; buffers and a repeated tied head left out."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """Tokenizer, processor and generation files under their llava-hf names."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, as stored."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    def tensors(self) -> Iterator[tuple[str, np.ndarray, bool]]:
        """Every tensor as (canonical name, array, whether uint16 means bfloat16).

        In the order of the files, each mapped when it is reached: [out, in] orientation, dtype
        as stored. Drop an array before asking for the next one to stay at one tensor of memory.
        """
        for name, tensor in self.stored.items():
            yield name, tensor.read(), tensor.dtype == "BF16"

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply, as generation_config.json and config.json state them."""
        ids: set[int] = set()
        text = self.config.get("text_config") or {}
        generation = _json_of(self.files, "generation_config.json")
        for source in (generation, text):
            stated = source.get("eos_token_id")
            ids |= set(stated if isinstance(stated, list) else [stated]) - {None}
        return tuple(sorted(ids))

    def tokenizer(self) -> Any:
        """The tokenizer (transformers), from the files of this directory alone.

        transformers imports torch where it is installed: select a MindSpore backend first.

        Raises:
            CheckpointError: the files are missing or cannot be used.
        """
        held = set(self.files)
        if not any(held.issuperset(files) for files in TOKENIZER_FILES):
            raise CheckpointError(
                f"{self.directory} has no tokenizer",
                given=f"none of {' | '.join(' + '.join(files) for files in TOKENIZER_FILES)}",
                fix="copy the tokenizer files of the original checkpoint into it",
            )
        from transformers import AutoTokenizer

        try:
            with tempfile.TemporaryDirectory() as folder:
                # Only what the dialect read: other files there may be of another layout.
                for name, content in self.files.items():
                    data = content if isinstance(content, bytes) else content.read_bytes()
                    (Path(folder) / name).write_bytes(data)
                (Path(folder) / "config.json").write_bytes(as_json(self.config))
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
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


def open_checkpoint(
    path_or_hub_id: str | Path, *, base: str | Path | None = None, vision: str | Path | None = None
) -> Checkpoint:
    """Open a checkpoint of any dialect, or download one from the Hugging Face hub.

    Args:
        path_or_hub_id: a directory or a file of weights. If no such path exists and it looks like
            `organisation/name`, it is fetched from the hub (or found in its cache).
        base: a checkpoint that gives what this one lacks: the configuration and tokenizer of a
            bare weight file, or the model that an adapter belongs to.
        vision: the directory of the vision tower, if it is not inside.

    Raises:
        CheckpointError: not a checkpoint (the message says what is there instead), a missing or
            damaged file, an index that disagrees with its shards, a hub that does not answer.
        ConfigError: the configuration cannot be used.
    """
    path = locate(path_or_hub_id)
    dialect, _ = registry.recognise(look(path))
    options = Options(base=base and locate(base), vision=vision and locate(vision))
    if dialect.name == "hf":
        # `check` compares names and shapes, and says more about them.
        options = Options(allow_missing=("*",), allow_unused=("*",))
    return as_checkpoint(open_source(path, options, dialect.name))


def as_checkpoint(source: Source) -> Checkpoint:
    """A source of a whole model as a checkpoint.

    Raises:
        CheckpointError: it is only a part of a model (an adapter, a tower, a projector, …).
        ConfigError: the configuration cannot be used.
    """
    whole = source.dialect == "hf" or {"vision", "language"} <= source.parts
    if source.adapter is not None or not whole:
        kind = "a LoRA adapter" if source.adapter else describe_parts(source.parts)
        raise CheckpointError(
            f"{source.path} is not a whole model",
            given=f"dialect {source.dialect}: {kind}",
            expected="vision tower, projector and language model",
            fix="name the model that an adapter belongs to with --base DIR; put parts together "
            "with unillava compose",
        )
    processor = _processor_config(source.files)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    spec = _spec(source.path, source.config, processor, shapes)
    return Checkpoint(
        directory=source.path,
        dialect=source.dialect,
        config=source.config,
        spec=spec,
        processor_config=processor,
        chat_template=_chat_template(source.files),
        stored=dict(source.tensors),
        files=source.files,
    )


def locate(path_or_hub_id: str | Path) -> Path:
    """The path of a checkpoint; a hub id is downloaded.

    Raises:
        CheckpointError: there is no such path, and the hub does not give it.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_hub_id, str) and HUB_ID.fullmatch(path_or_hub_id):
        return _download(path_or_hub_id)
    raise CheckpointError(
        f"there is no directory {path}",
        expected="a checkpoint directory, or a hub id such as llava-hf/llava-1.5-7b-hf",
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
        if not any(directory.glob("*.safetensors")):
            snapshot_download(hub_id, allow_patterns=HUB_PICKLES)
        return directory
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"there is no directory {hub_id}, and the hub does not give a checkpoint of that name",
            given=f"{type(error).__name__}: {reason[0] if reason else ''}",
            fix="check the name and the network, or give the path of a directory",
        ) from error


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


# --- JSON files ------------------------------------------------------------------------------


def _json_of(files: Mapping[str, Content], name: str) -> dict[str, Any]:
    """An object from one of the small files; `{}` if it is not there."""
    content = files.get(name)
    if content is None:
        return {}
    return parse_json(content, name)


def _processor_config(files: Mapping[str, Content]) -> dict[str, Any]:
    """Settings of the image processor over those of the processor; the video ones nested.

    transformers 5 nests both in processor_config.json, and then reads no other file.
    """
    processor = _json_of(files, "processor_config.json")
    image = processor.pop("image_processor", None)
    video = processor.pop("video_processor", None)
    if image is None:
        image = _json_of(files, "preprocessor_config.json")
    if video is None:
        video = _json_of(files, "video_preprocessor_config.json")
    return processor | image | ({"video_processor": video} if video else {})


def _chat_template(files: Mapping[str, Content]) -> str | None:
    """The first of: chat_template.jinja, chat_template.json, processor's, tokenizer's."""
    jinja = files.get("chat_template.jinja")
    if jinja is not None:
        data = jinja if isinstance(jinja, bytes) else jinja.read_bytes()
        return data.decode()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = _json_of(files, name).get("chat_template")
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
    for prefix, count in _STACKS.items():
        found, wanted = _depth(stored, prefix), _depth(expected, prefix)
        if found != wanted:
            reports.append(f"the weights have {found} blocks, {count} says {wanted}")
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

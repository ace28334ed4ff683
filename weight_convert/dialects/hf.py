"""The spellings in which transformers writes one and the same LLaVA checkpoint.

The canonical names are those of the llava-hf files on the hub. transformers 5 leaves
`vision_model.` out when it saves, and uses other prefixes in memory, as versions since 4.52 do;
weights that were saved from `named_parameters()` have those. A spelling is a table of prefixes,
read in both directions; what follows a prefix never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from weight_convert import files
from weight_convert.canonical import (
    EMBEDDING,
    HEAD,
    TOP_DEFAULTS,
    is_buffer,
    projector_depth,
    text_config,
)
from weight_convert.contents import Contents
from weight_convert.dialects.base import Dialect, check_complete
from weight_convert.errors import CheckpointError
from weight_convert.source import (
    Options,
    Source,
    Target,
    as_json,
    describe_parts,
    pick_files,
)
from weight_convert.storage.tensor import Tensor

Spelling = Mapping[str, str]
"""Canonical prefix -> prefix in the spelling. Longer prefixes are tried first."""

HUB: Spelling = {
    "language_model.model.": "language_model.model.",
    "language_model.lm_head.": "language_model.lm_head.",
    "vision_tower.vision_model.": "vision_tower.vision_model.",
    "multi_modal_projector.": "multi_modal_projector.",
    "image_newline": "image_newline",
}
"""Files of the hub, and of transformers before 5: the canonical names themselves."""

SAVED_BY_5: Spelling = {**HUB, "vision_tower.vision_model.": "vision_tower."}
"""Files that transformers 5 saves."""

MEMORY_SINCE_4_52: Spelling = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
}
"""`named_parameters()` of transformers 4.52 to 4.57."""

MEMORY_OF_5: Spelling = {
    **MEMORY_SINCE_4_52,
    "vision_tower.vision_model.": "model.vision_tower.",
}
"""`named_parameters()` of transformers 5."""

SPELLINGS: Mapping[str, Spelling] = {
    "hub": HUB,
    "saved by transformers 5": SAVED_BY_5,
    "in memory, transformers 4.52 to 4.57": MEMORY_SINCE_4_52,
    "in memory, transformers 5": MEMORY_OF_5,
}


def _longest_first(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(set(pairs), key=lambda pair: (-len(pair[0]), pair)))


_TO_CANONICAL = _longest_first(
    (prefix, canonical) for table in SPELLINGS.values() for canonical, prefix in table.items()
)


def canonical_name(name: str) -> str:
    """The canonical name of a tensor stored in any spelling; an unknown name stays itself."""
    for prefix, canonical in _TO_CANONICAL:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
    return name


def spelled_name(name: str, spelling: Spelling) -> str:
    """A canonical name in one of SPELLINGS; a name outside the canonical ones stays itself."""
    for canonical in sorted(spelling, key=len, reverse=True):
        if name.startswith(canonical):
            return spelling[canonical] + name[len(canonical) :]
    return name


def spelling_of(names: Iterable[str]) -> str | None:
    """Which of SPELLINGS all names (buffers aside) are written in, None if in no single one."""
    weights = [name for name in names if not is_buffer(name)]
    for label, spelling in SPELLINGS.items():
        if all(spelled_name(canonical_name(name), spelling) == name for name in weights):
            return label
    return None


# --- the dialect -----------------------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
SIDE_FILES = (*TOKENIZER_FILES, *PROCESSOR_FILES, "generation_config.json")
"""The small files of a llava-hf directory beside config.json."""


def _evidence(contents: Contents) -> str:
    kind = contents.config.get("model_type")
    if kind not in TOP_DEFAULTS or "mm_vision_tower" in contents.config:
        return ""
    nested = [key for key in ("text_config", "vision_config") if key in contents.config]
    if contents.is_mindspore:
        return ""
    if nested or contents.first("multi_modal_projector.", "model.multi_modal_projector."):
        return f"config.json: model_type {kind!r}, {' and '.join(nested) or 'class defaults'}"
    return ""


def _read(contents: Contents, options: Options) -> Source:
    config = contents.config
    tensors, dropped = canonical_tensors(files.open_weights(contents.path))
    if text_config(config).get("tie_word_embeddings") and HEAD in tensors:
        if _repeats_embedding(tensors):
            tensors = _without_head(tensors)
        elif config.get("tie_word_embeddings") is False:
            # transformers 5 goes by the top of config.json, older ones by text_config.
            text = {**config["text_config"], "tie_word_embeddings": False}
            config = {**config, "text_config": text}
        else:
            raise _another_head(contents)
    check_complete(tensors, config, ("vision", "projector", "newline", "language"), options)
    return Source(
        "hf", contents.path, config, tensors, pick_files(contents.path, SIDE_FILES), dropped=dropped
    )


def canonical_tensors(
    stored: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors of any spelling under canonical names, in the order of the files; and the buffers.

    Raises:
        CheckpointError: two stored names mean the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    order = sorted(stored.items(), key=_file_order)
    for name, tensor in order:
        canonical = canonical_name(name)
        if canonical in tensors:
            raise CheckpointError(
                f"one tensor is stored twice: {canonical}",
                given=f"{_where(tensors[canonical])}, {_where(tensor)}",
            )
        if not is_buffer(name):
            tensors[canonical] = tensor
    return tensors, tuple(name for name, _ in order if is_buffer(name))


def _file_order(item: tuple[str, Tensor]) -> tuple[str, int, str]:
    name, tensor = item
    return tensor.places[0].path.name, tensor.places[0].offset, name


def _where(tensor: Tensor) -> str:
    return f"{tensor.places[0].name} in {tensor.places[0].path.name}"


def without_repeated_head(contents: Contents, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a head that repeats the embedding, as some tools save it.

    Raises:
        CheckpointError: the head differs from the embedding that it is said to be.
    """
    if not _repeats_embedding(tensors):
        raise _another_head(contents)
    return _without_head(tensors)


def _without_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _another_head(contents: Contents) -> CheckpointError:
    return CheckpointError(
        f"config.json of {contents.path} says that the output head is the embedding matrix, "
        "but the file holds another head",
        given=f"tie_word_embeddings true, and a {HEAD} unlike {EMBEDDING}",
        fix="if the head was trained on its own, set tie_word_embeddings to false, at the "
        "top of config.json and in text_config",
    )


def _repeats_embedding(tensors: Mapping[str, Tensor]) -> bool:
    embedding, head = tensors.get(EMBEDDING), tensors[HEAD]
    same = embedding is not None and embedding.dtype == head.dtype
    return same and np.array_equal(_bits(embedding.read()), _bits(head.read()))


def _bits(array: np.ndarray) -> np.ndarray:
    """Bits rather than values: NaN equals itself, 0.0 and -0.0 differ."""
    return array.reshape(-1).view(np.uint8)


def _write(source: Source, options: Options) -> Target:
    wanted = {"vision", "language"} | ({"projector"} if projector_depth(source.config) else set())
    if not wanted <= source.parts:
        raise CheckpointError(
            "dialect hf holds whole models",
            given=f"{source.path}: {describe_parts(source.parts)}",
            fix="put parts together with `unillava compose`, or write a part: --to clip, siglip, "
            "llama or projector",
        )
    if options.spelling not in (None, *SPELLINGS):
        raise CheckpointError(
            "hf has no such names", given=options.spelling, expected=", ".join(SPELLINGS)
        )
    spelling = SPELLINGS[options.spelling or "hub"]
    stored = {spelled_name(name, spelling): t for name, t in source.tensors.items()}
    weights, index = files.shards(stored, options.weights or "safetensors", options.max_shard_bytes)
    documents = {"config.json": as_json(source.config), **source.files, **index}
    return Target("hf", weights, documents)


HF = Dialect(
    "hf",
    "Hugging Face LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video (llava-hf; safetensors or .bin)",
    _evidence,
    _read,
    _write,
)
DIALECTS = (HF,)

"""The tokens of media and padding, and the rows of the vocabulary that they need.

Original checkpoints mark an image with a number outside the vocabulary; llava-hf's have a token
for it. `grow` adds the tokens as llava-hf's conversion does, `trim` takes away what was added:

* `<image>` gets the first free id of the tokenizer (32000 for LLaMA, 64000 for Yi, 128256 for
  LLaMA 3, 151646 for Qwen2), `<pad>` the next; in the family with video `<video>` comes first.
  There is no new `<pad>` where the tokenizer pads with another token than the unknown one.
* If the ids need more rows than there are, the embedding and the head grow to the next multiple
  of 64. A new row is the mean of the old ones, added up in float64 in an order that is the same
  everywhere (`mean_row`). llava-hf's are drawn at random, and differ from run to run.
* A sentencepiece model alone gets a tokenizer.json beside it (`tokenizer_json` says why).

What already has the tokens and rows stays as it is: 32064 rows without a record are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from weight_convert.canonical import EMBEDDING, HEAD, MPT_EMBEDDING, Config
from weight_convert.cast import from_float, to_float
from weight_convert.dialects.tokenizer_json import (
    CONTROLS,
    can_convert,
    read_model,
    special_token,
    token_text,
    tokenizer_json,
)
from weight_convert.errors import CheckpointError
from weight_convert.mapping import derive
from weight_convert.source import Content, Source, Vocabulary, as_json, parse_json
from weight_convert.storage.tensor import Tensor

MULTIPLE = 64
PAD = "<pad>"
MEDIA = {"llava_next_video": ("video", "image")}
"""Family -> its media in the order of their ids; those that are not here have images alone."""
MATRICES = (EMBEDDING, HEAD, MPT_EMBEDDING)
"""Tensors with a row for every token."""

FAST, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIALS, ADDED = "special_tokens_map.json", "added_tokens.json"
EDITED = (FAST, SETTINGS, SPECIALS, ADDED)
PIECES, VOCABULARY = "tokenizer.model", "vocab.json"
DECODER = "added_tokens_decoder"
"""Field of tokenizer_config.json: id -> token."""
MEMORY = "vocabulary"
"""Key of `Source.memory` for what `trim` cannot know otherwise: `made` lists files that were not
there, and DECODER if that field was not; `pad` is file -> the pad token that it named."""


# --- there and back --------------------------------------------------------------------------


def grow(source: Source) -> Source:
    """The source with the tokens that its family needs, and rows for them.

    `Source.vocabulary` records what was added; it stays None if nothing was. The configuration
    gets the ids and the number of rows. Without tokenizer files the ids begin after the last row.

    Args:
        source: whose configuration has `model_type` and `text_config`.

    Raises:
        CheckpointError: a tokenizer file cannot be read; embedding and head differ in rows.
    """
    rows = rows_of(source)
    tokenizer = _Tokenizer(source.files)
    tokenizer.make_fast()
    ids, pad = tokenizer.ids(), tokenizer.own_pad() or PAD
    media = [f"<{kind}>" for kind in MEDIA.get(source.config["model_type"], ("image",))]
    free = max(ids.values(), default=rows - 1) + 1
    missing = [token for token in (*media, pad) if token not in ids]
    added = {token: free + n for n, token in enumerate(missing)}
    if ids:
        tokenizer.add(added)
    ids = {**ids, **added}
    last = max(ids[token] for token in (*media, pad))
    total = rows if last < rows else math.ceil((last + 1) / MULTIPLE) * MULTIPLE
    config = {
        **source.config,
        **{f"{token[1:-1]}_token_index": ids[token] for token in media},
        "pad_token_id": ids[pad],
        "text_config": {**source.config["text_config"], "vocab_size": total},
    }
    return replace(
        source,
        config=dict(sorted(config.items())),
        tensors=_with_rows(source.tensors, lambda tensor: _extended(tensor, total)),
        files=tokenizer.files(),
        vocabulary=Vocabulary(rows, added) if added or total != rows else None,
        memory={**source.memory, **({MEMORY: tokenizer.memory} if tokenizer.memory else {})},
    )


def trim(source: Source) -> Source:
    """The source without the rows and tokens that `grow` added, and without their ids.

    Without a record it stays as it is, but for a tokenizer.json that `grow` made.

    Raises:
        CheckpointError: a tokenizer file cannot be read; fewer rows than the record says.
    """
    added = source.vocabulary.tokens if source.vocabulary else {}
    tokenizer = _Tokenizer(source.files)
    tokenizer.restore(added, source.memory.get(MEMORY, {}))
    kept = {name: content for name, content in source.memory.items() if name != MEMORY}
    source = replace(source, files=tokenizer.files(), memory=kept)
    if source.vocabulary is None:
        return source
    rows, numbers = source.vocabulary.rows, set(added.values())
    indices = ("image_token_index", "video_token_index", "pad_token_id")
    config = {k: v for k, v in source.config.items() if k not in indices or v not in numbers}
    config["text_config"] = {**config["text_config"], "vocab_size": rows}
    return replace(
        source,
        config=config,
        tensors=_with_rows(source.tensors, lambda tensor: _cut(tensor, rows)),
        vocabulary=None,
    )


# --- rows ------------------------------------------------------------------------------------


def rows_of(source: Source) -> int:
    """Rows of the vocabulary: those of the tensors, else what the configuration says.

    Raises:
        CheckpointError: embedding and head have different numbers of rows.
    """
    rows = {n: t.shape[0] for n, t in source.tensors.items() if n in MATRICES and len(t.shape) == 2}
    if len(set(rows.values())) > 1:
        raise CheckpointError(
            "embedding and head have different numbers of rows",
            given=", ".join(f"{name} {count}" for name, count in rows.items()),
        )
    return next(iter(rows.values()), source.config["text_config"]["vocab_size"])


def _with_rows(
    tensors: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return {name: change(t) if name in MATRICES else t for name, t in tensors.items()}


def _extended(tensor: Tensor, rows: int) -> Tensor:
    old = tensor.shape[0]
    if old == rows:
        return tensor
    shape = (rows, *tensor.shape[1:])

    def extend(values: np.ndarray) -> np.ndarray:
        grown = np.empty(shape, values.dtype)
        grown[:old] = values
        grown[old:] = mean_row(values, tensor.dtype)
        return grown

    return derive([tensor], shape, extend, f"add {rows - old} mean rows")


def _cut(tensor: Tensor, rows: int) -> Tensor:
    old = tensor.shape[0]
    if old == rows:
        return tensor
    if old < rows:
        raise CheckpointError(
            f"{tensor.places[0].name} has fewer rows than before tokens were added",
            given=old,
            expected=f"at least {rows}",
            fix="remove unillava_manifest.json if it belongs to another checkpoint",
        )
    shape = (rows, *tensor.shape[1:])
    return derive([tensor], shape, lambda values: values[:rows], f"drop {old - rows} added rows")


SUM_BLOCK = 1024
"""Rows that are added up at once: a power of two."""


def mean_row(values_VD: np.ndarray, code: str) -> np.ndarray:
    """The mean of all rows, in the dtype of the file: [V, D] -> [D].

    Blocks of SUM_BLOCK rows, filled up with zeros, are folded in halves (row n plus row n + half)
    in float64 until one row is left; the blocks' rows are added in order, divided by V, rounded
    to float32 and then to the dtype. Elementwise additions alone: the bits are the same with
    every NumPy on every machine.

    Args:
        values_VD: as `Tensor.read` gives them.
        code: their dtype code.
    """
    total_D = np.zeros(values_VD.shape[1])
    for start in range(0, len(values_VD), SUM_BLOCK):
        rows = to_float(values_VD[start : start + SUM_BLOCK], code)
        block = np.zeros((SUM_BLOCK, values_VD.shape[1]))
        block[: len(rows)] = rows
        while len(block) > 1:
            half = len(block) // 2
            block = block[:half] + block[half:]
        total_D += block[0]
    mean_D = total_D / len(values_VD)
    return from_float(mean_D if code == "F64" else mean_D.astype(np.float32), code)


# --- tokens ----------------------------------------------------------------------------------


def token_ids(files: Mapping[str, Content]) -> dict[str, int]:
    """Every token of a tokenizer and its id; `{}` if there are no tokenizer files.

    Args:
        files: under their llava-hf names.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return _Tokenizer(files).ids()


class _Tokenizer:
    """Tokenizer files that are being edited."""

    def __init__(self, files: Mapping[str, Content]) -> None:
        self._given = dict(files)
        self._documents = {name: _parsed(name, files) for name in EDITED if name in files}
        self._changed: set[str] = set()
        self.memory: Config = {}
        """See MEMORY."""

    def files(self) -> dict[str, Content]:
        """The files: those that changed as JSON, the others as they were given."""
        kept = {n: c for n, c in self._given.items() if n not in EDITED or n in self._documents}
        return {**kept, **{name: as_json(self._documents[name]) for name in sorted(self._changed)}}

    def ids(self) -> dict[str, int]:
        """Token -> id."""
        ids: dict[str, int] = {}
        fast = self._documents.get(FAST)
        if fast is not None:
            ids |= _vocabulary(fast)
            ids |= {token["content"]: token["id"] for token in fast.get("added_tokens") or ()}
        elif PIECES in self._given:
            pieces = read_model(self._bytes(PIECES)).pieces
            ids |= {piece: n for n, (piece, _, _) in enumerate(pieces)}
        elif "vocab.json" in self._given:
            ids |= _parsed(VOCABULARY, self._given)
        if ids:
            ids |= {token["content"]: n for n, token in self._added_before().items()}
        return ids

    def own_pad(self) -> str | None:
        """The token that is padded with, if there is one and it is not the unknown one."""
        pad = self._named("pad_token")
        unusable = ("", self._named("unk_token"), "<unk>")
        return None if pad in unusable or pad not in self.ids() else pad

    def make_fast(self) -> None:
        """Make tokenizer.json (and settings, if there are none) from a sentencepiece model."""
        if FAST in self._documents or PIECES not in self._given:
            return
        model = read_model(self._bytes(PIECES))
        if not can_convert(model):
            return
        if SETTINGS not in self._documents:
            usual = (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
            named = {f"{name}_token": t for name, t in usual if t in model.of_type(*CONTROLS)}
            self._make(SETTINGS, {"tokenizer_class": "LlamaTokenizer", **named})
        added = {n: {**t, "normalized": False} for n, t in self._added_before().items()}
        self._make(FAST, tokenizer_json(model, self._documents[SETTINGS], added))

    def add(self, tokens: Mapping[str, int]) -> None:
        """Add special tokens wherever the files list such; PAD becomes the pad token."""
        if tokens and FAST not in self._documents:
            self._make_decoder()
        lists_ids = DECODER in self._documents.get(SETTINGS, {})
        for token, number in tokens.items():
            if FAST in self._documents:
                entry = {"id": number, **special_token(token)}
                self._edit(FAST).setdefault("added_tokens", []).append(entry)
            if lists_ids:
                self._edit(SETTINGS)[DECODER][str(number)] = special_token(token)
            if ADDED in self._documents:
                self._edit(ADDED)[token] = number
        if PAD in tokens:
            before = {n: self._documents[n] for n in (SETTINGS, SPECIALS) if n in self._documents}
            pads = {n: d["pad_token"] for n, d in before.items() if "pad_token" in d}
            self.memory["pad"] = pads
            for name in before:
                self._edit(name)["pad_token"] = PAD

    def restore(self, tokens: Collection[str], memory: Config) -> None:
        """Undo `make_fast` and `add`."""
        made = memory.get("made", ())
        for name in {FAST, SETTINGS} & set(made):
            self._documents.pop(name, None)
        for name in (SETTINGS, SPECIALS):
            pad = self._documents.get(name, {}).get("pad_token")
            if PAD in tokens and token_text(pad) == PAD:
                before = memory.get("pad", {})
                self._edit(name).pop("pad_token")
                self._edit(name).update({"pad_token": before[name]} if name in before else {})
        if DECODER in made and DECODER in self._documents.get(SETTINGS, {}):
            self._edit(SETTINGS).pop(DECODER)
        if not tokens:
            return
        if FAST in self._documents:
            fast = self._edit(FAST)
            listed = fast.get("added_tokens") or []
            fast["added_tokens"] = [token for token in listed if token["content"] not in tokens]
        if DECODER in self._documents.get(SETTINGS, {}):
            settings = self._edit(SETTINGS)
            settings[DECODER] = {
                n: token for n, token in settings[DECODER].items() if token["content"] not in tokens
            }
        if ADDED in self._documents:
            for token in tokens:
                self._edit(ADDED).pop(token, None)

    def _make_decoder(self) -> None:
        if SETTINGS not in self._documents:
            self._make(SETTINGS, {})
        if not self._documents[SETTINGS].get(DECODER):
            before = sorted(self._added_before().items())
            self._edit(SETTINGS)[DECODER] = {str(number): token for number, token in before}
            self.memory.setdefault("made", []).append(DECODER)

    def _make(self, name: str, document: Config) -> None:
        self._documents[name] = document
        self._changed.add(name)
        self.memory.setdefault("made", []).append(name)

    def _edit(self, name: str) -> Config:
        self._changed.add(name)
        return self._documents[name]

    def _bytes(self, name: str) -> bytes:
        content = self._given[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def _named(self, kind: str) -> str:
        """The special token of that kind, an empty string if there is none."""
        documents = (self._documents.get(name, {}) for name in (SETTINGS, SPECIALS))
        texts = (token_text(document.get(kind)) for document in documents)
        return next((text for text in texts if text), "")

    def _added_before(self) -> dict[int, Config]:
        """id -> token, of what was added to the tokenizer's own vocabulary."""
        stated = self._documents.get(SETTINGS, {}).get(DECODER)
        if stated:
            return {int(number): dict(token) for number, token in stated.items()}
        return {
            number: special_token(content, special=False)
            for content, number in self._documents.get(ADDED, {}).items()
        }


def _vocabulary(fast: Config) -> dict[str, int]:
    pieces = (fast.get("model") or {}).get("vocab") or {}
    if isinstance(pieces, dict):
        return pieces
    return {piece: n for n, (piece, _) in enumerate(pieces)}  # Unigram: [piece, score]


# --- what the files must be ------------------------------------------------------------------


def _is_token(token: object) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str)


def _is_id(number: object) -> bool:
    return type(number) is int and number >= 0


def _fast_is_sound(document: Config) -> bool:
    listed, model = document.get("added_tokens") or [], document.get("model") or {}
    if not isinstance(listed, list) or not isinstance(model, dict):
        return False
    pieces = model.get("vocab") or {}
    if isinstance(pieces, list):
        sound = all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pieces)
    else:
        sound = isinstance(pieces, dict) and all(map(_is_id, pieces.values()))
    return sound and all(_is_token(token) and _is_id(token.get("id")) for token in listed)


def _settings_are_sound(document: Config) -> bool:
    listed = document.get(DECODER) or {}
    return isinstance(listed, dict) and all(
        number.isdecimal() and _is_token(token) for number, token in listed.items()
    )


_CHECKS: dict[str, Callable[[Config], bool]] = {
    FAST: _fast_is_sound,
    SETTINGS: _settings_are_sound,
    SPECIALS: lambda document: True,
    ADDED: lambda document: all(map(_is_id, document.values())),
    VOCABULARY: lambda document: all(map(_is_id, document.values())),
}
"""File -> whether tokens are written in it as tokenizers do."""


def _parsed(name: str, files: Mapping[str, Content]) -> Config:
    document = parse_json(files[name], name)
    if not _CHECKS[name](document):
        raise CheckpointError(
            f"{name} does not list its tokens as tokenizers do",
            fix="use the tokenizer files that were saved with the checkpoint",
        )
    return document

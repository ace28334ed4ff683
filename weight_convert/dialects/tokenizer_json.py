"""tokenizer.json of a sentencepiece BPE model, as the llava-hf files of the hub have it.

Original checkpoints bring `tokenizer.model` alone. transformers 5 reads such a directory with the
tokenizer of its model type, and for LLaVA that is one without LLaMA's leading space, so the ids
would be wrong. The file made here says everything itself.

As in the hub's files every stretch of text between control tokens begins with a space (`▁`). That
is how original LLaVA tokenises what stands around an image: piece by piece.

Source: sentencepiece, src/sentencepiece_model.proto; transformers, convert_slow_tokenizer.py
(merges follow from the scores of the pieces); tokenizers, the JSON of `Tokenizer.to_str`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weight_convert.canonical import Config
from weight_convert.errors import CheckpointError
from weight_convert.storage.protobuf import Field, WireError, read_fields, read_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of pieces."""
CONTROLS = (UNKNOWN, CONTROL)
BPE = 2
SPACE = "▁"
MOST_PIECES = 1_000_000


@dataclass(frozen=True)
class Model:
    """What a sentencepiece model says."""

    pieces: tuple[tuple[str, float, int], ...]
    """(piece, score, type) in the order of the ids."""
    kind: int
    """BPE or another algorithm."""
    changes_text: bool
    """Whether the text is normalised beyond writing spaces as `▁`."""
    leading_space: bool

    def of_type(self, *types: int) -> dict[str, int]:
        """Piece -> id of those types."""
        return {piece: n for n, (piece, _, type_) in enumerate(self.pieces) if type_ in types}


def read_model(data: bytes) -> Model:
    """Read `tokenizer.model`.

    Raises:
        CheckpointError: it is not a sentencepiece model.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Field] = {}
    normaliser: dict[int, Field] = {}
    try:
        for field in read_fields(data, 0, len(data)):
            if field.number == 1:
                pieces.append(_piece(data, field))
            elif field.number in (2, 3):
                inner = {one.number: one for one in read_fields(data, field.begin, field.end)}
                (trainer if field.number == 2 else normaliser).update(inner)
            if len(pieces) > MOST_PIECES:
                raise WireError(f"more than {MOST_PIECES} pieces", field.offset)
    except WireError as error:
        raise _unreadable(str(error)) from None
    if not pieces:
        raise _unreadable("no pieces")
    table = normaliser.get(2)
    return Model(
        tuple(pieces),
        kind=_number(trainer, 3, 1),
        changes_text=bool(table and table.end > table.begin) or bool(_number(normaliser, 4, 1)),
        leading_space=bool(_number(normaliser, 3, 1)),
    )


def _piece(data: bytes, field: Field) -> tuple[str, float, int]:
    inner = {one.number: one for one in read_fields(data, field.begin, field.end)}
    if 1 not in inner:
        raise WireError("a piece without text", field.offset)
    bits = _number(inner, 2, 0).to_bytes(8, "little")[:4]
    return read_text(data, inner[1]), struct.unpack("<f", bits)[0], _number(inner, 3, NORMAL)


def _number(fields: Mapping[int, Field], number: int, default: int) -> int:
    return fields[number].value if number in fields else default


def _unreadable(problem: str) -> CheckpointError:
    return CheckpointError(
        "tokenizer.model is not a sentencepiece model",
        given=problem,
        fix="put the tokenizer files of the original checkpoint there, or tokenizer.json",
    )


def can_convert(model: Model) -> bool:
    """Whether tokenizer.json can say the same: BPE that leaves the text as it is."""
    return model.kind == BPE and not model.changes_text and len(model.of_type(UNKNOWN)) == 1


def tokenizer_json(
    model: Model, settings: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]
) -> Config:
    """tokenizer.json.

    Args:
        model: one that `can_convert`.
        settings: tokenizer_config.json; `add_bos_token` and `add_eos_token` count.
        added: id -> token, as in `added_tokens_decoder`, besides the model's own control tokens.
    """
    known = {n: special_token(piece) for piece, n in model.of_type(*CONTROLS).items()}
    known |= {
        n: special_token(piece, special=False) for piece, n in model.of_type(USER_DEFINED).items()
    }
    (unknown,) = model.of_type(UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, **token} for n, token in sorted({**known, **added}.items())],
        "normalizer": _normaliser(model),
        "pre_tokenizer": None,
        "post_processor": _post_processor(model, settings),
        "decoder": _decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(model.of_type(BYTE)),
            "vocab": {piece: n for n, (piece, _, _) in enumerate(model.pieces)},
            "merges": [f"{left} {right}" for left, right in merges(model)],
        },
    }


def special_token(content: str, *, special: bool = True) -> Config:
    """A token as `added_tokens` and `added_tokens_decoder` describe it."""
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": special,
    }


def merges(model: Model) -> list[tuple[str, str]]:
    """The merges that lead to the pieces, best first."""
    ids = model.of_type(NORMAL)
    found: list[tuple[float, str, str]] = []
    for piece, number in ids.items():
        score = model.pieces[number][1]
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, *pair) for pair in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _normaliser(model: Model) -> Config:
    steps: list[Config] = [{"type": "Prepend", "prepend": SPACE}] if model.leading_space else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(model: Model) -> Config:
    steps: list[Config] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.leading_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(model: Model, settings: Mapping[str, Any]) -> Config | None:
    """Writes the tokens that begin and end a text."""
    controls = model.of_type(CONTROL)
    begin, end = (
        [name]
        if (name := token_text(settings.get(f"{side}_token"), usual)) in controls
        and settings.get(f"add_{side}_token", side == "bos")
        else []
        for side, usual in (("bos", "<s>"), ("eos", "</s>"))
    )
    if not (begin or end):
        return None

    def part(letter: str, number: int) -> list[Config]:
        written = [{"SpecialToken": {"id": name, "type_id": number}} for name in begin]
        written.append({"Sequence": {"id": letter, "type_id": number}})
        return written + [{"SpecialToken": {"id": name, "type_id": number}} for name in end]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {
            name: {"id": name, "ids": [controls[name]], "tokens": [name]} for name in begin + end
        },
    }


def token_text(token: Any, absent: str = "") -> str:
    """The text of a special token, which files write as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else absent

"""The tokens and rows that a canonical checkpoint needs: added as llava-hf does, and taken away."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.original_layout import MEDIA, without_media
from weight_convert.canonical import EMBEDDING, HEAD, MPT_EMBEDDING
from weight_convert.cast import from_float, to_float
from weight_convert.dialects.tokenizer_json import can_convert, merges, read_model, tokenizer_json
from weight_convert.dialects.vocabulary import grow, mean_row, rows_of, token_ids, trim
from weight_convert.errors import CheckpointError
from weight_convert.source import Content, Source, Vocabulary
from weight_convert.storage.tensor import Place, Tensor

Tiny = Callable[..., Path]
CODES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


def tensor(array: np.ndarray, code: str = "F32", name: str = "t") -> Tensor:
    return Tensor(code, array.shape, lambda: array, (Place(Path("w"), 0, name),))


def source(
    rows: int,
    files: dict[str, Content] | None = None,
    family: str = "llava",
    names: tuple[str, ...] = (EMBEDDING, HEAD),
    **more: Any,
) -> Source:
    """A source of `rows` rows of width 3; the embedding counts up, the head counts down."""
    values = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    tensors = {name: tensor(values if k == 0 else -values) for k, name in enumerate(names)}
    config = {"model_type": family, "text_config": {"model_type": "llama", "vocab_size": rows}}
    return Source("original", Path("here"), config, tensors, files or {}, **more)


def as_files(documents: dict[str, Any]) -> dict[str, Content]:
    return {
        name: content if isinstance(content, bytes | Path) else json.dumps(content).encode()
        for name, content in documents.items()
    }


def parsed(files: dict[str, Content]) -> dict[str, Any]:
    """JSON files as values, others as bytes."""
    read = {n: c if isinstance(c, bytes) else c.read_bytes() for n, c in files.items()}
    return {n: json.loads(data) if n.endswith(".json") else data for n, data in read.items()}


def fast(count: int, *added: str, pad: str | None = None, unk: str | None = "<unk>") -> dict:
    """tokenizer.json and its settings, of `count` pieces and some added tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"piece{n}" for n in range(3, count))][:count]
    listed = [{"id": count + n, "content": token, "special": True} for n, token in enumerate(added)]
    names = {"unk_token": unk, "pad_token": pad}
    return {
        "tokenizer.json": {
            "added_tokens": listed,
            "model": {"type": "BPE", "vocab": {piece: n for n, piece in enumerate(pieces)}},
        },
        "tokenizer_config.json": {key: value for key, value in names.items() if value},
    }


# --- ids and rows --------------------------------------------------------------------------------

FAMILIES = {
    "LLaMA": (32000, fast(32000), "llava", {"<image>": 32000, "<pad>": 32001}, 32064),
    "LLaMA, pads with unk": (
        *(32000, fast(32000, pad="<unk>"), "llava"),
        *({"<image>": 32000, "<pad>": 32001}, 32064),
    ),
    "video": (
        *(32000, fast(32000), "llava_next_video"),
        *({"<video>": 32000, "<image>": 32001, "<pad>": 32002}, 32064),
    ),
    "Yi": (64000, fast(64000), "llava_next", {"<image>": 64000, "<pad>": 64001}, 64064),
    "LLaMA 3": (
        *(128256, fast(128000, *(f"<|{n}|>" for n in range(256)), unk=None), "llava_next"),
        *({"<image>": 128256, "<pad>": 128257}, 128320),
    ),
    "Open-LLaVA-NeXT on LLaMA 3": (
        *(
            128257,
            fast(128000, *(f"<|{n}|>" for n in range(256)), "<pad>", pad="<pad>", unk=None),
        ),
        *("llava_next", {"<image>": 128257}, 128320),
    ),
    "Qwen2, rows to spare": (
        151936,
        fast(151643, "<|endoftext|>", "<|im_start|>", "<|im_end|>", pad="<|endoftext|>", unk=None),
        "llava_next",
        {"<image>": 151646},
        151936,
    ),
    "LLaVA v0": (
        32004,
        fast(32000, "[PAD]", "<im_patch>", "<im_start>", "<im_end>", pad="[PAD]"),
        "llava",
        {"<image>": 32004},
        32064,
    ),
    "LLaVA v1": (
        *(32003, fast(32000, "<im_patch>", "<im_start>", "<im_end>"), "llava"),
        *({"<image>": 32003, "<pad>": 32004}, 32064),
    ),
    "hub": (32064, fast(32000, "<image>", "<pad>", pad="<pad>"), "llava", {}, 32064),
    "no tokenizer": (32000, {}, "llava", {"<image>": 32000, "<pad>": 32001}, 32064),
}


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_ids_and_rows_are_llava_hfs_and_go_away_again(case: Any) -> None:
    rows, documents, family, added, total = case
    before = source(rows, as_files(documents), family)
    grown = grow(before)

    assert (grown.vocabulary.tokens if grown.vocabulary else {}) == added
    assert grown.config["text_config"]["vocab_size"] == total
    assert {name: t.shape for name, t in grown.tensors.items()} == dict.fromkeys(
        (EMBEDDING, HEAD), (total, 3)
    )
    known = added or {"<image>": 32000, "<pad>": 32001}
    assert grown.config["image_token_index"] == known["<image>"]
    if family == "llava_next_video":
        assert grown.config["video_token_index"] == known["<video>"]
    if documents:
        ids = token_ids(grown.files)
        assert {token: ids[token] for token in added} == added
        assert sorted(set(ids.values())) == list(range(len(ids)))
        assert grown.config["pad_token_id"] == ids.get(
            (parsed(grown.files)["tokenizer_config.json"])["pad_token"]
        )

    again = trim(grown)
    assert again.vocabulary is None
    assert parsed(again.files) == parsed(before.files)
    if added:
        own_pad = {} if "<pad>" in added else {"pad_token_id": grown.config["pad_token_id"]}
        assert again.config == before.config | own_pad
        assert again.memory == before.memory
    for name, one in before.tensors.items():
        assert np.array_equal(again.tensors[name].read(), one.read())


def test_nothing_changes_what_is_complete() -> None:
    files = as_files(fast(32000, "<image>", "<pad>", pad="<pad>"))
    before = source(32064, files)
    grown = grow(before)
    assert grown.vocabulary is None and grown.memory == {}
    assert grown.files == files, "the very same contents"
    assert all(grown.tensors[name] is before.tensors[name] for name in before.tensors)
    assert trim(grown).tensors == grown.tensors


def test_a_vocabulary_that_is_tied_or_of_mpt() -> None:
    for names in ((EMBEDDING,), (MPT_EMBEDDING,)):
        grown = grow(source(100, names=names))
        assert grown.tensors[names[0]].shape == (128, 3)
        assert trim(grown).tensors[names[0]].shape == (100, 3)


def test_rows_of_the_tensors_count_not_those_of_the_configuration() -> None:
    before = source(100)
    before.config["text_config"]["vocab_size"] = 99
    assert rows_of(before) == 100
    assert grow(before).config["image_token_index"] == 100


def test_faults_are_named() -> None:
    uneven = source(100)
    uneven = Source(
        "original", Path("x"), uneven.config, {**uneven.tensors, HEAD: tensor(np.zeros((90, 3)))}
    )
    with pytest.raises(CheckpointError, match="different numbers of rows"):
        grow(uneven)
    with pytest.raises(CheckpointError, match="fewer rows than before"):
        trim(source(100, vocabulary=Vocabulary(120, {})))
    for name, content in (
        ("tokenizer.json", {"added_tokens": {"<s>": 1}}),
        ("tokenizer.json", {"model": {"vocab": {"a": "b"}}}),
        ("tokenizer.json", {"model": {"vocab": [["a"]]}}),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "<s>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<s>"}}),
        ("added_tokens.json", {"<s>": "1"}),
        ("vocab.json", {"a": -1}),
    ):
        with pytest.raises(CheckpointError, match=f"{name} does not list its tokens"):
            grow(source(100, as_files({name: content})))


# --- new rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_new_rows_are_the_mean_of_the_old_ones(code: str) -> None:
    random = np.random.default_rng(5)
    values = from_float(random.standard_normal((2500, 7)) * 0.02, code)
    before = source(2500)
    before = Source("x", Path("x"), before.config, {EMBEDDING: tensor(values, code)})
    grown = grow(before).tensors[EMBEDDING].read()
    assert grown.dtype == values.dtype and grown.shape == (2560, 7)
    assert np.array_equal(grown[:2500], values)
    columns = to_float(values, code).astype(np.float64).T
    exact = np.array([math.fsum(column) / 2500 for column in columns])
    rounded = from_float(exact.astype(np.float64 if code == "F64" else np.float32), code)
    # fsum rounds once, we round at every addition: the last bit of float64 may differ.
    tolerance = 1e-15 if code == "F64" else 0
    for row in to_float(grown[2500:], code):
        np.testing.assert_allclose(row, to_float(rounded, code), rtol=0, atol=tolerance)


def test_new_rows_have_the_same_bits_everywhere() -> None:
    # Values whose sums depend on the order; the digests were made once.
    counts = np.arange(3000 * 5, dtype=np.int64).reshape(3000, 5)
    values = ((counts * 2654435761 % 2**24).astype(np.float32) / np.float32(3)).astype(np.float32)
    digest = hashlib.sha256(mean_row(values, "F32").tobytes()).hexdigest()
    double = hashlib.sha256(mean_row(values.astype(np.float64) / 7, "F64").tobytes()).hexdigest()
    assert (digest[:16], double[:16]) == ("6c29eb25393f1af8", "6f2e9f808ffd2394")


def test_the_order_of_additions_is_the_documented_one() -> None:
    scales = 10.0 ** (np.arange(1500) % 30)
    values = np.random.default_rng(0).standard_normal((1500, 2)) * scales[:, None]

    def folded(rows: list[float]) -> float:
        rows = [*rows, *[0.0] * (1024 - len(rows))]
        while len(rows) > 1:
            half = len(rows) // 2
            rows = [rows[n] + rows[n + half] for n in range(half)]
        return rows[0]

    for column, mean in zip(values.T.tolist(), mean_row(values, "F64"), strict=True):
        assert (0.0 + folded(column[:1024]) + folded(column[1024:])) / 1500 == mean


# --- tokenizer files -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_next_video"])
@pytest.mark.parametrize("text", ["llama", "llama3", "mistral", "qwen2"])
def test_tokenizers_get_the_tokens_and_lose_them(tiny: Tiny, text: str, family: str) -> None:
    directory = tiny(family=family, text=text)
    stripped = without_media(directory)
    whole = Tokenizer.from_file(str(directory / "tokenizer.json"))
    before = source(
        whole.get_vocab_size() - len(MEDIA) + (family == "llava"), as_files(stripped), family
    )
    grown = grow(before)
    made = Tokenizer.from_str(json.dumps(parsed(grown.files)["tokenizer.json"]))
    assert made.get_vocab() == whole.get_vocab()
    for line in ("USER: <image>\nWhat is <pad> this?</s>", "<video> <image>", "안녕 <|im_end|>"):
        assert made.encode(line).ids == whole.encode(line).ids
    settings = parsed(grown.files)["tokenizer_config.json"]
    theirs = json.loads((directory / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"] == theirs["added_tokens_decoder"]
    assert settings["pad_token"] == "<pad>"
    assert parsed(trim(grown).files) == stripped


def test_a_slow_tokenizer_lists_its_tokens_in_its_settings() -> None:
    documents = {
        "vocab.json": {f"piece{n}": n for n in range(50)},
        "merges.txt": b"#version\n",
        "added_tokens.json": {"<|endoftext|>": 50, "<|im_start|>": 51},
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "pad_token": None},
    }
    before = source(52, as_files(documents))
    grown = grow(before)
    made = parsed(grown.files)
    assert made["added_tokens.json"] == documents["added_tokens.json"] | {
        "<image>": 52,
        "<pad>": 53,
    }
    listed = made["tokenizer_config.json"]["added_tokens_decoder"]
    assert {n: token["content"] for n, token in listed.items()} == {
        "50": "<|endoftext|>", "51": "<|im_start|>", "52": "<image>", "53": "<pad>",
    }  # fmt: skip
    assert [listed[str(n)]["special"] for n in range(50, 54)] == [False, False, True, True]
    assert parsed(trim(grown).files) == documents


def test_without_a_record_tokens_stay() -> None:
    grown = grow(source(100, as_files(fast(100))))
    forgotten = Source("x", Path("x"), grown.config, grown.tensors, grown.files)
    assert trim(forgotten) == forgotten
    unremembered = Source(
        "x", Path("x"), grown.config, grown.tensors, grown.files, grown.vocabulary
    )
    assert "pad_token" not in parsed(trim(unremembered).files)["tokenizer_config.json"]


# --- tokenizer.json of a sentencepiece model -----------------------------------------------------


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pieces(**options)`: a trained sentencepiece model, as LLaMA's unless options differ."""
    from unillava.tiny import CORPUS

    folder = tmp_path_factory.mktemp("pieces")
    made: dict[str, Path] = {}

    def train(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            stem = folder / str(len(made))
            usual = dict(
                model_type="bpe", vocab_size=520, byte_fallback=True, split_digits=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
            )  # fmt: skip
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS * 5), model_prefix=str(stem), **{**usual, **options}
            )
            made[key] = stem.with_suffix(".model")
        return made[key]

    return train


def judge(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_a_model_is_read_as_the_library_reads_it(pieces: Callable[..., Path]) -> None:
    path = pieces()
    theirs, ours = judge(path), read_model(path.read_bytes())
    assert [piece for piece, _, _ in ours.pieces] == [
        theirs.id_to_piece(n) for n in range(theirs.vocab_size())
    ]
    assert [score for _, score, _ in ours.pieces] == [
        theirs.get_score(n) for n in range(theirs.vocab_size())
    ]
    assert ours.leading_space and can_convert(ours)
    for options in (
        {"model_type": "unigram", "vocab_size": 450},
        {"remove_extra_whitespaces": True},
    ):
        assert not can_convert(read_model(pieces(**options).read_bytes()))
    nfkc = pieces(normalization_rule_name="nfkc")
    assert not can_convert(read_model(nfkc.read_bytes()))


@pytest.mark.parametrize("leading_space", [True, False])
def test_ids_are_those_of_the_model(pieces: Callable[..., Path], leading_space: bool) -> None:
    path = pieces(add_dummy_prefix=leading_space)
    theirs = judge(path)
    document = tokenizer_json(read_model(path.read_bytes()), {}, {})
    ours = Tokenizer.from_str(json.dumps(document))
    words = st.sampled_from(
        ["USER", "What", " is ", "  ", "\n", "사진", "图片", "é", "▁", "<0x41>", "7"]
    )

    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.one_of(words, st.text(max_size=6)), max_size=8).map("".join))
    def agrees(text: str) -> None:
        text = text.replace("\x00", "")  # sentencepiece's own end of a string
        for token in ("<s>", "</s>", "<unk>"):
            text = text.replace(token, "")
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text)
        assert ours.encode(text).ids == [1, *ids]
        assert ours.decode(ids) == theirs.decode(ids)

    agrees()


def test_what_follows_an_image_begins_with_a_space(pieces: Callable[..., Path]) -> None:
    """As original LLaVA tokenises the two sides of an image, each on its own."""
    path = pieces()
    settings_file = {
        "add_bos_token": True, "bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "legacy": False, "pad_token": None, "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }  # fmt: skip
    files = {"tokenizer.model": path, "tokenizer_config.json": json.dumps(settings_file).encode()}
    count = judge(path).vocab_size()
    before = source(count, files)
    grown = grow(before)
    tokenizer = Tokenizer.from_str(json.dumps(parsed(grown.files)["tokenizer.json"]))
    expected = [1, *judge(path).encode("USER: "), count, *judge(path).encode("\nWhat is this?"), 2]
    assert tokenizer.encode("USER: <image>\nWhat is this?</s>").ids == expected
    assert tokenizer.token_to_id("<pad>") == count + 1
    assert parsed(grown.files)["tokenizer_config.json"]["pad_token"] == "<pad>"
    assert trim(grown).files == files | {
        "tokenizer_config.json": trim(grown).files["tokenizer_config.json"]
    }
    assert parsed(trim(grown).files)["tokenizer_config.json"] == settings_file


def test_added_tokens_and_absent_settings(pieces: Callable[..., Path]) -> None:
    path = pieces()
    count = judge(path).vocab_size()
    files = as_files(
        {"tokenizer.model": path, "added_tokens.json": {"<im_start>": count, "<im_end>": count + 1}}
    )
    grown = grow(source(count + 2, files))
    made = parsed(grown.files)
    assert made["tokenizer_config.json"] == {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>",
    }  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(made["tokenizer.json"]))
    assert tokenizer.encode("<im_start><image><im_end>").ids == [1, count, count + 2, count + 1]
    assert trim(grown).files.keys() == files.keys()
    assert parsed(trim(grown).files) == parsed(files)


def test_damaged_models_are_refused(pieces: Callable[..., Path]) -> None:
    data = pieces().read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for n in range(300):
        damaged = bytearray(data[: random.integers(1, len(data))] if n % 2 else data)
        for place in random.integers(0, len(damaged), 5):
            damaged[place] = random.integers(0, 256)
        try:
            model = read_model(bytes(damaged))
            if can_convert(model):
                merges(model)
        except CheckpointError as error:
            assert "tokenizer.model is not a sentencepiece model" in str(error)
            refused += 1
    assert refused > 100
    with pytest.raises(CheckpointError, match="no pieces"):
        read_model(b"")

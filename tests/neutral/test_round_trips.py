"""Every pair of dialects that can hold the same model, there and back, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from unillava.checkpoint import open_checkpoint
from weight_convert.contents import look
from weight_convert.convert import convert, open_source
from weight_convert.dialects import registry
from weight_convert.source import Options
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]


@dataclass(frozen=True)
class Form:
    """One way of writing a dialect."""

    dialect: str
    options: Options = field(default_factory=Options)

    def __str__(self) -> str:
        extra = [self.options.weights, self.options.spelling, "fused" * self.options.qkv_concat]
        shards = "sharded" * (self.options.max_shard_bytes < 10**9)
        return "-".join(filter(None, [self.dialect, *extra, shards]))


SMALL = 150_000
WHOLE = (
    Form("hf"),
    Form("hf", Options(weights="bin", max_shard_bytes=SMALL)),
    Form("hf", Options(spelling="saved by transformers 5", max_shard_bytes=SMALL)),
    Form("hf", Options(spelling="in memory, transformers 5", weights="bin")),
    Form("original"),
    Form("original", Options(weights="bin", max_shard_bytes=SMALL)),
    Form("mindformers"),
    Form("mindspore"),
    Form("mindspore", Options(weights="ckpt")),
    Form("paddlemix"),
    Form("paddlemix", Options(weights="safetensors", max_shard_bytes=SMALL)),
    Form("paddlemix", Options(weights="pdparams", max_shard_bytes=SMALL)),
    Form("parts"),
)
MODELS = {
    "next": {"family": "llava_next", "text": "llama", "vision": "clip", "dtype": "bfloat16"},
    "llava": {"family": "llava", "text": "llama", "vision": "clip", "dtype": "float16"},
    "qwen": {"family": "llava_next", "text": "qwen2", "vision": "siglip"},
    "mistral": {"family": "llava", "text": "mistral", "vision": "siglip"},
    "llama3": {"family": "llava_next", "text": "llama3", "vision": "clip"},
    "video": {"family": "llava_next_video", "text": "llama", "vision": "clip"},
}
HELD_BY = {
    "mindformers": {"next", "llava", "llama3", "video"},
    "paddlemix": set(MODELS) - {"video"},
}
"""Dialects that not every model fits into: MindFormers has no SigLIP, PaddleMIX no video."""


def holds(form: Form, model: str) -> bool:
    return model in HELD_BY.get(form.dialect, MODELS)


def small_files(directory: Path) -> dict[str, bytes]:
    """What is neither weights nor bookkeeping."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.suffix in (".json", ".jinja", ".model", ".txt")
        and "index" not in path.name
        and "manifest" not in path.name
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", WHOLE, ids=str)
def test_there_and_back(tiny: Tiny, tmp_path: Path, form: Form, model: str) -> None:
    if not holds(form, model):
        with pytest.raises(Exception, match=r"MindFormers has no class|PaddleMIX has no"):
            convert(tiny(**MODELS[model]), tmp_path / "there", form.dialect)
        return
    source, there, back = tiny(**MODELS[model]), tmp_path / "there", tmp_path / "back"
    convert(source, there, form.dialect, form.options)
    assert [d.name for d in registry.dialects().values() if d.evidence(look(there))] == [
        form.dialect
    ]
    assert verify(there).equal
    assert compare(source, there).equal
    checkpoint = open_checkpoint(there)
    checkpoint.check()
    assert checkpoint.spec == open_checkpoint(source).spec
    convert(there, back, "hf")
    assert compare(source, back).equal
    assert small_files(back) == small_files(source)


PAIRS = [
    pair
    for pair in itertools.permutations(WHOLE, 2)
    if pair[0].dialect != pair[1].dialect and "hf" not in (pair[0].dialect, pair[1].dialect)
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}--{pair[1]}")
def test_every_pair(tiny: Tiny, tmp_path: Path, pair: tuple[Form, Form]) -> None:
    """A -> B -> A without passing through hf: tensors and small files are those of A."""
    first, second = pair
    folders = [tmp_path / name for name in "aba"]
    folders[2] = tmp_path / "back"
    convert(tiny(**MODELS["next"]), folders[0], first.dialect, first.options)
    convert(folders[0], folders[1], second.dialect, second.options)
    convert(folders[1], folders[2], first.dialect, first.options)
    assert compare(folders[0], folders[1]).equal and compare(folders[0], folders[2]).equal
    weights = {path.name: path.read_bytes() for path in files_of(folders[0])}
    assert {path.name: path.read_bytes() for path in files_of(folders[2])} == weights


def files_of(directory: Path) -> list[Path]:
    """Every file but the manifests, which name where they come from."""
    return [p for p in directory.rglob("*") if p.is_file() and "manifest" not in p.name]


@pytest.mark.parametrize("model", MODELS)
def test_a_chain_through_all_ends_where_it_began(tiny: Tiny, tmp_path: Path, model: str) -> None:
    source = place = tiny(**MODELS[model])
    for number, form in enumerate([*filter(lambda f: holds(f, model), WHOLE), Form("hf")]):
        place = Path(convert_to(place, tmp_path / str(number), form))
    assert compare(source, place).equal
    assert small_files(place) == small_files(source)
    ours = {p.name: p.read_bytes() for p in source.glob("*.safetensors")}
    if len(ours) == 1:
        assert {p.name: p.read_bytes() for p in place.glob("*.safetensors")} == ours


def convert_to(source: Path, destination: Path, form: Form) -> Path:
    convert(source, destination, form.dialect, form.options)
    return destination


# --- parts ---------------------------------------------------------------------------------------

PARTS = {
    "language": (
        Form("llama"),
        Form("llama", Options(weights="bin", max_shard_bytes=SMALL)),
        Form("paddlenlp"),
        Form("paddlenlp", Options(qkv_concat=True)),
        Form("paddlenlp", Options(weights="safetensors")),
        Form("mindformers-llama"),
        Form("mindformers-llama", Options(qkv_concat=True)),
    ),
    "clip": (Form("clip"), Form("clip", Options(weights="bin")), Form("mindformers-clip")),
    "siglip": (Form("siglip"), Form("siglip", Options(weights="bin"))),
}
CASES = [
    (kind, pair)
    for kind, forms in PARTS.items()
    for pair in itertools.permutations(forms, 2)
    if pair[0].dialect != pair[1].dialect  # within one, the way back keeps the form that it finds
]


@pytest.mark.parametrize(
    ("kind", "pair"),
    CASES,
    ids=lambda case: "--".join(map(str, case)) if type(case) is tuple else case,
)
def test_parts(tiny: Tiny, tmp_path: Path, kind: str, pair: tuple[Form, Form]) -> None:
    first, second = pair
    model = MODELS["mistral" if kind == "siglip" else "next"]
    a, b, back = (tmp_path / name for name in ("a", "b", "back"))
    convert(tiny(**model), a, first.dialect, first.options)
    convert(a, b, second.dialect, second.options)
    convert(b, back, first.dialect, first.options)
    whole, part = open_source(tiny(**model)), open_source(a)
    assert part.tensors.keys() < whole.tensors.keys()
    assert all(
        tensor.read().tobytes() == whole.tensors[name].read().tobytes()
        for name, tensor in part.tensors.items()
    )
    assert compare(a, b).equal and compare(a, back).equal
    weights = {path.name: path.read_bytes() for path in files_of(a)}
    assert {path.name: path.read_bytes() for path in files_of(back)} == weights

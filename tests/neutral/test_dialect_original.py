"""Original LLaVA's directories against ones that are put together by hand."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import original_layout as layout
from tests.original_layout import Original, Raw, build_original, build_tower, read_raw
from unillava.checkpoint import open_checkpoint
from unillava.config import read_spec
from unillava.data.conversation import BY_CONTENT, get_template
from unillava.spec import LlavaSpec
from weight_convert.canonical import EMBEDDING, HEAD, PARTS
from weight_convert.cast import from_float, to_float
from weight_convert.contents import MANIFEST, look
from weight_convert.convert import convert, plan
from weight_convert.dialects import registry
from weight_convert.dialects.llava_config import Facts, canonical_config, facts_of, stored_config
from weight_convert.dialects.original import TEMPLATES
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options, Source
from weight_convert.verify import compare, verify

Tiny = Callable[..., Path]
ALL = [
    ("llava", "llama", "clip"),
    ("llava", "qwen2", "siglip"),
    ("llava_next", "llama", "siglip"),
    ("llava_next", "llama3", "clip"),
    ("llava_next", "mistral", "clip"),
    ("llava_next_video", "llama", "clip"),
    ("llava_next_video", "qwen2", "siglip"),
]


def raw_of(source: Source) -> Raw:
    """A source's tensors in the form of `layout.read_raw`."""
    return {n: (t.dtype, t.shape, t.read().tobytes()) for n, t in source.tensors.items()}


def spec_of(source: Source) -> LlavaSpec:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    return read_spec(source.config, keys=shapes)


def documents_of(directory: Path) -> dict[str, Any]:
    """Every JSON file below a directory but the manifests and indices."""
    return {
        path.relative_to(directory).as_posix(): json.loads(path.read_text())
        for path in sorted(directory.rglob("*.json"))
        if path.name != MANIFEST and not path.name.endswith(".index.json")
    }


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


def failure(original: Original, **options: Any) -> str:
    """The text of the error of opening it."""
    with pytest.raises(CheckpointError) as caught:
        open_source(original.directory, Options(vision=original.tower, **options))
    return str(caught.value)


@pytest.fixture
def build(tiny: Tiny, tmp_path: Path) -> Callable[..., Original]:
    """`build(family, text, vision, **options)`: see `build_original`."""

    def make(family: str = "llava", text: str = "llama", vision: str = "clip", **options: Any):
        kinds = {key: options.pop(key) for key in ("dtype", "config") if key in options}
        hf = tiny(family=family, text=text, vision=vision, **kinds)
        return build_original(hf, tmp_path / f"original-{len(list(tmp_path.iterdir()))}", **options)

    return make


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "text", "vision"), ALL)
def test_original_to_hf_and_back(
    build: Callable[..., Original], tiny: Tiny, tmp_path: Path, family: str, text: str, vision: str
) -> None:
    dtype = ("float16", "bfloat16")[text == "mistral"]
    original = build(family, text, vision, dtype=dtype, buffers=True)
    options = Options(vision=original.tower)
    source = open_source(original.directory, options)
    assert source.dialect == "original"
    assert {name.rsplit(".", 1)[1] for name in source.dropped} == {"inv_freq", "position_ids"}
    _check_tensors(source, original)
    _check_spec(source, tiny(family=family, text=text, vision=vision, dtype=dtype))

    convert(original.directory, tmp_path / "hf", "hf", options)
    convert(tmp_path / "hf", tmp_path / "again", "original")
    again = documents_of(tmp_path / "again")
    given = documents_of(original.directory)
    assert {name: again[name] for name in given} == given
    assert again.keys() - given.keys() == {
        "vision_tower/config.json",
        "vision_tower/preprocessor_config.json",
    }
    theirs, ours = read_raw(original.directory), read_raw(tmp_path / "again")
    assert ours == {n: theirs[n] for n in theirs if not n.endswith(("inv_freq", "position_ids"))}
    assert raw_of(open_source(tmp_path / "again")) == raw_of(source)
    assert verify(tmp_path / "hf").equal and verify(tmp_path / "again").equal


def _check_tensors(source: Source, original: Original) -> None:
    """Bit by bit; new rows are the mean of the old ones."""
    found = raw_of(source)
    for name, (code, shape, data) in original.tensors.items():
        if name in (EMBEDDING, HEAD):
            total = -(-(original.rows + 1) // 64) * 64
            assert found[name][:2] == (code, (total, *shape[1:]))
            assert found[name][2][: len(data)] == data
            values = to_float(source.tensors[name].read(), code)
            mean = values[: original.rows].astype(np.float64).mean(0).astype(np.float32)
            np.testing.assert_array_equal(
                values[original.rows :],
                np.tile(to_float(from_float(mean, code), code), (total - original.rows, 1)),
            )
        else:
            assert found[name] == (code, shape, data), name
    assert found.keys() == original.tensors.keys()


def _check_spec(source: Source, hf: Path) -> None:
    """What the tiny checkpoint says, but for what original LLaVA does in its own way."""
    expected = read_spec(json.loads((hf / "config.json").read_text()))
    spec = spec_of(source)
    if expected.family == "llava":
        expected = replace(expected, image_mode="pad")
    else:
        expected = replace(expected, anyres_variant="llava")
    assert replace(spec, template=None) == expected
    assert get_template(spec.template)


@pytest.mark.parametrize(("family", "text", "vision"), ALL)
def test_hf_to_original_and_back(
    tiny: Tiny, tmp_path: Path, family: str, text: str, vision: str
) -> None:
    hf = tiny(family=family, text=text, vision=vision, dtype="bfloat16")
    convert(hf, tmp_path / "original", "original", Options(weights="bin", max_shard_bytes=150_000))
    assert len(list((tmp_path / "original").glob("pytorch_model-0000*.bin"))) > 1
    convert(tmp_path / "original", tmp_path / "hf", "hf")
    assert documents_of(tmp_path / "hf") == documents_of(hf)
    assert read_raw(tmp_path / "hf") == read_raw(hf)
    # Without its manifest the directory says the same model, in original LLaVA's way.
    (tmp_path / "original" / MANIFEST).unlink()
    source = open_source(tmp_path / "original")
    assert raw_of(source) == read_raw(hf)
    expected = read_spec(json.loads((hf / "config.json").read_text()))
    if family != "llava":
        expected = replace(expected, anyres_variant="llava")
    assert spec_of(source) == expected


def test_what_is_written_is_the_layout_built_by_hand(
    build: Callable[..., Original], tiny: Tiny, tmp_path: Path
) -> None:
    hf = tiny(family="llava_next", text="mistral", dtype="float16")
    convert(hf, tmp_path / "original", "original")
    names = {layout.original_name(name): tensor for name, tensor in read_raw(hf).items()}
    assert read_raw(tmp_path / "original") == names
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    by_hand = layout.config_of(json.loads((hf / "config.json").read_text()))
    for key in by_hand.keys() & config.keys() - {
        "pad_token_id",
        "mm_vision_tower",
        "transformers_version",
    }:
        assert config[key] == by_hand[key], key
    assert by_hand.keys() - config.keys() == {"_name_or_path", "max_length", "use_cache"}


def test_other_dtypes(build: Callable[..., Original], tmp_path: Path) -> None:
    original = build("llava", dtype="bfloat16")
    options = Options(vision=original.tower, dtype="float16")
    convert(original.directory, tmp_path / "hf", "hf", options)
    convert(tmp_path / "hf", tmp_path / "again", "original")
    assert json.loads((tmp_path / "again/config.json").read_text())["torch_dtype"] == "float16"
    assert {code for code, _, _ in read_raw(tmp_path / "again").values()} == {"F16"}


# --- the vision tower ----------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
def test_a_tower_beside(
    build: Callable[..., Original], tiny: Tiny, tmp_path: Path, whole: bool
) -> None:
    """As v1.5 is: `mm_vision_tower` names it, a directory of that name is given."""
    original = build("llava", inside=False, unfreeze_mm_vision_tower=False)
    shutil.rmtree(original.tower)
    build_tower(tiny(family="llava"), original.tower, weights=True, whole=whole)
    options = Options(vision=original.tower)
    source = open_source(original.directory, options)
    _check_tensors(source, original)
    text_side = {"logit_scale", "text_model.final_layer_norm.weight", "text_projection.weight"}
    assert set(source.dropped) == (text_side if whole else set())
    settings = json.loads(source.files["preprocessor_config.json"])
    assert settings["image_processor_type"] == "LlavaImageProcessor" and settings["do_pad"] is True
    assert settings["size"] == {"shortest_edge": 28}

    convert(original.directory, tmp_path / "hf", "hf", options)
    convert(tmp_path / "hf", tmp_path / "again", "original")
    assert read_raw(tmp_path / "again") == read_raw(original.directory)
    again = documents_of(tmp_path / "again")
    assert again["config.json"] == original.config
    tower = {n: t for n, t in read_raw(original.tower).items() if n.startswith("vision_model.")}
    assert read_raw(tmp_path / "again" / "vision_tower") == tower
    # What was written holds its tower: nothing need be named.
    assert raw_of(open_source(tmp_path / "again")) == raw_of(source)


def test_a_siglip_beside_keeps_its_last_layer(
    build: Callable[..., Original], tmp_path: Path
) -> None:
    original = build("llava_next", "qwen2", "siglip", inside=False)
    source = open_source(original.directory, Options(vision=original.tower))
    spec = spec_of(source)
    # LLaVA-NeXT deletes the last of four layers and takes what is then the last state.
    assert (spec.vision.num_layers, spec.feature_layers, spec.keep_class_token) == (4, (-2,), True)
    tower = layout.tower_tensors(original.tensors)
    assert {n: raw_of(source)[f"vision_tower.{n}"] for n in tower} == tower

    convert(original.directory, tmp_path / "hf", "hf", Options(vision=original.tower))
    convert(tmp_path / "hf", tmp_path / "again", "original")
    written = read_raw(tmp_path / "again" / "vision_tower")
    assert written == {n: t for n, t in read_raw(original.tower).items() if "vision_model" in n}
    again = open_source(tmp_path / "again")
    assert spec_of(again) == spec


def test_a_siglip_inside_lacks_its_last_layer(build: Callable[..., Original]) -> None:
    original = build("llava_next", "qwen2", "siglip")
    spec = spec_of(open_source(original.directory, Options(vision=original.tower)))
    assert (spec.vision.num_layers, spec.feature_layers) == (3, (-1,))
    assert not spec.vision.has_head


PLACES = ("absolute", "relative", "folder", "cache", "cache without refs", "HF_HOME")


@pytest.mark.parametrize("place", PLACES)
def test_where_a_tower_is_found(
    build: Callable[..., Original], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    name = {"absolute": str(tmp_path / "clip"), "relative": "towers/clip"}.get(
        place, "openai/clip-x"
    )
    original = build("llava", inside=False, mm_vision_tower=name)
    with pytest.raises(
        CheckpointError, match=f"does not hold its vision tower(.|\n)*{name}(.|\n)*--vision"
    ):
        open_source(original.directory)
    snapshots = tmp_path / "hub" / "models--openai--clip-x" / "snapshots"
    target = {
        "absolute": tmp_path / "clip",
        "relative": original.directory / "towers" / "clip",
        "folder": original.directory / "vision_tower",
    }.get(place, snapshots / "abc123")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(original.tower, target)
    if place.startswith("cache"):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    if place == "HF_HOME":
        monkeypatch.delenv("HF_HUB_CACHE")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
    if place != "cache without refs":
        (snapshots / "older").mkdir(parents=True, exist_ok=True)
        (snapshots.parent / "refs").mkdir(exist_ok=True)
        (snapshots.parent / "refs" / "main").write_text("abc123\n")
    _check_tensors(open_source(original.directory), original)


def test_a_tower_that_is_not_the_one_inside(build: Callable[..., Original], tmp_path: Path) -> None:
    original = build("llava")
    settings = original.tower / "config.json"
    content = json.loads(settings.read_text())
    content["vision_config"]["patch_size"] = 14
    settings.write_text(json.dumps(content))
    assert "is not of the vision tower that the checkpoint holds" in failure(original)
    content["vision_config"]["patch_size"] = "14"
    settings.write_text(json.dumps(content))
    assert "patch_size has a value that cannot be" in failure(original)
    shutil.rmtree(original.tower)
    assert "there is no directory" in failure(original)
    assert "--vision DIR" in _text_of(lambda: open_source(original.directory))


def _text_of(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


def test_a_known_tower_needs_no_folder(tiny: Tiny, tmp_path: Path) -> None:
    """CLIP-L/14 at 336 pixels, one layer of it."""
    vision = {
        "hidden_size": 1024, "intermediate_size": 64, "num_attention_heads": 16,
        "num_hidden_layers": 1, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    hf = tiny(family="llava", dtype="float16", config={"vision_config": vision})
    convert(hf, tmp_path / "original", "original")
    config = json.loads((tmp_path / "original/config.json").read_text())
    assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    assert not (tmp_path / "original/vision_tower").exists()
    assert spec_of(open_source(tmp_path / "original")).vision.num_heads == 16
    # With other heads than public towers of that width have, the settings must be written.
    other = tiny(
        family="llava",
        dtype="float16",
        config={"vision_config": vision | {"num_attention_heads": 8}},
    )
    convert(other, tmp_path / "other", "original")
    (tmp_path / "other" / MANIFEST).unlink()
    assert spec_of(open_source(tmp_path / "other")).vision.num_heads == 8


def test_without_the_tower(tiny: Tiny, tmp_path: Path, build: Callable[..., Original]) -> None:
    parts = frozenset(PARTS) - {"vision"}
    source = open_source(tiny(family="llava"))
    text = _text_of(lambda: plan(source, "original", tmp_path / "x", Options(parts=parts)))
    assert "it is not one with a name" in text
    original = build("llava")
    source = open_source(original.directory, Options(vision=original.tower))
    chosen = plan(source, "original", tmp_path / "x", Options(parts=parts))
    names = {name for file in chosen.target.weights for name in file.tensors}
    assert not any("vision_tower" in name for name in names)
    assert len(chosen.target.left_out) == sum("vision_tower" in name for name in source.tensors)
    written = json.loads(chosen.target.documents["config.json"])
    assert written["mm_vision_tower"] == "tiny/clip"
    assert written["unfreeze_mm_vision_tower"] is False


def test_a_manifest_cannot_place_the_tower_elsewhere(
    build: Callable[..., Original], tmp_path: Path
) -> None:
    original = build("llava", inside=False)
    source = open_source(original.directory, Options(vision=original.tower))
    for folder in ("../evil", "/evil", "..", "a/b", ""):
        memory = {**source.memory, "original": {**source.memory["original"], "folder": folder}}
        target = plan(replace(source, memory=memory), "original", tmp_path / "x").target
        assert {file.name for file in target.weights} == {
            "model.safetensors", "vision_tower/model.safetensors",
        }  # fmt: skip


# --- projectors ----------------------------------------------------------------------------------


def _layers(*widths: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {}
    for n, (inp, out) in enumerate(itertools.pairwise(widths), 1):
        made[f"multi_modal_projector.linear_{n}.weight"] = random.standard_normal((out, inp))
        made[f"multi_modal_projector.linear_{n}.bias"] = random.standard_normal(out)
    return made


@pytest.mark.parametrize(
    ("widths", "stated", "kind"),
    [
        ((32, 64), "linear", "linear"),
        ((32, 64), None, "linear"),
        ((32, 64, 64), "linear", None),
        ((32, 64, 64, 64), "mlp3x_gelu", "mlp3x_gelu"),
    ],
    ids=["linear", "V0 does not say", "MOSS2 says linear", "mlp3x"],
)
def test_the_projector_is_told_by_its_tensors(
    build: Callable[..., Original], tmp_path: Path, widths: Any, stated: Any, kind: Any
) -> None:
    fields = {} if stated is None else {"mm_projector_type": stated}
    original = build("llava", projector=_layers(*widths), linear=len(widths) == 2, **fields)
    if stated is None:
        edit(original.directory / "config.json", mm_projector_type=None)
    source = open_source(original.directory, Options(vision=original.tower))
    assert source.config.get("unillava", {}).get("projector") == kind
    _check_tensors(source, original)
    convert(original.directory, tmp_path / "hf", "hf", Options(vision=original.tower))
    convert(tmp_path / "hf", tmp_path / "again", "original")
    before, after = documents_of(original.directory), documents_of(tmp_path / "again")
    assert after["config.json"] == before["config.json"]
    assert read_raw(tmp_path / "again") == read_raw(original.directory)


def test_no_projector_at_all(build: Callable[..., Original], tmp_path: Path) -> None:
    original = build(
        "llava",
        projector={},
        mm_projector_type="identity",
        config={"vision_config": {"hidden_size": 64}},
    )
    source = open_source(original.directory, Options(vision=original.tower))
    assert source.config["unillava"]["projector"] == "identity"
    convert(original.directory, tmp_path / "again", "original", Options(vision=original.tower))
    assert read_raw(tmp_path / "again") == read_raw(original.directory)


# --- tokens, templates, heads --------------------------------------------------------------------


def test_templates_follow_the_content_as_in_conversation() -> None:
    assert list(TEMPLATES[1:]) == list(BY_CONTENT)


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("llama", "vicuna_v1"),
        ("llama3", "llava_llama_3"),
        ("mistral", "mistral_instruct"),
        ("qwen2", "qwen_1_5"),
    ],
)
def test_the_template_goes_before_that_of_the_tokenizer(
    build: Callable[..., Original], text: str, template: str
) -> None:
    original = build("llava_next", text)
    edit(original.directory / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    checkpoint = open_checkpoint(original.directory, vision=original.tower)
    assert checkpoint.spec.template == template
    chat = {"chat_template": "{% for m in messages %}{% endfor %}"}
    (original.directory / "chat_template.json").write_text(json.dumps(chat))
    assert open_checkpoint(original.directory, vision=original.tower).spec.template is None


def test_llava_v0(build: Callable[..., Original], tmp_path: Path) -> None:
    """Added tokens, linear projector, sparse and odd settings; KoLLaVA-KoVicuna is alike."""
    original = build("llava", projector=_layers(32, 64), linear=True)
    added = {token: original.rows - 4 + n for n, token in enumerate(V0_TOKENS)}
    fast = json.loads((original.directory / "tokenizer.json").read_text())
    kept = {piece: n for piece, n in fast["model"]["vocab"].items() if n < original.rows - 4}
    fast["model"]["vocab"] = kept
    fast["model"]["merges"] = [m for m in fast["model"]["merges"] if "".join(m) in kept]
    fast["added_tokens"] += [
        {**fast["added_tokens"][0], "id": n, "content": token} for token, n in added.items()
    ]
    (original.directory / "tokenizer.json").write_text(json.dumps(fast))
    (original.directory / "added_tokens.json").write_text(json.dumps(added))
    edit(original.directory / "special_tokens_map.json", pad_token="[PAD]")
    edit(original.directory / "tokenizer_config.json", pad_token="[PAD]", added_tokens_decoder=None)
    config = {
        key: value
        for key, value in original.config.items()
        if key not in ("image_aspect_ratio", "mm_projector_type", "mm_vision_select_feature",
                       "mm_use_im_patch_token", "unfreeze_mm_vision_tower")
    } | {"mm_use_im_start_end": True, "model_type": "llava", "pad_token_id": -1,
         "sep_image_conv_front": False, "max_sequence_length": 2048}  # fmt: skip
    (original.directory / "config.json").write_text(json.dumps(config))

    checkpoint = open_checkpoint(original.directory, vision=original.tower)
    checkpoint.check()
    spec = checkpoint.spec
    assert (spec.image_token, spec.image_mode, spec.projector.depth) == (original.rows, "square", 1)
    assert spec.template == "llava_v0"
    source = open_source(original.directory, Options(vision=original.tower))
    assert source.vocabulary.tokens == {"<image>": original.rows}
    assert source.config["pad_token_id"] == original.rows - 4
    assert "pad_token_id" not in source.config["text_config"]
    assert "<im_start>" in source.notes[0]
    convert(original.directory, tmp_path / "hf", "hf", Options(vision=original.tower))
    convert(tmp_path / "hf", tmp_path / "again", "original")
    again = documents_of(tmp_path / "again")
    assert {n: again[n] for n in documents_of(original.directory)} == documents_of(
        original.directory
    )


V0_TOKENS = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>")


def test_a_tied_head_that_was_saved_is_saved_again(
    build: Callable[..., Original], tmp_path: Path
) -> None:
    original = build("llava_next", "qwen2")
    path = original.directory / "model.safetensors"
    stored = read_raw(original.directory)
    assert "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    layout.write_raw(path, stored)
    options = Options(vision=original.tower)
    assert HEAD not in open_source(original.directory, options).tensors
    convert(original.directory, tmp_path / "hf", "hf", options)
    convert(tmp_path / "hf", tmp_path / "again", "original")
    assert read_raw(tmp_path / "again") == stored
    code, shape, data = stored["lm_head.weight"]
    stored["lm_head.weight"] = code, shape, bytes(len(data))
    layout.write_raw(path, stored)
    assert "the file holds another head" in failure(original)


# --- weights alone -------------------------------------------------------------------------------


def test_a_file_of_weights_takes_the_rest_from_a_base(
    build: Callable[..., Original], tiny: Tiny, tmp_path: Path
) -> None:
    original = build("llava_next", "llama")
    path = shutil.copy(original.directory / "model.safetensors", tmp_path / "weights.safetensors")
    base = tmp_path / "base"
    convert(original.directory, base, "hf", Options(vision=original.tower))
    source = open_source(path, Options(base=base))
    whole = open_source(original.directory, Options(vision=original.tower))
    assert raw_of(source) == raw_of(whole)
    assert source.config == whole.config
    assert source.vocabulary == whole.vocabulary
    assert "--base DIR" in _text_of(lambda: open_source(path))
    # And such a file can be made.
    convert(base, tmp_path / "one.safetensors", "original", Options())
    names = {name for name, _ in _entries(tmp_path / "one.safetensors")}
    assert names == read_raw(original.directory).keys()


def _entries(path: Path) -> list[tuple[str, Any]]:
    import safetensors

    return [(name, entry) for name, entry in safetensors.deserialize(path.read_bytes())]


# --- recognition and faults ----------------------------------------------------------------------


def test_exactly_one_dialect_recognises_it(build: Callable[..., Original], tiny: Tiny) -> None:
    for original in (build("llava", inside=False), build("llava_next", "qwen2", "siglip")):
        found = [
            d.name for d in registry.dialects().values() if d.evidence(look(original.directory))
        ]
        assert found == ["original"]
    hf = [d.name for d in registry.dialects().values() if d.evidence(look(tiny(family="llava")))]
    assert hf == ["hf"]


FAULTS = {
    "s2": ({"s2": True}, "a tower at several scales"),
    "resampler": ({"mm_resampler_type": "perceiver"}, "a resampler with weights"),
    "faster video": ({"add_faster_video": True}, "faster path"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "anyres_max": ({"image_aspect_ratio": "anyres_max_9"}, "square or pad or anyres"),
    "mode of no kind": ({"image_aspect_ratio": 7}, "image_aspect_ratio cannot be used"),
    "flat tiles": ({"image_aspect_ratio": "anyres"}, "spatial or spatial_unpad"),
    "maxpool": ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type"),
    "pinpoints": (
        {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial",
            "image_grid_pinpoints": [[1]],
        },
        "image_grid_pinpoints cannot be used",
    ),
    "no pinpoints": (
        {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"},
        "image_grid_pinpoints cannot be used",
    ),
    "feature": ({"mm_vision_select_feature": "slicefour_patch"}, "patch or cls_patch"),
    "layer": ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer"),
    "pooling": ({"mm_spatial_pool_mode": "conv"}, "average or max or bilinear"),
    "newline": (
        {
            "mm_spatial_pool_mode": "max",
            "mm_newline_position": "row",
            "mm_patch_merge_type": "spatial",
        },
        "mm_newline_position",
    ),
    "language model": ({"architectures": ["LlavaGemmaForCausalLM"], "model_type": "x"}, "Gemma"),
    "size": ({"hidden_size": "64"}, "hidden_size has a value that cannot be"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_supported_is_named(build: Callable[..., Original], fault: str) -> None:
    fields, expected = FAULTS[fault]
    assert expected in failure(build("llava", **fields))


JUNK = (
    *(None, 0, -1, 1, 2.5, 1e9, 10**30, True, False, "", "x", "anyres", "spatial_unpad"),
    *([], [1], [None], [[1, 2]], {}, {"type": 1}, ["LlavaLlamaForCausalLM"]),
)
MORE_FIELDS = (
    *("mm_spatial_pool_mode", "mm_newline_position", "mm_resampler_type", "rope_scaling"),
    *("mm_patch_merge_type", "image_grid_pinpoints", "rope_parameters", "head_dim", "dtype", "s2"),
)


@pytest.mark.parametrize("family", ["llava", "llava_next_video"])
def test_a_nonsensical_configuration_is_refused_or_read(
    build: Callable[..., Original], family: str
) -> None:
    """200 configurations with one to three fields of another kind, a fifth with the tower's."""
    original = build(family)
    options = Options(vision=original.tower)
    settings = json.loads((original.tower / "config.json").read_text())
    random = np.random.default_rng(7)
    fields = [*original.config, *MORE_FIELDS]
    outcomes = []
    for n in range(100):
        chosen = random.choice(fields, random.integers(1, 4), replace=False)
        junk = {key: JUNK[random.integers(len(JUNK))] for key in chosen}
        (original.directory / "config.json").write_text(json.dumps(original.config | junk))
        tower = dict(settings["vision_config"])
        if n % 5 == 0:
            tower[random.choice(list(tower))] = JUNK[random.integers(len(JUNK))]
        text = json.dumps(settings | {"vision_config": tower})
        (original.tower / "config.json").write_text(text)
        try:
            open_source(original.directory, options)
            outcomes.append("read")
        except CheckpointError:
            outcomes.append("refused")
    assert min(outcomes.count("read"), outcomes.count("refused")) > 10


def test_tensors_that_cannot_be_placed(build: Callable[..., Original], tmp_path: Path) -> None:
    original = build("llava")
    path = original.directory / "model.safetensors"
    stored = read_raw(original.directory)
    surplus = stored | {"model.vision_resampler.query": stored["model.norm.weight"]}
    layout.write_raw(path, surplus)
    assert "no rule for: model.vision_resampler.query" in failure(original)
    options = Options(vision=original.tower, allow_unused=("*resampler*",))
    assert "model.vision_resampler.query" in open_source(original.directory, options).dropped
    missing = {n: t for n, t in stored.items() if n != "model.layers.1.mlp.up_proj.weight"}
    layout.write_raw(path, missing)
    assert "missing: language_model.model.layers.1.mlp.up_proj.weight" in failure(original)


CANNOT = {
    "several layers": ({"vision_feature_layer": [-2, -1]}, "features of several layers"),
    "no biases": ({"multimodal_projector_bias": False}, "a projector without biases"),
    "activation": ({"projector_hidden_act": "relu"}, "a projector mlp2x_relu"),
}


@pytest.mark.parametrize("fault", CANNOT)
def test_what_original_llava_cannot_be(tiny: Tiny, tmp_path: Path, fault: str) -> None:
    changes, expected = CANNOT[fault]
    source = open_source(tiny(family="llava", config=changes))
    text = _text_of(lambda: plan(source, "original", tmp_path / "x"))
    assert "original LLaVA cannot be this model" in text and expected in text


def test_a_part_is_no_whole(build: Callable[..., Original], tmp_path: Path) -> None:
    tower = open_source(build("llava", inside=False).tower)
    assert "no language and no projector" in _text_of(
        lambda: plan(tower, "original", tmp_path / "x")
    )


# --- released configurations ---------------------------------------------------------------------

CLIP_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "patch_size": 14,
    "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
SIGLIP_384 = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "patch_size": 14,
    "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 26,
    "num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}  # fmt: skip
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
V15 = {
    "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False, "hidden_act": "silu", "hidden_size": 4096,
    "image_aspect_ratio": "pad", "initializer_range": 0.02, "intermediate_size": 11008,
    "max_length": 4096, "max_position_embeddings": 4096, "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vocab_size": 32000,
}  # fmt: skip
V16 = V15 | {
    "image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_split_resolution": 224,
    "image_grid_pinpoints": GRID, "mm_patch_merge_type": "spatial_unpad", "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-06, "unfreeze_mm_vision_tower": True, "rope_theta": 10000.0,
    "tokenizer_model_max_length": 4096, "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16", "transformers_version": "4.36.2",
}  # fmt: skip
V0 = {
    key: value
    for key, value in V15.items()
    if not key.startswith(("image_", "mm_projector", "mm_resampler", "mm_use_im_patch"))
    and key != "mm_vision_select_feature"
} | {"vocab_size": 32003, "pad_token_id": -1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
     "mm_vision_tower": "openai/clip-vit-large-patch14", "sep_image_conv_front": False}  # fmt: skip
del V0["num_key_value_heads"]
RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v1.5-7b": (V15, {}),
    "v1.5-13b": (
        V15 | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
               "num_hidden_layers": 40, "num_key_value_heads": 40}, {},
    ),
    "v1.6-vicuna-7b": (V16, {}),
    "v1.6-mistral-7b": (
        V16 | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral",
               "intermediate_size": 14336, "num_key_value_heads": 8, "rope_theta": 1000000.0,
               "max_position_embeddings": 32768, "sliding_window": None}, {},
    ),
    "v1.6-34b": (
        V16 | {"hidden_size": 7168, "intermediate_size": 20480, "num_attention_heads": 56,
               "num_hidden_layers": 60, "num_key_value_heads": 8, "vocab_size": 64000,
               "rope_theta": 5000000.0, "model_type": "llava"}, {},
    ),
    "llama3-llava-next-8b": (
        V16 | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256,
               "rope_theta": 500000.0, "max_position_embeddings": 8192, "model_type": "llava_llama",
               "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"}, {},
    ),
    "Open-LLaVA-NeXT llama3": (
        V16 | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128257,
               "rope_theta": 500000.0, "max_position_embeddings": 8192,
               "model_type": "llava_llama"}, {},
    ),
    "NeXT-Video-7B": (
        V16 | {"rope_scaling": {"type": "linear", "factor": 2.0},
               "mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average",
               "mm_spatial_pool_stride": 2, "mm_spatial_pool_out_channels": 1024}, {},
    ),
    "LLaVA-Video-7B-Qwen2": (
        V16 | {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen",
               "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
               "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
               "rope_theta": 1000000.0, "max_position_embeddings": 32768, "sliding_window": 131072,
               "use_sliding_window": False, "max_window_layers": 28, "mm_hidden_size": 1152,
               "image_grid_pinpoints": "(1x1),...,(3x3)", "mm_newline_position": "grid",
               "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": 2,
               "mm_vision_tower": "google/siglip-so400m-patch14-384", "rms_norm_eps": 1e-6},
        {"vision": SIGLIP_384, "tower_layers": 27},
    ),
    "pinpoints as text": (V16 | {"image_grid_pinpoints": "[(336, 672), (672, 336)]"}, {}),
    "tiles without newlines": (V16 | {"mm_patch_merge_type": "spatial"}, {"newline": False}),
    "Synatra": (V15 | {"intermediate_size": 14336, "num_key_value_heads": 8}, {}),
    "v0": (V0, {"projector": "linear", "vision": CLIP_336 | {"image_size": 224}}),
    "delta without upgrade": (
        V0 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"projector": "linear"},
    ),
}  # fmt: skip


def released(name: str) -> tuple[dict[str, Any], Facts]:
    given, known = RELEASED[name]
    anyres = given.get("image_aspect_ratio") == "anyres"
    usual = {
        "vision": CLIP_336, "projector": "mlp2x_gelu", "projector_bias": True, "newline": anyres,
        "dtype": given["torch_dtype"], "tower_layers": 24,
    }  # fmt: skip
    return given, Facts(**{**usual, **known})


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations(name: str) -> None:
    given, facts = released(name)
    config = canonical_config(given, facts, name)
    rows = given["vocab_size"] + 64
    tokens = {
        "image_token_index": given["vocab_size"],
        "video_token_index": given["vocab_size"] + 1,
    }
    text = config["text_config"] | {"vocab_size": rows}
    spec = read_spec(config | tokens | {"text_config": text})
    for ours, theirs in (
        (spec.text.hidden_size, "hidden_size"), (spec.text.num_layers, "num_hidden_layers"),
        (spec.text.num_heads, "num_attention_heads"), (spec.text.rms_norm_eps, "rms_norm_eps"),
        (spec.text.max_position, "max_position_embeddings"), (spec.dtype, "torch_dtype"),
    ):  # fmt: skip
        assert ours == given[theirs]
    assert spec.text.num_kv_heads == given.get("num_key_value_heads", 32)
    assert spec.text.rope.theta == given.get("rope_theta", 10000.0)
    # A second time: nothing is lost on the way back and forth.
    stored = stored_config(
        config, given["mm_vision_tower"], inside=given["unfreeze_mm_vision_tower"]
    )
    again = canonical_config(stored, facts_of(config), name)
    assert again == config
    told = stored.keys() & given.keys()
    assert told - {key for key in told if stored[key] == given[key]} <= LOOSE


LOOSE = {
    *("_name_or_path", "model_type", "transformers_version", "pad_token_id"),
    *("image_grid_pinpoints", "architectures", "mm_patch_merge_type", "tokenizer_model_max_length"),
}
"""Fields that are written in another way than some released files have them."""


def test_what_released_configurations_mean() -> None:
    def spec_of(name: str) -> LlavaSpec:
        given, facts = released(name)
        config = canonical_config(given, facts, name)
        tokens = {"image_token_index": 5, "video_token_index": 6}
        return read_spec(config | tokens)

    assert spec_of("v1.5-7b").image_mode == "pad"
    assert spec_of("v0").image_mode == "square" and spec_of("v0").projector.depth == 1
    assert spec_of("v0").text.vocab_size == 32003
    vicuna = spec_of("v1.6-vicuna-7b")
    assert vicuna.grid_pinpoints == tuple((height, width) for width, height in GRID)
    assert (vicuna.image_mode, vicuna.unpad, vicuna.anyres_variant) == ("anyres", True, "llava")
    assert spec_of("v1.6-mistral-7b").text.kind == "mistral"
    assert spec_of("v1.6-mistral-7b").text.sliding_window is None
    assert not spec_of("tiles without newlines").unpad
    assert spec_of("pinpoints as text").grid_pinpoints == ((672, 336), (336, 672))
    old, new = spec_of("NeXT-Video-7B"), spec_of("LLaVA-Video-7B-Qwen2")
    assert (old.video.pool_position, old.video.newline) == ("before_projector", "no_token")
    assert (old.text.rope.kind, old.text.rope.factor) == ("linear", 2.0)
    assert (new.video.pool_mode, new.video.pool_position) == ("bilinear", "after_projector")
    assert (new.video.newline, new.video.pool_stride) == ("grid", 2)
    assert new.text.qkv_bias and new.feature_layers == (-1,) and new.keep_class_token
    sides = (384, 768, 1152)
    assert new.grid_pinpoints == tuple((height, width) for width in sides for height in sides)
    # The newest code puts one newline at the end of a video where nothing is said.
    given, facts = released("LLaVA-Video-7B-Qwen2")
    silent = {key: value for key, value in given.items() if key != "mm_newline_position"}
    tokens = {"image_token_index": 5, "video_token_index": 6}
    spec = read_spec(canonical_config(silent, facts, "") | tokens)
    assert spec.video.newline == "one_token"
    flat = silent | {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
    spec = read_spec(canonical_config(flat, replace(facts, newline=False), "") | tokens)
    assert (spec.video.newline, spec.image_mode, spec.has_newline) == ("no_token", "pad", False)


@pytest.mark.parametrize("to", ["original", "hf", "mindformers"])
def test_added_rows_follow_a_change_of_dtype(
    build: Callable[..., Original], tmp_path: Path, to: str
) -> None:
    """They are the mean of rows that are cast already, as whoever reads the result makes them."""
    original = build("llava_next", "llama", "clip", dtype="float32")
    options = Options(vision=original.tower, dtype="bfloat16")
    convert(original.directory, tmp_path / "cast", to, options)
    assert verify(tmp_path / "cast").equal
    convert(tmp_path / "cast", tmp_path / "back", "original")
    assert compare(tmp_path / "cast", tmp_path / "back").equal

"""Original LLaVA's directories as LLaVA itself saves them, judged by torch and transformers.

The weights are written by `torch.save` and the tower by transformers' own CLIPModel; what comes out
is loaded by transformers and must give the logits of the llava-hf model that went in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import unillava
from tests.original_layout import Original, build_original, original_name, read_raw
from unillava.inference.model import user_message
from weight_convert.convert import convert
from weight_convert.opening import open_source
from weight_convert.source import Options

Tiny = Callable[..., Path]
CASES = {
    "v1.5, tower beside": ("llava", "llama", "clip", False),
    "v1.6 vicuna": ("llava_next", "llama", "clip", True),
    "v1.6 mistral": ("llava_next", "mistral", "clip", True),
    "llama 3": ("llava_next", "llama3", "clip", True),
    "qwen and siglip": ("llava_next", "qwen2", "siglip", True),
    "video": ("llava_next_video", "llama", "clip", True),
}


@dataclass(frozen=True)
class Case:
    """One original checkpoint, what it was made of and what it became."""

    original: Original
    hf: Path
    converted: Path


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory):
    family, text, vision, inside = CASES[request.param]
    hf = tiny(family=family, text=text, vision=vision, dtype="bfloat16")
    folder = tmp_path_factory.mktemp("case")
    original = build_original(hf, folder / "original", inside=inside, buffers=True)
    _save_as_torch_does(original.directory)
    if not inside:
        _save_clip(original, hf)
    options = Options(vision=original.tower)
    convert(original.directory, folder / "converted", "hf", options)
    return Case(original, hf, folder / "converted")


def _save_as_torch_does(directory: Path) -> None:
    """Two shards and an index in place of model.safetensors, as Trainer of 2023 left them."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    places = {}
    for number, half in enumerate(halves, 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, directory / file)
        places |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _save_clip(original: Original, hf: Path) -> None:
    """A whole CLIPModel around the tower's weights, as `pytorch_model.bin`."""
    settings = json.loads((hf / "config.json").read_text())["vision_config"]
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = transformers.CLIPConfig(vision_config=settings, text_config=text, projection_dim=8)
    clip = transformers.CLIPModel(config).to(torch.bfloat16)
    clip.config.save_pretrained(original.tower)
    state = clip.state_dict()
    for name, (_, shape, data) in original.tensors.items():
        if name.startswith("vision_tower."):
            values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
            state[name.removeprefix("vision_tower.")] = values
    (original.tower / "model.safetensors").unlink()
    torch.save(state, original.tower / "pytorch_model.bin")


def load(directory: Path) -> transformers.PreTrainedModel:
    kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def test_parameters_and_logits_are_those_of_the_model(case: Case) -> None:
    theirs, ours = load(case.hf), load(case.converted)
    rows = case.original.rows
    parameters = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        same = slice(rows) if name.endswith(("embed_tokens.weight", "lm_head.weight")) else ...
        assert torch.equal(parameters[name][same], parameter[same]), name
    assert parameters.keys() == dict(theirs.named_parameters()).keys()
    inputs = _inputs(theirs, rows)
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, ours(**inputs).logits
    assert torch.equal(found[..., :rows], expected[..., :rows])


def _inputs(model: transformers.PreTrainedModel, rows: int) -> dict[str, torch.Tensor]:
    config, random = model.config, torch.Generator().manual_seed(3)
    side = config.vision_config.image_size
    tiles, size = (1, None) if config.model_type == "llava" else (3, (side, side))
    pixels = torch.randn(tiles, 3, side, side, generator=random)
    patches = (side // config.vision_config.patch_size) ** 2
    grid = int(patches**0.5)
    # A square picture in a grid of 1 x 2 tiles keeps its own square of patches, with newlines.
    count = patches if size is None else patches + grid * (grid + 1)
    image = [config.image_token_id] * count
    text = torch.randint(3, rows, (9,), generator=random).tolist()
    ids = torch.tensor([[*text[:4], *image, *text[4:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if size:
        inputs |= {"pixel_values": pixels[None], "image_sizes": torch.tensor([size])}
    return inputs


def test_the_processor_gives_the_same_inputs(case: Case, photo: Path) -> None:
    video = "video" in case.hf.name  # AutoProcessor of a video model asks for torchvision
    kind = transformers.LlavaNextProcessor if video else transformers.AutoProcessor
    theirs, ours = (kind.from_pretrained(path) for path in (case.hf, case.converted))
    picture = Image.open(photo)
    lines = ["USER: <image>\nWhat is this? ASSISTANT:", "<image> 안녕</s> 图片 <pad>"]
    for line in lines:
        expected = theirs(text=line, images=picture, return_tensors="pt")
        found = ours(text=line, images=picture, return_tensors="pt")
        assert torch.equal(found["input_ids"], expected["input_ids"])
        if "image_sizes" in expected:
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
        else:  # the tiny model crops, v1.5 pads to a square
            assert type(ours.image_processor).__name__.startswith("LlavaImageProcessor")
            assert found["pixel_values"].shape == expected["pixel_values"].shape
    assert ours.tokenizer.pad_token == "<pad>"
    ids = {token: ours.tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<pad>")}
    config = json.loads((case.converted / "config.json").read_text())
    assert ids == {"<image>": config["image_token_index"], "<pad>": config["pad_token_id"]}


def test_replies_of_the_original_directory(case: Case, photo: Path) -> None:
    """Opened by unillava as it is; transformers gets the same ids, and what it was converted to."""
    model = unillava.load(
        str(case.original.directory), backend="torch", device="cpu", vision=str(case.original.tower)
    )
    reference = load(case.converted)
    assert model.spec.template is not None
    for request in (
        {"messages": [user_message("What is shown here?", str(photo))]},
        {"messages": [user_message("안녕하세요, 누구세요?")]},
    ):
        sample = model.pipeline.prepare(request)
        ids = torch.from_numpy(np.where(sample.kind_S == 0, sample.ids_S, model.spec.image_token))
        inputs = {"input_ids": ids[None]}
        if sample.pixels_T3HW is not None:
            pixels = torch.from_numpy(sample.pixels_T3HW)
            inputs["pixel_values"] = pixels if model.spec.family == "llava" else pixels[None]
            if model.spec.family != "llava":
                inputs["image_sizes"] = torch.tensor([Image.open(photo).size[::-1]])
        with torch.no_grad():
            out = reference.generate(**inputs, max_new_tokens=6, do_sample=False)
        reply = model.generate([request], max_new_tokens=6)[0]
        assert reply.tokens == out[0, len(ids) :].tolist()


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_torch_reads_what_is_written(tiny: Tiny, tmp_path: Path, weights: str) -> None:
    from safetensors.torch import load_file

    hf = tiny(family="llava_next", dtype="float16")
    options = Options(weights=weights, max_shard_bytes=300_000)
    convert(hf, tmp_path / "original", "original", options)
    found = {}
    for path in (tmp_path / "original").glob(f"*.{weights}"):
        read = torch.load(path, weights_only=True) if weights == "bin" else load_file(path)
        found |= read
    expected = read_raw(hf)
    assert found.keys() == {original_name(name) for name in expected}
    for name, (_, shape, data) in expected.items():
        values = torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(shape)
        assert torch.equal(found[original_name(name)], values)


def test_the_language_model_loads_as_a_llama(tiny: Tiny, tmp_path: Path) -> None:
    """Original LLaVA is a LlamaForCausalLM with more: transformers' own class takes its share."""
    hf = tiny(family="llava", dtype="float32")
    convert(hf, tmp_path / "original", "original")
    config = json.loads((tmp_path / "original/config.json").read_text())
    (tmp_path / "original/config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "original").eval()
    llava = load(hf)
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, llava(input_ids=ids).logits)


def test_a_sentencepiece_model_alone_gives_llamas_ids(
    tiny: Tiny, tmp_path: Path, photo: Path
) -> None:
    """As liuhaotian/llava-v1.5-7b comes: without tokenizer.json. Read by today's transformers."""
    from tests.tokenizers_tiny import slow_llama

    original = build_original(tiny(family="llava", dtype="float16"), tmp_path / "original")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (original.directory / name).unlink()
    slow = slow_llama(original.directory)
    slow.save_pretrained(original.directory)
    path = original.directory / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}
    path.write_text(json.dumps(settings))
    options = Options(vision=original.tower)
    source = open_source(original.directory, options)
    convert(original.directory, tmp_path / "hf", "hf", options)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("What is in this picture?", "사진에 무엇이 있나요?", "  two\n\nlines", "a</s>b"):
        assert fast(text).input_ids == slow(text).input_ids
    image = source.config["image_token_index"]
    before, after = (
        slow(text, add_special_tokens=False).input_ids for text in ("USER: ", "\nWhat?")
    )
    assert fast("USER: <image>\nWhat?").input_ids == [1, *before, image, *after]
    convert(tmp_path / "hf", tmp_path / "again", "original")
    assert not (tmp_path / "again/tokenizer.json").exists()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        left, right = (
            (folder / name).read_bytes() for folder in (original.directory, tmp_path / "again")
        )
        assert left == right if name == "tokenizer.model" else json.loads(left) == json.loads(right)

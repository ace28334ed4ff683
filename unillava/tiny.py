"""Builds complete, tiny, random checkpoints in the Hugging Face layout, without any framework.

They are what the tests, the quickstart and a first look at a new machine run on: config.json,
sharded safetensors with an index, tokenizer, chat template and processor files, named and shaped
as those of a real llava-hf checkpoint, only with a few hundred thousand parameters. The weights
are random, so replies are nonsense; they are scaled so that greedy decoding wanders and the best
token leads clearly, which makes "the same tokens on every backend" a meaningful check.

Checkpoints of size "small" are to be trained: about a million parameters, at which training starts
well, and a tokenizer that can be learnt from the words of the task.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from unillava.config import read_spec
from unillava.errors import ConfigError
from unillava.spec import parameter_table
from weight_convert.storage.safetensors import write_shards

Family = Literal["llava", "llava_next", "llava_next_video"]
Text = Literal["llama", "llama3", "mistral", "qwen2"]
Vision = Literal["clip", "siglip"]
Size = Literal["tiny", "small"]

CORPUS = (
    "A chat between a curious user and an assistant who looks at pictures.",
    "USER: What is shown in this picture? ASSISTANT: The picture shows a woman in a uniform.",
    "Describe the photo in one sentence. What colour is the coat? How many people are there?",
    "She wears a dark jacket with golden buttons and stands in front of a flag.",
    "The ship left the harbour at noon; by evening the sea was calm and the sky was red.",
    "Numbers such as 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 24, 336 and 1984 are counted here.",
    "Yes, there is a cat on the table. No, the dog is not in the garden.",
    "system user assistant image video frame tile row token answer question",
    "사진에 무엇이 있나요? 사진에는 제복을 입은 여성이 있습니다.",
    "안녕하세요. 이 그림을 한 문장으로 설명해 주세요. 하늘은 파랗고 바다는 조용합니다.",
    "고양이가 책상 위에 있습니다. 강아지는 정원에 없습니다.",
    "这张照片里有什么？照片里有一位穿制服的女士。",
    "你好，请用一句话描述这张图片。天空是蓝色的，大海很平静。",
    "桌子上有一只猫，花园里没有狗。",
)
"""What the tokenizers are trained on unless they are given something else."""

MERGED_PIECES = 320
"""Characters and merges learnt from the corpus, besides the 256 bytes."""

VICUNA = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ text(message) }} "
    "{% elif message.role == 'user' %}USER: {{ text(message) }} "
    "{% else %}ASSISTANT:{% generation %} {{ text(message) }}</s>{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
INST = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ text(message) }} [/INST]"
    "{% else %}{% generation %} {{ text(message) }}</s>{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
HEADER = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ text(message) }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ text(message) }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ text(message) }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ text(message) }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = (
    "{% macro text(message) %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type in ('image', 'video') %}"
    "{{ '<' + part.type + '>\n' }}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}{% endmacro %}"
)
"""The macro that every template below starts with: images first, then the text."""


@dataclass(frozen=True)
class _TextKind:
    """What distinguishes one language model's configuration and tokenizer from another's."""

    model_type: str
    architecture: str
    settings: Mapping[str, Any]
    pieces: Literal["sentencepiece", "bytes"]
    tokenizer_class: str
    bos: str | None
    eos: str
    template: str
    specials: tuple[str, ...]
    """The family's own special tokens, in the order of their ids."""
    unknown: str | None = None


_LLAMA = dict(
    model_type="llama",
    architecture="LlamaForCausalLM",
    pieces="sentencepiece",
    tokenizer_class="LlamaTokenizer",
    bos="<s>",
    eos="</s>",
    unknown="<unk>",
    specials=("<unk>", "<s>", "</s>"),
)
TEXTS: dict[str, _TextKind] = {
    "llama": _TextKind(
        **_LLAMA, template=VICUNA, settings={"num_key_value_heads": 4, "rms_norm_eps": 1e-5}
    ),
    "mistral": _TextKind(
        **_LLAMA | {"model_type": "mistral", "architecture": "MistralForCausalLM"},
        template=INST,
        settings={
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
    ),
    "llama3": _TextKind(
        model_type="llama",
        architecture="LlamaForCausalLM",
        pieces="bytes",
        tokenizer_class="PreTrainedTokenizerFast",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        template=HEADER,
        specials=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        settings={
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            # With head size 16 the wavelengths fall in all three bands of the scaling rule.
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": _TextKind(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        pieces="bytes",
        tokenizer_class="PreTrainedTokenizerFast",
        bos=None,
        eos="<|im_end|>",
        template=CHATML,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        settings={
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
}

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
}
PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
}
VISIONS = ("clip", "siglip")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What weights may be stored in -> its name in safetensors."""
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


_RANDOM_REPLIES = (
    # Random signs before the head: otherwise the last token is its own likeliest successor
    # (always with tied embeddings), and a reply is one token again and again.
    (r"^language_model\.model\.norm\.weight$", 0.0, 1.0, 0),
    (r"norm\d?\.weight$", 1.0, 0.1, 0),
    (r"\.bias$", 0.0, 0.1, 0),
    (r"embed_tokens\.weight$", 0.0, 0.7, 0),
    (r"lm_head\.weight$", 0.0, 0.3, 0),
    # Attention that chooses, blocks that add about as much as they find. More of it makes replies
    # livelier still, but rounding errors grow with it, gradients' above all: they must stay well
    # below the 1e-5 to which backends are compared.
    (r"^language_model\..*\.(q_proj|k_proj)\.weight$", 0.0, 1.5, 0.5),
    (r"^language_model\..*\.o_proj\.weight$", 0.0, 0.7, 0.5),
    (r"^language_model\..*\.down_proj\.weight$", 0.0, 2.0, 0.5),
    (r"(position|class)_embedding", 0.0, 0.5, 0),
    (r"image_newline$", 0.0, 0.3, 0),
    (r"", 0.0, 1.0, 0.5),
)
"""(pattern of the name, mean, spread, power of the number of inputs that divides the spread):
values at which signals keep their size through the network, and replies wander."""
_READY_TO_LEARN = (
    (r"norm\d?\.weight$", 1.0, 0.0, 0),
    (r"\.bias$", 0.0, 0.0, 0),
    (r"lm_head\.weight$", 0.0, 0.02, 0),
    # Of the size of what the patches and the projector give, so that neither drowns the other.
    (r"(embed_tokens\.weight|position_embedding\.weight|class_embedding)$", 0.0, 0.5, 0),
    (r"image_newline$", 0.0, 0.5, 0),
    # Blocks begin by adding little to what they find.
    (r"(o_proj|out_proj|down_proj|mlp\.fc2)\.weight$", 0.0, 0.3, 0.5),
    (r"", 0.0, 1.0, 0.5),
)
"""The same, for values from which training starts well: a first loss near that of guessing."""


@dataclass(frozen=True)
class _SizeKind:
    """What distinguishes a checkpoint that talks at random from one that is to be trained."""

    image_size: int
    patch_size: int
    max_shard_bytes: int
    text: Mapping[str, int]
    """Entries of text_config, and of vision_config."""
    vision: Mapping[str, int]
    scales: tuple[tuple[str, float, float, float], ...]
    unspoken: float
    """What weights of tokens that are no printable text are multiplied by; see `_speakable`."""


SIZES: dict[str, _SizeKind] = {
    "tiny": _SizeKind(
        image_size=28,
        patch_size=7,
        max_shard_bytes=400_000,  # several files and an index
        text=dict(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=3
        ),
        vision=dict(
            hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=3
        ),
        scales=_RANDOM_REPLIES,
        unspoken=0.1,
    ),
    "small": _SizeKind(
        image_size=112,
        patch_size=16,
        max_shard_bytes=2_000_000,
        text=dict(
            hidden_size=96, intermediate_size=256, num_attention_heads=4, num_hidden_layers=3
        ),
        vision=dict(
            hidden_size=128, intermediate_size=256, num_attention_heads=4, num_hidden_layers=4
        ),
        scales=_READY_TO_LEARN,
        unspoken=1.0,
    ),
}


def build_tiny(
    directory: str | os.PathLike[str],
    family: Family = "llava_next",
    text: Text = "llama",
    vision: Vision = "clip",
    *,
    seed: int = 0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    size: Size = "tiny",
    corpus: Sequence[str] = CORPUS,
    max_shard_bytes: int | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
) -> Path:
    """Write a complete random checkpoint and return its directory.

    Args:
        directory: new or empty; appears only when everything in it is written.
        family, text, vision: which architecture, as in `ARCHITECTURES`, `TEXTS` and CLIP/SigLIP.
        seed: of the weights; everything else is the same every time.
        dtype: what the weights are stored in.
        size: as in `SIZES`: "tiny" talks at random, "small" is to be trained.
        corpus: texts that the tokenizer is learnt from; it can write any other text, too.
        max_shard_bytes: largest safetensors file; None: by size, so that there are several.
        image_size, patch_size: of one tile, in pixels; None: by size.
        config: entries that replace those of config.json; nested dicts are merged.
        processor: the same for preprocessor_config.json.

    Raises:
        ConfigError: an unknown choice, or a directory that holds files.
    """
    _check_choice("family", family, ARCHITECTURES)
    _check_choice("text", text, TEXTS)
    _check_choice("vision", vision, VISIONS)
    _check_choice("dtype", dtype, DTYPES)
    _check_choice("size", size, SIZES)
    given = {"image_size": image_size, "patch_size": patch_size, "max_shard_bytes": max_shard_bytes}
    chosen = replace(SIZES[size], **{key: value for key, value in given.items() if value})
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(
            "the place for the tiny checkpoint is taken",
            given=directory,
            expected="a new or empty directory",
            fix="name another directory, or remove this one first",
        )
    tokenizer = _tokenizer(TEXTS[text], family, corpus)
    settings = _config(family, text, vision, tokenizer, chosen, dtype)
    settings = _merged(settings, config or {})
    images = _merged(_image_processor(family, settings), processor or {})
    files = {
        "config.json": settings,
        "generation_config.json": _generation_config(settings),
        "preprocessor_config.json": images,
        "processor_config.json": _processor(family, settings),
        **_tokenizer_files(tokenizer, TEXTS[text]),
    }
    if family == "llava_next_video":
        files["video_preprocessor_config.json"] = _video_processor(images)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    try:
        for name, content in files.items():
            text_of_file = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (scratch / name).write_text(text_of_file, encoding="utf-8")
        _write_weights(scratch, settings, tokenizer, seed, chosen)
        scratch.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _check_choice(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name} {value!r}", expected=f"one of {', '.join(known)}")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `changes`; where both are dicts, merged in turn."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if nested else value
    return merged


# --- tokenizer -------------------------------------------------------------------------------


def _tokenizer(kind: _TextKind, family: Family, corpus: Sequence[str]) -> Tokenizer:
    """The text's tokenizer with the image, padding (and video) tokens after its own."""
    make = _sentencepiece if kind.pieces == "sentencepiece" else _bytes
    tokenizer = make(kind, corpus)
    # The hub's LLaVA-NeXT-Video files give <video> the first free id, the others <image>.
    media = ["<video>", "<image>"] if family == "llava_next_video" else ["<image>"]
    added = [AddedToken(token, special=True, normalized=False) for token in [*media, "<pad>"]]
    tokenizer.add_special_tokens(added)
    if kind.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A",
            pair=f"{kind.bos} $A $B:1",
            special_tokens=[(kind.bos, tokenizer.token_to_id(kind.bos))],
        )
    return tokenizer


def _sentencepiece(kind: _TextKind, corpus: Sequence[str]) -> Tokenizer:
    """As LLaMA's: spaces are written as a low line, unknown characters fall back to bytes."""
    vocabulary, merges = _learn(corpus, pre_tokenizers.Metaspace(), [])
    pieces = [*kind.specials, *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)},
            merges,
            unk_token=kind.unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in kind.specials])
    return tokenizer


def _bytes(kind: _TextKind, corpus: Sequence[str]) -> Tokenizer:
    """As LLaMA-3's and Qwen2's: pieces of UTF-8 bytes."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _learn(corpus, splitter, sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in kind.specials])
    return tokenizer


def _learn(
    corpus: Sequence[str], splitter: pre_tokenizers.PreTokenizer, alphabet: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces (in the order of their ids) and merges of a byte-pair encoding of the corpus."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGED_PIECES, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return pieces, [(left, right) for left, right in model["merges"]]


def _tokenizer_files(tokenizer: Tokenizer, kind: _TextKind) -> dict[str, Any]:
    named = {"bos_token": kind.bos, "eos_token": kind.eos, "unk_token": kind.unknown}
    named = {name: token for name, token in named.items() if token} | {"pad_token": "<pad>"}
    settings = {
        "added_tokens_decoder": _added_tokens(tokenizer),
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": _media_tokens(tokenizer),
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "padding_side": "left",
        "tokenizer_class": kind.tokenizer_class,
        **named,
    }
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": settings,
        "special_tokens_map.json": named,
        "chat_template.json": {"chat_template": PARTS + kind.template},
    }


def _media_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """What the processors look up as `tokenizer.image_token` and `.video_token`."""
    known = tokenizer.get_vocab()
    return {f"{kind}_token": f"<{kind}>" for kind in ("image", "video") if f"<{kind}>" in known}


def _added_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    return {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


# --- config.json and the processor files -----------------------------------------------------


def _config(
    family: Family,
    text: Text,
    vision: Vision,
    tokenizer: Tokenizer,
    size: _SizeKind,
    dtype: str,
) -> dict[str, Any]:
    """config.json in the spelling of the hub's files (transformers 4.45)."""
    side, patches = size.image_size, (size.image_size // size.patch_size) ** 2
    text_config = _text_config(TEXTS[text], size, tokenizer, dtype)
    config = {
        "architectures": [ARCHITECTURES[family]],
        "ignore_index": -100,
        "image_seq_length": patches,
        "image_token_index": tokenizer.token_to_id("<image>"),
        "model_type": family,
        "multimodal_projector_bias": True,
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "projector_hidden_act": "gelu",
        "text_config": text_config,
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "torch_dtype": dtype,
        "transformers_version": "4.45.2",
        "vision_config": _vision_config(vision, size),
        "vision_feature_layer": -2 if vision == "clip" else -1,
        "vision_feature_select_strategy": "default" if vision == "clip" else "full",
    }
    if family != "llava":
        tiles = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        config["image_grid_pinpoints"] = [[h * side, w * side] for h, w in tiles]
        config["use_image_newline_parameter"] = True
    if family == "llava_next_video":
        config["spatial_pool_mode"] = "average"
        config["spatial_pool_stride"] = 2
        config["video_seq_length"] = patches // 4
        config["video_token_index"] = tokenizer.token_to_id("<video>")
    return dict(sorted(config.items()))


def _text_config(
    kind: _TextKind, size: _SizeKind, tokenizer: Tokenizer, dtype: str
) -> dict[str, Any]:
    config = {
        "architectures": [kind.architecture],
        "bos_token_id": tokenizer.token_to_id(kind.bos) if kind.bos else None,
        "eos_token_id": tokenizer.token_to_id(kind.eos),
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "model_type": kind.model_type,
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        # Rounded up, as the hub's files do; the rows at the end belong to no token.
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 64) * 64,
    }
    return dict(sorted((config | dict(size.text) | dict(kind.settings)).items()))


def _vision_config(vision: Vision, size: _SizeKind) -> dict[str, Any]:
    own = {
        "clip": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 32},
        "siglip": {
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
    }
    shared = {
        "image_size": size.image_size,
        "model_type": f"{vision}_vision_model",
        "patch_size": size.patch_size,
        **size.vision,
    }
    return dict(sorted(shared.items())) | own[vision]


def _image_processor(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: CLIP crops the middle, SigLIP stretches."""
    side = config["vision_config"]["image_size"]
    clip = config["vision_config"]["model_type"] == "clip_vision_model"
    square = {"height": side, "width": side}
    kind = "CLIPImageProcessor" if clip else "SiglipImageProcessor"
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN if clip else [0.5, 0.5, 0.5],
        "image_processor_type": kind if family == "llava" else "LlavaNextImageProcessor",
        "image_std": CLIP_STD if clip else [0.5, 0.5, 0.5],
        "processor_class": PROCESSORS[family],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side} if clip else square,
    }
    if clip or family != "llava":
        settings |= {"crop_size": square, "do_center_crop": clip}
    if family != "llava":
        settings |= {
            "aspect_ratio_setting": "anyres",
            "do_pad": True,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
        }
    return dict(sorted(settings.items()))


def _video_processor(images: Mapping[str, Any]) -> dict[str, Any]:
    """video_preprocessor_config.json: frames are treated as images without tiles."""
    tiles = ("aspect_ratio_setting", "do_pad", "image_grid_pinpoints", "image_processor_type")
    frames = {name: value for name, value in images.items() if name not in tiles}
    return frames | {"video_processor_type": "LlavaNextVideoVideoProcessor"}


def _processor(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """processor_config.json: how the processor counts image tokens."""
    clip = config["vision_config"]["model_type"] == "clip_vision_model"
    settings = {
        "image_token": "<image>",
        "num_additional_image_tokens": int(clip),
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": PROCESSORS[family],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    return settings | ({"video_token": "<video>"} if family == "llava_next_video" else {})


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config["text_config"]
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    present = {name: number for name, number in ids.items() if number is not None}
    return {"_from_model_config": True, **present, "transformers_version": "4.45.2"}


# --- weights ---------------------------------------------------------------------------------


def _write_weights(
    directory: Path,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    seed: int,
    size: _SizeKind,
) -> None:
    shapes = parameter_table(read_spec(dict(config)))
    dtype = config["torch_dtype"]
    table = {name: (DTYPES[dtype], shape) for name, shape in shapes.items()}
    random = np.random.default_rng(seed)
    quiet = ~_speakable(tokenizer, config["text_config"]["vocab_size"])

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            values = _values(size.scales, name, shape, random)
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                values[quiet] *= size.unspoken
            yield name, _stored(values.astype(np.float32), dtype)

    write_shards(directory, table, tensors(), max_shard_bytes=size.max_shard_bytes)


def _values(
    scales: Sequence[tuple[str, float, float, float]],
    name: str,
    shape: tuple[int, ...],
    random: np.random.Generator,
) -> np.ndarray:
    """Random values of a parameter, by the first rule that its name matches."""
    mean, spread, power = next(rule[1:] for rule in scales if re.search(rule[0], name))
    return mean + spread / math.prod(shape[1:]) ** power * random.standard_normal(shape)


def _speakable(tokenizer: Tokenizer, rows: int) -> np.ndarray:
    """Which rows of the vocabulary are printable text, bool [rows].

    The others (special tokens, single bytes, unused rows) get small weights, so that a random
    model writes text, does not stop at once and never asks for an image.
    """
    speakable = np.zeros(rows, bool)
    for number in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([number])
        speakable[number] = text != "" and text.isprintable() and "\ufffd" not in text
    return speakable


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 in the dtype of the file; bfloat16 as uint16, rounded to nearest even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

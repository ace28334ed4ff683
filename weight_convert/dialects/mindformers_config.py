"""MindFormers' YAML files <-> the canonical configuration.

Three kinds are known by their `model.model_config`: `LlavaConfig` (research/llava, sections
`vision_config` and `text_config`), `LlavaNextConfig` (research/llava_next, sections `vision_model`
and `text_model`; stage 3 is the video model) and `LlamaConfig` (a language model alone). What is
absent has the default of MindFormers' class. What is written is a whole file for prediction, as
the ones beside MindFormers' models: the paths of tokenizer and checkpoint are left to be filled.

Source: MindFormers r1.3 to r1.5, research/llava, research/llava_next, mindformers/models/llama
and mindformers/modules/layers.py (FreqsMgr, the rotary tables).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from weight_convert import canonical
from weight_convert.canonical import Config
from weight_convert.dialects.assembly import STRATEGIES, Design, grid, whole_config
from weight_convert.dialects.configs import check_types
from weight_convert.errors import CheckpointError

LLAMA_DEFAULTS: Config = {
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "n_kv_heads": None,
    "intermediate_size": None,
    "multiple_of": 256,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "theta": 10000.0,
    "max_position_embedding": None,
    "qkv_has_bias": False,
    "attn_proj_has_bias": False,
    "tie_word_embeddings": False,
}
TOKEN_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ_LENGTH = 2048
VISION_DEFAULTS: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
FEATURE_DEFAULTS = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
LAYER_NORM_EPS = 1e-5
"""Written in MindFormers' code."""
VIDEO_STAGE = 3
POOL_DEFAULTS = {"spatial_pool_mode": "average", "spatial_pool_stride": 2}
VIDEO_POOLS = {"average": "average", "max": "max", "trilinear": "bilinear"}
"""MindFormers' pooling mode -> ours. Its trilinear resizing has a depth of 1."""


@dataclass(frozen=True)
class _Kind:
    """What distinguishes one kind of file from another."""

    config: str
    """Class name of `model.model_config`."""
    vision: str = ""
    """Key of the tower's section, and its classes."""
    vision_config: str = ""
    tower: str = ""
    text: str = ""
    """Key of the language model's section."""
    arch: str = "LlamaForCausalLM"
    modules: Mapping[str, str] | None = None
    """Class -> the file of MindFormers' research folder that it is registered from."""


LLAMA = _Kind("LlamaConfig")
LLAVA = _Kind(
    "LlavaConfig",
    vision="vision_config",
    vision_config="LlavaCLIPConfig",
    tower="LlavaVisionEncoder",
    text="text_config",
    arch="LlavaVlm",
    modules={
        "LlavaConfig": "llava_config",
        "LlavaCLIPConfig": "llava_config",
        "LlavaVisionEncoder": "llava_model",
        "LlavaVlm": "llava_model",
        "LlavaContentTransformTemplate": "llava_processor",
        "LlavaTokenizer": "llava_tokenizer",
    },
)
LLAVA_NEXT = _Kind(
    "LlavaNextConfig",
    vision="vision_model",
    vision_config="LlavaNextVisionConfig",
    tower="LlavaVisionEncoder",
    text="text_model",
    arch="LlavaNextVlm",
    modules={
        "LlavaNextConfig": "llava_next_config",
        "LlavaNextVisionConfig": "llava_next_config",
        "LlavaVisionEncoder": "llava_next_vision_tower",
        "LlavaNextVlm": "llava_next",
        "LlavaNextContentTransformTemplate": "llava_next_processor",
        "ClipImageProcessorV2": "llava_next_multi_modal_processor",
        "VicunaPromptProcessor": "prompt_processor",
        "LlavaNextTokenizer": "llava_next_tokenizer",
    },
)
KINDS = {kind.config: kind for kind in (LLAMA, LLAVA, LLAVA_NEXT)}
FAMILY_KINDS = {"llava": LLAVA, "llava_next": LLAVA_NEXT, "llava_next_video": LLAVA_NEXT}


# --- reading ---------------------------------------------------------------------------------


def describes_a_model(document: Config) -> bool:
    """Whether a YAML file is one of MindFormers' for a model that is known."""
    kind = _inner(document, "model", "model_config").get("type")
    return isinstance(kind, str) and kind in KINDS


def _inner(document: Any, *keys: str) -> Config:
    """A mapping inside of mappings; `{}` if it is not there."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}


def read_document(document: Config, dtype: str, where: str) -> Config:
    """The canonical configuration that a YAML file says; partial, if it has only one section.

    Token ids of images and the existence of the newline are not in it.

    Args:
        document: the parsed file.
        dtype: what the weights are stored in.
        where: names the file in errors.

    Raises:
        CheckpointError: a value that cannot be, or a model that unillava does not have.
    """
    model = _inner(document, "model", "model_config")
    kind = KINDS[model["type"]]
    sections: Config = {"torch_dtype": dtype}
    text = model if kind is LLAMA else _inner(model, kind.text, "model_config")
    vision = _inner(model, kind.vision, "model_config")
    if text:
        seq_length = model.get("seq_length", SEQ_LENGTH)
        sections["text_config"] = _read_text(text, seq_length, where) | {"torch_dtype": dtype}
        sections["tie_word_embeddings"] = sections["text_config"]["tie_word_embeddings"]
    if vision:
        sections["vision_config"] = _read_vision(vision, where)
    return _read_whole(document, kind, sections) if text and vision else sections


def _read_text(given: Config, seq_length: int, where: str) -> Config:
    where = f"{where}: the language model"
    given = {"seq_length": seq_length, **{k: v for k, v in given.items() if v is not None}}
    check_types(given, LLAMA_DEFAULTS | {"seq_length": SEQ_LENGTH}, where)
    flat = {**LLAMA_DEFAULTS, **TOKEN_DEFAULTS, **given}
    qkv_bias, output_bias = flat["qkv_has_bias"], flat["attn_proj_has_bias"]
    if output_bias and not qkv_bias:
        raise CheckpointError(
            f"{where} has a bias after attention, and none before it",
            expected="qkv_has_bias too",
        )
    theta, scaling = _read_rope(flat, where)
    text: Config = {
        "model_type": "qwen2" if qkv_bias and not output_bias else "llama",
        "vocab_size": flat["vocab_size"],
        "hidden_size": flat["hidden_size"],
        "intermediate_size": flat["intermediate_size"] or _default_intermediate(flat),
        "num_hidden_layers": flat["num_layers"],
        "num_attention_heads": flat["num_heads"],
        "num_key_value_heads": flat["n_kv_heads"] or flat["num_heads"],
        "rms_norm_eps": flat["rms_norm_eps"],
        "max_position_embeddings": flat["max_position_embedding"] or flat["seq_length"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": flat["tie_word_embeddings"],
        **{key: flat[key] for key in TOKEN_DEFAULTS},
    }
    if text["model_type"] == "llama":
        text["attention_bias"] = output_bias
    return dict(sorted(canonical.text_config({"text_config": text}).items()))


def _default_intermediate(flat: Config) -> int:
    """MindFormers' rule, that of LLaMA's own code."""
    size, multiplier = 4 * flat["hidden_size"], flat.get("ffn_dim_multiplier")
    if isinstance(multiplier, int | float):
        size = int((multiplier + 0.01) * size)
    size, step = int(2 * size / 3), flat["multiple_of"]
    return step * ((size + step - 1) // step)


def _read_rope(flat: Config, where: str) -> tuple[float, Config | None]:
    """(base, scaling) of the rotary embedding."""
    method, factor = flat.get("extend_method"), flat.get("scaling_factor", 1.0)
    values = factor if isinstance(factor, dict) else {"factor": factor}
    theta = float(flat["theta"])
    try:
        if method in (None, "None"):
            return theta, None
        if method in ("linear", "PI"):
            return theta, {"rope_type": "linear", "factor": float(values["factor"])}
        if method == "NTK":
            return theta * float(values["factor"]), None
        if method == "LLAMA3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            length = int(values["original_max_position_embeddings"])
            scaling = {"rope_type": "llama3", **{name: float(values[name]) for name in names}}
            return theta, scaling | {"original_max_position_embeddings": length}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{where}: scaling_factor does not fit extend_method {method}", given=factor
        ) from None
    raise CheckpointError(
        f"{where} extends its context in a way that is not supported",
        given=f"extend_method {method!r}",
        expected="None, linear, PI, NTK or LLAMA3",
    )


def _read_vision(given: Config, where: str) -> Config:
    where = f"{where}: the vision tower"
    check_types(given, VISION_DEFAULTS, where)
    own = {key: given.get(key, default) for key, default in VISION_DEFAULTS.items()}
    fixed = {"model_type": "clip_vision_model", "layer_norm_eps": LAYER_NORM_EPS}
    return dict(sorted(canonical.vision_config({"vision_config": own | fixed}).items()))


def _read_whole(document: Config, kind: _Kind, sections: Config) -> Config:
    model = _inner(document, "model", "model_config")
    features = FEATURE_DEFAULTS | _inner(model, kind.vision, "model_config")
    family = "llava" if kind is LLAVA else "llava_next"
    if kind is LLAVA_NEXT and model.get("stage") == VIDEO_STAGE:
        family = "llava_next_video"
    layer, strategy = (features[key] for key in FEATURE_DEFAULTS)
    if not _is_negative(layer) or strategy not in STRATEGIES:
        raise CheckpointError(
            "MindFormers' vision tower has features that cannot be",
            given=f"vision_feature_layer {layer!r}, vision_feature_select_strategy {strategy!r}",
            expected=f"a layer counted from the end, such as -2, and {' or '.join(STRATEGIES)}",
        )
    design = Design(family, feature_layer=layer, strategy=strategy)
    config = whole_config(design, sections, sections)
    config["ignore_index"] = model.get("ignore_token_id", -100)
    if family != "llava":
        pinpoints = _pinpoints(document)
        config |= {"image_grid_pinpoints": pinpoints} if pinpoints else {}
    if family == "llava_next_video":
        config |= _read_video(model, config)
    return dict(sorted(config.items()))


def _pinpoints(document: Config) -> list[list[int]] | None:
    """Candidates of anyres as [height, width], wherever the file has its image processor."""
    template = "model_transform_template"
    for keys in (
        ("processor", template),
        ("train_dataset", "modal_to_text_transform", template),
        ("train_dataset_task", "dataset_config", "modal_to_text_transform", template),
    ):
        pairs = _inner(document, *keys, "image_processor").get("image_grid_pinpoints")
        if isinstance(pairs, list):
            return pairs
    return None


def _read_video(model: Config, config: Config) -> Config:
    check_types(model, POOL_DEFAULTS, "the video model")
    mode, stride = (model.get(key, default) for key, default in POOL_DEFAULTS.items())
    if mode not in VIDEO_POOLS:
        raise CheckpointError(
            "MindFormers' video model pools in a way that is not supported",
            given=f"spatial_pool_mode {mode!r}",
            expected=", ".join(VIDEO_POOLS),
        )
    ours = VIDEO_POOLS[mode]
    video = {"pool_position": "after_projector"}
    return {
        "spatial_pool_mode": ours if ours == mode else "average",
        "spatial_pool_stride": stride,
        "video_seq_length": (grid(config["vision_config"]) // stride) ** 2,
        "unillava": {
            **config.get("unillava", {}),
            "video": video if ours == mode else video | {"pool_mode": ours},
        },
    }


# --- writing ---------------------------------------------------------------------------------


def check_held(config: Config, parts: Collection[str]) -> None:
    """Refuse what MindFormers' classes would compute otherwise, or have no parameters for.

    Args:
        config: canonical configuration, whole or partial.
        parts: those that will be written.

    Raises:
        CheckpointError: names the field.
    """
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = []
    if "vision" in parts:
        vision = canonical.vision_config(config)
        wanted += [
            ("vision_config.model_type", vision["model_type"], ("clip_vision_model",)),
            ("vision_config.hidden_act", vision["hidden_act"], ("quick_gelu",)),
            ("vision_config.layer_norm_eps", vision["layer_norm_eps"], (LAYER_NORM_EPS,)),
        ]
    if "projector" in parts:
        layer = config.get("vision_feature_layer", -2)
        wanted += [
            ("the projector", canonical.projector_kind(config), ("mlp2x_gelu",)),
            ("multimodal_projector_bias", config.get("multimodal_projector_bias", True), (True,)),
            ("vision_feature_layer", layer, (layer if _is_negative(layer) else -2,)),
        ]
    if "language" in parts:
        wanted += _text_limits(canonical.text_config(config))
    for field, given, allowed in wanted:
        if given not in allowed:
            raise CheckpointError(
                "MindFormers has no class for this model",
                given=f"{field} {given!r}",
                expected=" or ".join(map(repr, allowed)),
            )


def _is_negative(layer: object) -> bool:
    """MindFormers counts the blocks that it needs from the end."""
    return type(layer) is int and layer < 0


def _text_limits(text: Config) -> list[tuple[str, Any, tuple[Any, ...]]]:
    kinds = ("llama", "mistral", "qwen2")
    limits = [("text_config.model_type", text["model_type"], kinds)]
    if text["model_type"] not in kinds:
        return limits
    scaling = text["rope_scaling"] or {}
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    size = text["hidden_size"] // text["num_attention_heads"]
    return [
        *limits,
        ("text_config.hidden_act", text["hidden_act"], ("silu", "swish")),
        ("text_config.head_dim", text["head_dim"], (size,)),
        ("text_config.mlp_bias", text.get("mlp_bias", False), (False,)),
        ("text_config.sliding_window", window, (None,)),
        ("the rope_type", _rope_type(scaling), (None, "linear", "llama3")),
    ]


def _rope_type(scaling: Config) -> str | None:
    return scaling.get("rope_type", scaling.get("type"))


def write_document(config: Config, parts: Collection[str], *, fused: bool = False) -> Config:
    """A YAML file for prediction.

    Args:
        config: canonical configuration, whole or partial; see `check_held`.
        parts: those that were written; a tower or a language model alone has only its section.
        fused: whether q, k, v and the feed-forward inputs of the language model are fused.
    """
    return _around(*_model(config, parts, fused), config)


def write_language_document(config: Config, *, fused: bool = False) -> Config:
    """The same for a language model without `language_model.` before its names."""
    text = canonical.text_config(config)
    model = {
        "type": LLAMA.config,
        "batch_size": 1,
        "seq_length": _seq_length(text),
        **_text_section(text, fused),
        **_dtypes(config),
        **_GENERATION,
    }
    return _around(LLAMA, model, config)


def _model(config: Config, parts: Collection[str], fused: bool) -> tuple[_Kind, Config]:
    family = canonical.family({"model_type": "llava_next", **config})["model_type"]
    kind = FAMILY_KINDS[family]
    text = canonical.text_config(config)
    model: Config = {
        **_typed(kind, kind.config),
        "freeze_vision": False,
        "freeze_llm": False,
        "batch_size": 1,
        "seq_length": _seq_length(text),
        **_dtypes(config),
        "ignore_token_id": config.get("ignore_index", -100),
        **_GENERATION,
    }
    if kind is LLAVA_NEXT:
        model |= _next_fields(config, family)
    if "vision" in parts:
        vision = _vision_section(config)
        inner = {"arch": _typed(kind, kind.tower), "model_config": _typed(kind, kind.vision_config)}
        inner["model_config"] |= vision
        model[kind.vision] = inner
    if "language" in parts:
        section = {"type": LLAMA.config, **_text_section(text, fused)}
        model[kind.text] = {"arch": {"type": LLAMA.arch}, "model_config": section}
    return kind, model


def _typed(kind: _Kind, name: str) -> Config:
    """A class, and where it is registered from."""
    module = (kind.modules or {}).get(name)
    return {"type": name} | ({"auto_register": f"{module}.{name}"} if module else {})


def _seq_length(text: Config) -> int:
    """How long a sequence prediction is prepared for; a choice, which memory limits."""
    return min(text["max_position_embeddings"], 4096)


def _dtypes(config: Config) -> Config:
    dtype = canonical.stored_dtype(config)
    return {
        "compute_dtype": dtype,
        "layernorm_compute_type": "float32",
        "softmax_compute_type": "float32",
        "rotary_dtype": dtype,
        "param_init_type": dtype,
    }


_GENERATION: Config = {
    "use_past": True,
    "is_dynamic": True,
    "block_size": 16,
    "num_blocks": 512,
    "repetition_penalty": 1,
    "max_decode_length": 1024,
    "top_k": 0,
    "top_p": 0.8,
    "do_sample": False,
}


def _next_fields(config: Config, family: str) -> Config:
    video = family == "llava_next_video"
    fields: Config = {"stage": VIDEO_STAGE if video else 2, "add_newline": not video}
    own = ((config.get("unillava") or {}).get("video") or {}).get("pool_mode")
    modes = {ours: theirs for theirs, ours in VIDEO_POOLS.items()}
    top = canonical.TOP_DEFAULTS["llava_next_video"] | dict(config)
    if video:
        fields |= {
            "video_contains_pooler": True,
            "spatial_pool_mode": modes.get(own or top["spatial_pool_mode"], "average"),
            "spatial_pool_out_channels": canonical.vision_config(config)["hidden_size"],
            "spatial_pool_stride": top["spatial_pool_stride"],
        }
    else:
        rows, columns = _largest_grid(config)
        fields |= {
            "max_patch_height_num": rows,
            "max_patch_width_num": columns,
            "img_dynamic_batch": True,
        }
    return fields


def _largest_grid(config: Config) -> tuple[int, int]:
    side = canonical.vision_config(config)["image_size"]
    pairs = _candidates(config)
    return max(pair[0] for pair in pairs) // side, max(pair[1] for pair in pairs) // side


def _candidates(config: Config) -> list[list[int]]:
    defaults = canonical.TOP_DEFAULTS["llava_next"]["image_grid_pinpoints"]
    return config.get("image_grid_pinpoints") or defaults


def _vision_section(config: Config) -> Config:
    vision = canonical.vision_config(config)
    features = {key: config.get(key, default) for key, default in FEATURE_DEFAULTS.items()}
    return {
        **{key: vision[key] for key in VISION_DEFAULTS},
        "num_queries": grid(vision) ** 2,
        "use_flash_attention": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        **features,
        "checkpoint_name_or_path": "",
    }


def _text_section(text: Config, fused: bool) -> Config:
    qkv_bias = bool(text.get("attention_bias")) or text["model_type"] == "qwen2"
    return {
        "hidden_size": text["hidden_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "vocab_size": text["vocab_size"],
        "intermediate_size": text["intermediate_size"],
        "max_position_embedding": text["max_position_embeddings"],
        "rms_norm_eps": text["rms_norm_eps"],
        "qkv_has_bias": qkv_bias,
        "attn_proj_has_bias": bool(text.get("attention_bias")),
        "qkv_concat": fused,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **{k: v if (v := text.get(k)) is not None else d for k, d in TOKEN_DEFAULTS.items()},
        "theta": float(text["rope_theta"]),
        **_write_rope(text["rope_scaling"]),
        "use_flash_attention": True,
        "offset": 0,
        "checkpoint_name_or_path": "",
    }


def _write_rope(scaling: Config | None) -> Config:
    if scaling is None:
        return {"extend_method": "None", "scaling_factor": 1.0}
    values = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
    method = {"linear": "linear", "llama3": "LLAMA3"}[_rope_type(scaling)]
    return {"extend_method": method, "scaling_factor": values | {"factor": float(values["factor"])}}


def _around(kind: _Kind, model: Config, config: Config) -> Config:
    """The model with all that MindFormers wants to know besides, for one device."""
    plain = kind is LLAMA
    trainer = "CausalLanguageModelingTrainer" if plain else "MultiModalToTextGenerationTrainer"
    arch = _typed(kind, kind.arch)
    return {
        "seed": 0,
        "output_dir": "./output",
        "load_checkpoint": "",
        "auto_trans_ckpt": False,
        "only_save_strategy": False,
        "resume_training": False,
        "use_parallel": False,
        "run_mode": "predict",
        "trainer": {"type": trainer, "model_name": "llama" if plain else "llava"},
        "runner_config": {"epochs": 1, "batch_size": 1, "sink_mode": True, "sink_size": 2},
        "parallel_config": {
            "data_parallel": 1,
            "model_parallel": 1,
            "pipeline_stage": 1,
            "use_seq_parallel": False,
            "micro_batch_num": 1,
            "vocab_emb_dp": True,
            "gradient_aggregation_group": 4,
        },
        "micro_batch_interleave_num": 1,
        "recompute_config": {"recompute": False, "select_recompute": False},
        "model": {"model_config": model, "arch": arch},
        "processor": _processor(kind, model, config),
        "context": {
            "mode": 0,
            "device_target": "Ascend",
            "ascend_config": {"precision_mode": "must_keep_origin_dtype"},
            "max_call_depth": 10000,
            "max_device_memory": "58GB",
            "save_graphs": False,
            "device_id": 0,
        },
        "parallel": {
            "parallel_mode": 1,
            "gradients_mean": False,
            "full_batch": True,
            "search_mode": "sharding_propagation",
            "enable_parallel_optimizer": False,
            "strategy_ckpt_config": {
                "save_file": "./ckpt_strategy.ckpt",
                "only_trainable_params": False,
            },
        },
    }


def _processor(kind: _Kind, model: Config, config: Config) -> Config:
    tokenizer = {"add_bos_token": True, "add_eos_token": False, "vocab_file": ""}
    if kind is LLAMA:
        named = {"type": "LlamaTokenizer", **tokenizer}
        return {"type": "LlamaProcessor", "return_tensors": "ms", "tokenizer": named}
    classes = ("LlavaContentTransformTemplate", "LlavaTokenizer")
    if kind is LLAVA_NEXT:
        classes = ("LlavaNextContentTransformTemplate", "LlavaNextTokenizer")
        tokenizer["image_tag"] = "<image>"
    vision = canonical.vision_config(config)
    fields = _llava_template(vision) if kind is LLAVA else _next_template(kind, model, config)
    return {
        "type": "BaseXModalToTextProcessor",
        "max_length": model["seq_length"],
        "add_special_tokens": True,
        "model_transform_template": {**_typed(kind, classes[0]), **fields},
        "tokenizer": {**_typed(kind, classes[1]), **tokenizer},
    }


def _llava_template(vision: Config) -> Config:
    return {
        "context_length": grid(vision) ** 2,
        "image_size": vision["image_size"],
        "text_instruct_mode": True,
        "output_columns": ["input_ids", "images", "image_context_pos", "no_image_tag"],
        "vstack_columns": ["images", "image_context_pos"],
    }


def _next_template(kind: _Kind, model: Config, config: Config) -> Config:
    vision = canonical.vision_config(config)
    side, video = vision["image_size"], model["stage"] == VIDEO_STAGE
    columns = ["images", *([] if video else ["image_patches"]), "image_context_pos"]
    shared = ("ignore_token_id", "add_newline", "video_contains_pooler", "img_dynamic_batch")
    shared += ("max_patch_height_num", "max_patch_width_num")
    return {
        "mode": "predict",
        "frames_upbound": 32,
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        "output_columns": ["input_ids", *columns, "no_image_tag"],
        "vstack_columns": columns,
        "num_queries": grid(vision) ** 2,
        "add_length_offset": False,
        "add_time_instruction": False,
        **{key: model[key] for key in shared if key in model},
        "image_processor": {
            **_typed(kind, "ClipImageProcessorV2"),
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_grid_pinpoints": _candidates(config),
        },
        "prompt_processor": {
            **_typed(kind, "VicunaPromptProcessor"),
            "roles": {"human": "USER", "gpt": "ASSISTANT"},
            "conv": "vicuna_v1.1",
        },
    }

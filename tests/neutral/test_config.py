"""config.json: every spelling is the same model; every contradiction names its field."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.real_configs import REAL_CONFIGS, Config
from unillava.config import read_spec, write_config
from unillava.errors import ConfigError
from unillava.spec import LlavaSpec, ProjectorSpec, RopeSpec, TextSpec, VideoSpec, VisionSpec
from weight_convert.canonical import ARCHITECTURES

LLAVA = REAL_CONFIGS["LLaVA-1.5-7B"]
NEXT = REAL_CONFIGS["LLaVA-NeXT-Vicuna-7B"]
MISTRAL = REAL_CONFIGS["LLaVA-NeXT-Mistral-7B"]
VIDEO = REAL_CONFIGS["LLaVA-NeXT-Video-7B"]
SIGLIP = REAL_CONFIGS["Qwen2-0.5B tied, SigLIP"]
HEAD = "language_model.lm_head.weight"


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """A copy with dotted fields set, or removed where the value is ABSENT."""
    config = copy.deepcopy(config)
    for dotted, value in changes.items():
        *path, key = dotted.split(".")
        target = config
        for part in path:
            target = target.setdefault(part, {})
        if value is ABSENT:
            target.pop(key, None)
        else:
            target[key] = value
    return config


# --- what real files mean ---------------------------------------------------------------------


def test_llava_15() -> None:
    spec = read_spec(LLAVA)
    assert spec.family == "llava" and spec.image_mode == "square" and not spec.has_newline
    assert spec.vision == VisionSpec("clip", 1024, 4096, 24, 16, 336, 14, "quick_gelu", 1e-5)
    assert spec.text == TextSpec(
        "llama", 32064, 4096, 11008, 32, 32, 32, 128, "silu", 1e-5, 4096, RopeSpec(10000.0)
    )
    assert spec.projector == ProjectorSpec(2, 1024, 4096, "gelu", True)
    assert (spec.feature_layers, spec.keep_class_token, spec.image_token) == ((-2,), False, 32000)
    assert (spec.dtype, spec.video, spec.grid_pinpoints) == ("float16", None, ())


def test_llava_next() -> None:
    spec = read_spec(NEXT)
    assert (spec.image_mode, spec.unpad, spec.has_newline) == ("anyres", True, True)
    assert spec.grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert spec.anyres_variant == "hf"


def test_mistral_says_that_it_has_no_window() -> None:
    text = read_spec(MISTRAL).text
    assert (text.sliding_window, text.num_kv_heads, text.rope.theta) == (None, 8, 1e6)
    forgotten = changed(MISTRAL, {"text_config.sliding_window": ABSENT})
    assert read_spec(forgotten).text.sliding_window == 4096


def test_llava_next_video() -> None:
    spec = read_spec(VIDEO)
    assert spec.video == VideoSpec("average", 2, "before_projector", "no_token")
    assert (spec.image_token, spec.video_token) == (32001, 32000)
    assert spec.text.rope == RopeSpec(10000.0, "linear", 2.5)


def test_siglip_and_qwen2() -> None:
    spec = read_spec(SIGLIP)
    assert (spec.vision.kind, spec.vision.grid, spec.vision.has_head) == ("siglip", 27, False)
    assert spec.rows_per_tile == 729
    text = spec.text
    assert (text.tie_embeddings, text.qkv_bias, text.output_bias, text.mlp_bias) == (
        *(True, True),
        *(False, False),
    )
    assert text.sliding_window is None  # use_sliding_window is false unless said


# --- spellings ---------------------------------------------------------------------------------

SAME = {
    "dtype": (LLAVA, {"torch_dtype": ABSENT, "dtype": "float16"}),
    "dtype in both spellings": (LLAVA, {"dtype": "float16"}),
    "dtype only in the text": (LLAVA, {"torch_dtype": ABSENT}),
    "no architectures": (LLAVA, {"architectures": None}),
    "token id": (LLAVA, {"image_token_index": ABSENT, "image_token_id": 32000}),
    "token under both names": (LLAVA, {"image_token_id": 32000}),
    "one layer in a list": (LLAVA, {"vision_feature_layer": [-2]}),
    "no layer": (LLAVA, {"vision_feature_layer": ABSENT}),
    "sides as pairs": (
        LLAVA,
        {"vision_config.image_size": [336, 336], "vision_config.patch_size": [14, 14]},
    ),
    "rope_parameters": (
        LLAVA,
        {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    ),
    "rope_scaling null": (LLAVA, {"text_config.rope_scaling": None, "text_config.rope_theta": 1e4}),
    "key heads null": (LLAVA, {"text_config.num_key_value_heads": None}),
    "key heads written out": (LLAVA, {"text_config.num_key_value_heads": 32}),
    "head size": (LLAVA, {"text_config.head_dim": 128}),
    "another name of silu": (LLAVA, {"text_config.hidden_act": "swish"}),
    "text model type absent": (LLAVA, {"text_config.model_type": ABSENT}),
    "vision model type absent": (LLAVA, {"vision_config.model_type": ABSENT}),
    "window of a LLaMA": (LLAVA, {"text_config.sliding_window": 99}),
    "whole heads rotate": (LLAVA, {"text_config.partial_rotary_factor": 1.0}),
    "layer types": (LLAVA, {"text_config.layer_types": ["full_attention"] * 32}),
    "projector named": (LLAVA, {"unillava": {"projector": "mlp2x_gelu"}}),
    "mode named": (LLAVA, {"unillava": {"image_mode": "square"}}),
    "dropout": (LLAVA, {"text_config.attention_dropout": 0.5, "text_config.initializer_range": 1}),
    "unused head size of CLIP": (LLAVA, {"vision_config.projection_dim": 5}),
    "pinpoints null": (NEXT, {"image_grid_pinpoints": None}),
    "newline by other name": (NEXT, {"use_image_newline_parameter": ABSENT}),
    "rope type": (
        VIDEO,
        {"text_config.rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    "rope parameters": (
        VIDEO,
        {
            "text_config.rope_scaling": ABSENT,
            "text_config.rope_parameters": {
                "rope_type": "linear",
                "factor": 2.5,
                "rope_theta": 10000.0,
            },
        },
    ),
    "rope in both spellings": (
        VIDEO,
        {"text_config.rope_parameters": {"factor": 2.5, "rope_type": "linear", "type": "linear"}},
    ),
    "pooling absent": (VIDEO, {"spatial_pool_mode": ABSENT, "spatial_pool_stride": ABSENT}),
    "Qwen2 layer types": (SIGLIP, {"text_config.layer_types": ["full_attention"] * 24}),
}


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_the_same_model(name: str) -> None:
    base, changes = SAME[name]
    assert read_spec(changed(base, changes)) == read_spec(base)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
ROPES = {
    "linear": ({"type": "linear", "factor": 4}, RopeSpec(1e4, "linear", 4.0)),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0},
        RopeSpec(1e4, "dynamic", 2.0, original_max_position=4096),
    ),
    "llama3": (LLAMA3_ROPE, RopeSpec(1e4, "llama3", 8.0, 1.0, 4.0, 8192)),
    "llama3 without original": (
        {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"},
        RopeSpec(1e4, "llama3", 8.0, 1.0, 4.0, 4096),
    ),
    "theta inside": ({"rope_type": "default", "rope_theta": 5e5}, RopeSpec(5e5)),
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_types(name: str, key: str) -> None:
    fields, expected = ROPES[name]
    assert read_spec(changed(LLAVA, {f"text_config.{key}": fields})).text.rope == expected


def test_several_feature_layers_widen_the_projector() -> None:
    spec = read_spec(changed(LLAVA, {"vision_feature_layer": [-2, -5, 0]}))
    assert spec.feature_layers == (-2, -5, 0) and spec.projector.input_size == 3 * 1024


def test_the_class_token_can_be_kept() -> None:
    spec = read_spec(changed(LLAVA, {"vision_feature_select_strategy": "full"}))
    assert spec.keep_class_token and spec.rows_per_tile == 577


def test_biases_of_llama() -> None:
    text = read_spec(changed(LLAVA, {"text_config.attention_bias": True})).text
    assert (text.qkv_bias, text.output_bias, text.mlp_bias) == (True, True, False)


def test_the_image_processor_decides_between_square_and_pad() -> None:
    pads = {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}
    assert read_spec(LLAVA, processor=pads).image_mode == "pad"
    assert read_spec(LLAVA, processor=pads | {"do_pad": False}).image_mode == "square"
    clip = {"image_processor_type": "CLIPImageProcessor", "do_pad": True}
    assert read_spec(LLAVA, processor=clip).image_mode == "square"
    next_pads = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
    assert read_spec(NEXT, processor=next_pads).image_mode == "anyres"
    with pytest.raises(ConfigError, match=r"unillava\.image_mode"):
        read_spec(changed(LLAVA, {"unillava.image_mode": "square"}), processor=pads)


@pytest.mark.parametrize(
    ("base", "outer", "inner", "stored", "tied"),
    [
        (LLAVA, ABSENT, ABSENT, [HEAD], False),
        (LLAVA, ABSENT, True, [], True),
        (LLAVA, False, True, None, True),
        (LLAVA, False, True, [HEAD], False),
        (NEXT, False, True, None, False),
        (NEXT, False, True, [], True),
        (NEXT, False, True, [HEAD], False),
        (NEXT, True, ABSENT, None, True),
        (VIDEO, True, True, [HEAD], True),
    ],
)
def test_tied_embeddings(
    base: Config, outer: Any, inner: Any, stored: list[str] | None, tied: bool
) -> None:
    config = changed(base, {"tie_word_embeddings": outer, "text_config.tie_word_embeddings": inner})
    keys = None if stored is None else {name: (1,) for name in stored}
    assert read_spec(config, keys=keys).text.tie_embeddings == tied


def test_the_file_tells_whether_siglips_head_was_saved() -> None:
    config = changed(SIGLIP, {"vision_config.vision_use_head": ABSENT})
    assert read_spec(config).vision.has_head
    assert not read_spec(config, keys={}).vision.has_head
    probe = {"vision_tower.vision_model.head.probe": (1, 1, 1152)}
    assert read_spec(SIGLIP, keys=probe).vision.has_head


# --- the object "unillava" ---------------------------------------------------------------------


def test_own_fields() -> None:
    own = {
        "projector": "linear",
        "image_mode": "pad",
        "image_newline": True,
        "template": "vicuna_v1",
    }
    spec = read_spec(changed(LLAVA, {"unillava": own}))
    assert (spec.projector.depth, spec.image_mode, spec.has_newline) == (1, "pad", True)
    assert spec.template == "vicuna_v1"
    video = {"pool_mode": "bilinear", "pool_position": "after_projector", "newline": "grid"}
    spec = read_spec(changed(VIDEO, {"unillava": {"video": video, "anyres_variant": "llava"}}))
    assert spec.video == VideoSpec("bilinear", 2, "after_projector", "grid")
    assert spec.anyres_variant == "llava"


@pytest.mark.parametrize(
    ("name", "depth"), [("identity", 0), ("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)]
)
def test_projectors(name: str, depth: int) -> None:
    same_width = {"text_config.hidden_size": 1024, "unillava.projector": name}
    assert read_spec(changed(LLAVA, same_width)).projector.depth == depth


# --- errors ------------------------------------------------------------------------------------

T, V, U = "text_config.", "vision_config.", "unillava."
BAD: list[tuple[Config, dict[str, Any], str, str]] = [
    # (base, changes, field in the message, another piece of the message)
    (LLAVA, {"model_type": "llava_onevision"}, "model_type", "llava_next_video"),
    (LLAVA, {"model_type": ABSENT}, "model_type", "missing"),
    (LLAVA, {"architectures": ["LlavaLlamaForCausalLM"]}, "architectures", "LlavaForConditional"),
    (LLAVA, {"quantization_config": {"bits": 4}}, "quantization_config", "quantised"),
    (LLAVA, {T + "model_type": "mpt"}, "text_config.model_type", "mistral"),
    (LLAVA, {V + "model_type": "dinov2"}, "vision_config.model_type", "siglip_vision_model"),
    (LLAVA, {"text_config": 3}, "text_config", "object"),
    (LLAVA, {"vision_config": []}, "vision_config", "object"),
    (LLAVA, {"unillava": None}, "unillava", "object"),
    (LLAVA, {V + "hidden_act": "mish"}, "vision_config.hidden_act", "quick_gelu"),
    (LLAVA, {T + "hidden_act": 1}, "text_config.hidden_act", "silu"),
    (LLAVA, {"projector_hidden_act": "tanh"}, "projector_hidden_act", "gelu"),
    (LLAVA, {V + "hidden_size": 1000}, "vision_config.hidden_size", "multiple of num_attention"),
    (LLAVA, {V + "hidden_size": "1024"}, "vision_config.hidden_size", "'1024'"),
    (LLAVA, {V + "hidden_size": True}, "vision_config.hidden_size", "whole number"),
    (LLAVA, {V + "num_hidden_layers": 0}, "vision_config.num_hidden_layers", "at least 1"),
    (LLAVA, {V + "image_size": [336, 224]}, "vision_config.image_size", "both sides"),
    (LLAVA, {V + "image_size": 10}, "vision_config.image_size", "patch_size, 14"),
    (LLAVA, {V + "num_channels": 1}, "vision_config.num_channels", "3"),
    (LLAVA, {V + "layer_norm_eps": -1}, "vision_config.layer_norm_eps", "above 0"),
    (LLAVA, {V + "tie_last_hidden_states": True}, "vision_config.tie_last", "not supported"),
    (LLAVA, {T + "hidden_size": 4097}, "text_config.hidden_size", "num_attention_heads, 32"),
    (LLAVA, {T + "num_key_value_heads": 5}, "text_config.num_key_value_heads", "divisor"),
    (LLAVA, {T + "head_dim": 127}, "text_config.head_dim", "even"),
    (LLAVA, {T + "rms_norm_eps": "1e-5"}, "text_config.rms_norm_eps", "number"),
    (LLAVA, {T + "rms_norm_eps": float("nan")}, "text_config.rms_norm_eps", "number"),
    (LLAVA, {T + "attention_bias": 1}, "text_config.attention_bias", "true or false"),
    (LLAVA, {T + "partial_rotary_factor": 0.5}, "text_config.partial_rotary_factor", "part"),
    (LLAVA, {T + "layer_types": ["sliding_attention"] * 32}, "text_config.layer_types", "agree"),
    (LLAVA, {T + "layer_types": ["full_attention"]}, "text_config.layer_types", "32 entries"),
    (LLAVA, {T + "rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling.rope_type", "yarn"),
    (LLAVA, {T + "rope_scaling": {"type": "linear"}}, "text_config.rope_scaling.factor", "missing"),
    (LLAVA, {T + "rope_scaling": {"type": "linear", "factor": 0.5}}, "scaling.factor", "1.0"),
    (LLAVA, {T + "rope_scaling": {"type": "linear", "rope_type": "dynamic"}}, "ing.type", "same"),
    (LLAVA, {T + "rope_scaling": {"mrope_section": [1]}}, "rope_scaling.mrope_section", "known"),
    (LLAVA, {T + "rope_scaling": [1]}, "text_config.rope_scaling", "object"),
    (LLAVA, {T + "rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1}}, "high_freq", "more than"),
    (LLAVA, {T + "rope_scaling": {"factor": 1, "type": "linear"}, T + "rope_parameters": {"a": 1}},
     "text_config.rope_scaling", "only one"),
    (LLAVA, {T + "rope_theta": 1e6, T + "rope_parameters": {"rope_theta": 1e4}},
     "text_config.rope_theta", "10000"),
    (LLAVA, {T + "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary", "0.5"),
    (MISTRAL, {T + "sliding_window": "all"}, "text_config.sliding_window", "whole number"),
    (MISTRAL, {T + "sliding_window": 8, T + "layer_types": ["full_attention"] * 32},
     "text_config.layer_types", "agreement"),
    (SIGLIP, {T + "use_sliding_window": True}, "text_config.max_window_layers", "same kind"),
    (SIGLIP, {T + "use_sliding_window": True, T + "layer_types": ["full_attention"] * 23
              + ["sliding_attention"]}, "text_config.layer_types", "same kind"),
    (SIGLIP, {"vision_feature_select_strategy": "default"}, "select_strategy", "first patch"),
    (NEXT, {"vision_feature_select_strategy": "full"}, "select_strategy", "grid"),
    (LLAVA, {"vision_feature_select_strategy": "patch"}, "select_strategy", "default, full"),
    (LLAVA, {"vision_feature_layer": 25}, "vision_feature_layer", "24 layers"),
    (LLAVA, {"vision_feature_layer": [-2, -26]}, "vision_feature_layer", "from -25 to 24"),
    (LLAVA, {"vision_feature_layer": []}, "vision_feature_layer", "list"),
    (LLAVA, {"image_token_index": 32064}, "image_token_index", "vocab_size, 32064"),
    (LLAVA, {"image_token_index": -200}, "image_token_index", "at least 0"),
    (LLAVA, {"image_token_id": 5}, "image_token_id", "32000"),
    (LLAVA, {"multimodal_projector_bias": "yes"}, "multimodal_projector_bias", "true or false"),
    (LLAVA, {"tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
    (LLAVA, {"torch_dtype": "float8"}, "torch_dtype", "bfloat16"),
    (LLAVA, {"dtype": "float32"}, "torch_dtype", "same as dtype"),
    (NEXT, {"image_grid_pinpoints": [[336, 600]]}, "image_grid_pinpoints", "336"),
    (NEXT, {"image_grid_pinpoints": [336]}, "image_grid_pinpoints", "[height, width]"),
    (NEXT, {"image_grid_pinpoints": []}, "image_grid_pinpoints", "list"),
    (VIDEO, {"spatial_pool_mode": "conv"}, "spatial_pool_mode", "weights of its own"),
    (VIDEO, {"spatial_pool_mode": "sum"}, "spatial_pool_mode", "average"),
    (VIDEO, {"spatial_pool_stride": 25}, "spatial_pool_stride", "24"),
    (VIDEO, {"video_token_index": 32001}, "video_token_index", "another token"),
    (LLAVA, {U + "projector_type": "linear"}, "unillava.projector_type", "unillava.projector?"),
    (LLAVA, {U + "projector": "mlp2x_relu"}, "unillava.projector", "mlp{N}x_gelu"),
    (LLAVA, {U + "projector": "identity"}, "unillava.projector", "1024 columns, text 4096"),
    (LLAVA, {U + "image_mode": "anyres"}, "unillava.image_mode", "square or pad"),
    (LLAVA, {U + "image_mode": "keep"}, "unillava.image_mode", "square, pad, anyres"),
    (LLAVA, {U + "unpad": True}, "unillava.unpad", "anyres"),
    (LLAVA, {U + "video": {}}, "unillava.video", "llava_next_video"),
    (LLAVA, {U + "template": 3}, "unillava.template", "conversation template"),
    (NEXT, {U + "image_newline": False}, "unillava.unpad", "image_newline"),
    (NEXT, {U + "anyres_variant": "ov"}, "unillava.anyres_variant", "hf, llava"),
    (VIDEO, {U + "video": {"newline": "row"}}, "unillava.video.newline", "grid, frame"),
    (VIDEO, {U + "video": {"stride": 2}}, "unillava.video.stride", "pool_mode"),
    (VIDEO, {U + "video": {"newline": "grid"}, U + "image_newline": False, U + "unpad": False},
     "unillava.image_newline", "'grid'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "changes", "field", "piece"),
    BAD,
    ids=[f"{f}-{n}" for n, (*_, f, _p) in enumerate(BAD)],
)
def test_errors_name_the_field(
    base: Config, changes: dict[str, Any], field: str, piece: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_spec(changed(base, changes))
    assert field in caught.value.problem
    assert piece in str(caught.value)


FIELDS = [
    *(key for key in VIDEO if not key.endswith("_config")),
    *(T + key for key in (*VIDEO["text_config"], "rope_parameters", "layer_types", "head_dim")),
    *(V + key for key in VIDEO["vision_config"]),
    *("text_config", "vision_config", "unillava", "dtype", "image_token_id"),
    *(U + key for key in ("projector", "image_mode", "unpad", "video", "template")),
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40000) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "type", "newline", "x"]), inner)
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([VIDEO, SIGLIP, MISTRAL]), st.sampled_from(FIELDS), JSON_VALUES)
def test_any_json_is_read_or_refused(base: Config, field: str, value: Any) -> None:
    *outer, _ = field.split(".")
    try:
        spec = read_spec(changed(base, {field: value}))
    except ConfigError as error:
        assert outer == [] or outer[0] in str(error) or "image_token" in str(error)
    else:
        assert isinstance(spec, LlavaSpec)


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="not an object"):
        read_spec([1, 2])  # type: ignore[arg-type]


# --- writing -----------------------------------------------------------------------------------


@st.composite
def specs(draw: Any) -> LlavaSpec:
    """Any model that a config.json can describe."""
    family = draw(st.sampled_from(list(ARCHITECTURES)))
    vision = draw(visions())
    text = draw(texts())
    layer = st.integers(-vision.num_layers - 1, vision.num_layers)
    layers = tuple(draw(st.lists(layer, min_size=1, max_size=3)))
    mode = draw(st.sampled_from(["square", "pad"] if family == "llava" else ["square", "anyres"]))
    newline = draw(st.booleans())
    keep = vision.kind == "siglip" or (family == "llava" and draw(st.booleans()))
    side = st.integers(1, 3).map(lambda n: n * vision.image_size)
    pinpoints = st.lists(st.tuples(side, side), min_size=1, max_size=4).map(tuple)
    video = None
    if family == "llava_next_video":
        video = VideoSpec(
            draw(st.sampled_from(["average", "max", "bilinear", "none"])),
            draw(st.integers(1, vision.grid)),
            draw(st.sampled_from(["before_projector", "after_projector"])),
            draw(st.sampled_from(["grid", "frame", "one_token", "no_token"]))
            if newline
            else "no_token",
        )
    input_size = vision.hidden_size * len(layers)
    depths = st.integers(0 if input_size == text.hidden_size else 1, 4)
    return LlavaSpec(
        family=family,
        vision=vision,
        text=text,
        projector=ProjectorSpec(
            draw(depths),
            input_size,
            text.hidden_size,
            draw(st.sampled_from(["gelu", "relu", "silu", "quick_gelu", "gelu_pytorch_tanh"])),
            draw(st.booleans()),
        ),
        feature_layers=layers,
        keep_class_token=keep,
        image_token=draw(st.integers(0, text.vocab_size - 2)),
        video_token=text.vocab_size - 1 if video else None,
        image_mode=mode,
        grid_pinpoints=() if family == "llava" else draw(pinpoints),
        unpad=mode == "anyres" and newline and draw(st.booleans()),
        anyres_variant=draw(st.sampled_from(["hf", "llava"])),
        has_newline=newline,
        video=video,
        template=draw(st.none() | st.text(min_size=1, max_size=8)),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )


@st.composite
def visions(draw: Any) -> VisionSpec:
    kind = draw(st.sampled_from(["clip", "siglip"]))
    heads, patch = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    return VisionSpec(
        kind=kind,
        hidden_size=heads * draw(st.integers(1, 16)),
        intermediate_size=draw(st.integers(1, 99)),
        num_layers=draw(st.integers(1, 5)),
        num_heads=heads,
        image_size=patch + draw(st.integers(0, 50)),
        patch_size=patch,
        hidden_act=draw(st.sampled_from(["gelu", "quick_gelu", "gelu_pytorch_tanh"])),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        has_head=kind == "siglip" and draw(st.booleans()),
    )


@st.composite
def texts(draw: Any) -> TextSpec:
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2"]))
    kv_heads, groups, half = (draw(st.integers(1, 4)) for _ in range(3))
    heads = kv_heads * groups
    hidden = heads * draw(st.integers(1, 16))
    max_position = draw(st.integers(1, 4096))
    attention_bias = kind == "llama" and draw(st.booleans())
    factor, theta = draw(st.floats(1, 100)), draw(st.floats(1, 1e8))
    rope = draw(
        st.sampled_from(
            [
                RopeSpec(theta),
                RopeSpec(theta, "linear", factor),
                RopeSpec(theta, "dynamic", factor, original_max_position=max_position),
                RopeSpec(theta, "llama3", factor, 0.5, 8.0, 17),
            ]
        )
    )
    return TextSpec(
        kind=kind,
        vocab_size=draw(st.integers(2, 500)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 99)),
        num_layers=draw(st.integers(1, 5)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * half,
        hidden_act=draw(st.sampled_from(["silu", "gelu"])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        max_position=max_position,
        rope=rope,
        tie_embeddings=draw(st.booleans()),
        qkv_bias=attention_bias or kind == "qwen2",
        output_bias=attention_bias,
        mlp_bias=kind == "llama" and draw(st.booleans()),
        sliding_window=None if kind == "llama" else draw(st.none() | st.integers(1, 99)),
    )


VERSION_5 = changed(
    VIDEO,
    {
        "torch_dtype": ABSENT,
        "dtype": "bfloat16",
        "image_token_id": 32001,
        "video_token_id": 32000,
        "unillava": {"projector": "linear"},
        "text_config.dtype": "bfloat16",
        "text_config.rope_scaling": ABSENT,
        "text_config.rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4},
        "text_config.layer_types": ["full_attention"] * 32,
        "text_config.original_max_position_embeddings": 4096,
        "vision_config.dtype": "bfloat16",
    },
)
"""As transformers 5 saves it: every field that must not survive next to its older spelling."""
BASES = [None, VERSION_5, *REAL_CONFIGS.values()]


@settings(max_examples=300, deadline=None)
@given(specs(), st.sampled_from(BASES))
def test_written_configurations_read_back(spec: LlavaSpec, base: Config | None) -> None:
    before = copy.deepcopy(base)
    assert read_spec(write_config(spec, base)) == spec
    assert base == before


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_writing_keeps_what_it_does_not_know(name: str) -> None:
    config = REAL_CONFIGS[name]
    written = write_config(read_spec(config), config)
    assert "unillava" not in written
    assert written["transformers_version"] == config["transformers_version"]
    assert written["text_config"]["_name_or_path"] == config["text_config"]["_name_or_path"]


def test_the_repeated_vocabulary_follows() -> None:
    spec = read_spec(LLAVA)
    larger = dataclasses.replace(spec, text=dataclasses.replace(spec.text, vocab_size=32128))
    assert write_config(larger, LLAVA)["vocab_size"] == 32128


@pytest.mark.parametrize(
    "changes",
    [
        {"text": {"output_bias": True}},
        {"text": {"sliding_window": 7}},
        {"text": {"rope": RopeSpec(1e4, "dynamic", 2.0, original_max_position=7)}},
        {"vision": {"has_head": True}},
        {"grid_pinpoints": ((336, 672),)},
    ],
    ids=lambda changes: str(next(iter(changes.items()))),
)
def test_what_cannot_be_said_is_refused(changes: dict[str, Any]) -> None:
    spec = read_spec(LLAVA)
    for field, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(spec, field), **value)
        spec = dataclasses.replace(spec, **{field: value})
    with pytest.raises(ConfigError, match="cannot describe") as caught:
        write_config(spec)
    assert next(iter(changes)) in str(caught.value)

"""What config.json can say: transformers' class defaults, known values, our own fields."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# --- what absent fields mean: transformers' class defaults -----------------------------------

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
}

_TOP: Config = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_token_index": 32000,
}
_ANYRES: Config = {
    **_TOP,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
TOP_DEFAULTS: dict[str, Config] = {
    "llava": _TOP,
    "llava_next": _ANYRES,
    "llava_next_video": {
        **_ANYRES,
        "image_token_index": 32001,
        "video_token_index": 32000,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
    },
}

VISION_DEFAULTS: dict[str, Config] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
}

_TEXT: Config = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
TEXT_DEFAULTS: dict[str, Config] = {
    "llama": {
        **_TEXT,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        **_TEXT,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,  # Mistral v0.2 and later must say null
    },
    "qwen2": {
        **_TEXT,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}

ABSENT: dict[str, Config] = {
    "text_config": {"model_type": "llama"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
"""What a nested configuration is when it is not given at all: CLIP-L/14-336 and LLaMA."""

# --- values --------------------------------------------------------------------------------

VISION_KINDS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""transformers' name -> ours; the names on the left of one value compute the same function."""
STRATEGIES = {"default": False, "full": True}
"""vision_feature_select_strategy -> whether the class token's row is kept."""
DTYPES = ("float32", "float16", "bfloat16")
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
POOL_MODES = ("average", "max")
OWN_POOL_MODES = (*POOL_MODES, "bilinear", "none")
POOL_POSITIONS = ("before_projector", "after_projector")
VIDEO_NEWLINES = ("grid", "frame", "one_token", "no_token")
IMAGE_MODES = ("square", "pad", "anyres")

ANYRES_VARIANTS = ("hf", "llava")

OWN_FIELDS = (
    "projector",
    "image_mode",
    "anyres_variant",
    "unpad",
    "image_newline",
    "video",
    "template",
)
"""The object "unillava": `projector` is identity, linear or mlp{N}x_{activation}; `image_mode`
one of IMAGE_MODES; `anyres_variant` whose rounding anyres follows; `unpad` whether anyres cuts
the padding rows and ends rows with the newline; `image_newline` whether that parameter exists;
`video` an object of OWN_VIDEO_FIELDS; `template` the name of a conversation template."""
OWN_VIDEO_FIELDS = ("pool_mode", "pool_position", "newline")

Unsupported = dict[str, tuple[tuple[Any, ...], str]]
"""Field -> (values that change nothing, what any other value asks for)."""

NOT_PLAIN: Unsupported = {
    "quantization_config": ((None,), "a quantised checkpoint"),
    "per_layer_config": ((None,), "a different configuration per layer"),
}
UNSUPPORTED_VISION: Unsupported = {
    **NOT_PLAIN,
    "tie_last_hidden_states": ((None, False), "a normalised last hidden state"),
    "pruned_heads": ((None, {}), "a tower with pruned heads"),
}
UNSUPPORTED_TEXT: Unsupported = {
    **NOT_PLAIN,
    "partial_rotary_factor": ((None, 1), "rotating only a part of each head"),
    "pruned_heads": ((None, {}), "a language model with pruned heads"),
}

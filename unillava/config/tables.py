"""What config.json can say: known values and our own fields.

The defaults of absent fields are in `weight_convert.canonical`.
"""

from __future__ import annotations

from typing import Any

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

"""config.json of well-known checkpoints, as their hub files have them: only what is not default.

Written down by hand from the public files (2024), in the sparse form in which transformers 4.36
to 4.46 saved them. Two more stand for kinds that the llava-hf LLaMA line does not have: a SigLIP
tower with a tied Qwen2, and the same text with a CLIP tower.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

CLIP_336: Config = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
SIGLIP_384: Config = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _llava(text: Config, **top: Any) -> Config:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": CLIP_336,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        **top,
    }


def _llava_next(text: Config, **top: Any) -> Config:
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": 32000,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.39.0.dev0",
        "use_image_newline_parameter": True,
        "vision_config": CLIP_336,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        **top,
    }


VICUNA_7B: Config = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
VICUNA_13B: Config = VICUNA_7B | {
    "_name_or_path": "lmsys/vicuna-13b-v1.5",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B: Config = {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
LLAMA3_8B: Config = {
    "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128320,
}
YI_34B: Config = {
    "_name_or_path": "NousResearch/Nous-Hermes-2-Yi-34B",
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": 7,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "vocab_size": 64064,
}
QWEN_05B: Config = {
    "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 152000,
}

REAL_CONFIGS: dict[str, Config] = {
    "LLaVA-1.5-7B": _llava(VICUNA_7B, vocab_size=32064),
    "LLaVA-1.5-13B": _llava(VICUNA_13B, vocab_size=32064),
    "LLaVA-NeXT-Vicuna-7B": _llava_next(VICUNA_7B, vocab_size=32064),
    "LLaVA-NeXT-Mistral-7B": _llava_next(MISTRAL_7B, vocab_size=32064),
    "LLaVA-NeXT-Llama-3-8B": _llava_next(LLAMA3_8B, image_token_index=128256),
    "LLaVA-NeXT-34B": _llava_next(YI_34B, image_token_index=64000, vocab_size=64064),
    "LLaVA-NeXT-Video-7B": _llava_next(
        VICUNA_7B
        | {
            "rope_scaling": {"factor": 2.5, "rope_type": "linear", "type": "linear"},
            "type": "linear",
        },
        architectures=["LlavaNextVideoForConditionalGeneration"],
        image_seq_length=576,
        image_token_index=32001,
        model_type="llava_next_video",
        spatial_pool_mode="average",
        spatial_pool_out_channels=1024,
        spatial_pool_stride=2,
        torch_dtype="bfloat16",
        video_seq_length=288,
        video_token_index=32000,
    ),
    "Qwen2-0.5B tied, SigLIP": _llava(
        QWEN_05B,
        image_token_index=151646,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        vision_config=SIGLIP_384,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "Qwen2-0.5B tied, CLIP, NeXT": _llava_next(
        QWEN_05B, image_token_index=151646, tie_word_embeddings=True
    ),
}

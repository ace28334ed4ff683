"""LLaVA-MOSS2, and MOSS2 and InternLM2 on their own.

The language model computes what LLaMA computes. Its tensors have other names, and the query, key
and value projections are one, its rows grouped by key/value head; `bias` puts a bias on the two
attention projections. LLaVA-MOSS2's stage 2 writes `pytorch_model.bin` and nothing else: neither
configuration nor tokenizer, which `--base` then gives (MOSS2's own directory is enough). An
`mm_projector.bin` beside the weights is what LLaVA-MOSS2 uses instead of the projector in them.

Source: LLaVA-MOSS2, llava/model/language_model/{modeling,configuration}_moss2.py.
"""

from __future__ import annotations

from weight_convert import canonical
from weight_convert.canonical import EMBEDDING, HEAD, LANGUAGE, Config
from weight_convert.dialects.configs import check_types
from weight_convert.dialects.fork import Fork, dialect
from weight_convert.errors import CheckpointError
from weight_convert.mapping import Rule, grouped_qkv, rule

DEFAULTS: Config = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "bias": True,
    "rope_theta": 10000.0,
    "attn_implementation": "eager",
}
"""The class defaults of Moss2Config, and of InternLM2Config."""
_TOKENS: Config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings", "rope_theta"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields that are called as LLaMA's."""
SCALINGS = ("linear", "dynamic")


def rules(text: Config) -> list[Rule]:
    """Canonical <-> stored names of the language model.

    Args:
        text: text_config with its defaults filled in.
    """
    ours, theirs = f"{LANGUAGE}model.layers.{{n}}.", "model.layers.{n}."
    fused = grouped_qkv(text["num_attention_heads"], text["num_key_value_heads"])
    block = (
        ("self_attn.o_proj.{p}", "attention.wo.{p}"),
        ("mlp.gate_proj.weight", "feed_forward.w1.weight"),
        ("mlp.down_proj.weight", "feed_forward.w2.weight"),
        ("mlp.up_proj.weight", "feed_forward.w3.weight"),
        ("input_layernorm.weight", "attention_norm.weight"),
        ("post_attention_layernorm.weight", "ffn_norm.weight"),
    )
    parts = [f"{ours}self_attn.{part}_proj.{{p}}" for part in "qkv"]
    return [
        rule(EMBEDDING, "model.tok_embeddings.weight"),
        rule(parts, f"{theirs}attention.wqkv.{{p}}", fused),
        *(rule(ours + a, theirs + b) for a, b in block),
        rule(f"{LANGUAGE}model.norm.weight", "model.norm.weight"),
        rule(HEAD, "output.weight"),
    ]


def canonical_text(config: Config, dtype: str, where: str) -> Config:
    """The language model's part of the canonical configuration.

    Args:
        config: config.json of MOSS2, InternLM2 or LLaVA-MOSS2.
        dtype: what the weights are stored in.
        where: names the file in errors.

    Raises:
        CheckpointError: a field has a value that cannot be.
    """
    check_types(config, DEFAULTS, f"config.json of {where}")
    scaling = config.get("rope_scaling")
    if scaling is not None and not _is_scaling(scaling):
        raise CheckpointError(
            f"config.json of {where}: rope_scaling has a value that is not supported",
            given=scaling,
            expected='{"type": "linear" or "dynamic", "factor": a number}, or null',
        )
    said = {**DEFAULTS, **_TOKENS, **config}
    text = {
        **{key: said[key] for key in _SAME},
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": said["bias"],
        "mlp_bias": False,
        "model_type": "llama",
        "rope_scaling": scaling and {"rope_type": scaling["type"], "factor": scaling["factor"]},
        "torch_dtype": dtype,
    }
    text = canonical.text_config({"text_config": text})
    return {
        "text_config": dict(sorted(text.items())),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": dtype,
    }


def _is_scaling(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"type", "factor"}:
        return False
    return value["type"] in SCALINGS and type(value["factor"]) in (int, float)


def stored_text(text: Config) -> Config:
    """The fields of config.json.

    Args:
        text: text_config with its defaults filled in.

    Raises:
        CheckpointError: something that MOSS2 cannot be.
    """
    scaling = text.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    for key, value, known in (
        ("model_type", text["model_type"], ("llama",)),
        ("mlp_bias", text.get("mlp_bias", False), (False,)),
        ("head_dim", text.get("head_dim"), (text["hidden_size"] // text["num_attention_heads"],)),
        ("rope_scaling", kind, (None, *SCALINGS)),
    ):
        if value not in known:
            raise CheckpointError(
                "MOSS2 cannot hold this language model",
                given=f"text_config.{key} {value!r}",
                expected=" or ".join(map(repr, known)),
            )
    return {
        **DEFAULTS,
        **{key: text[key] for key in _SAME if key in text},
        "bias": text["attention_bias"],
        "rope_scaling": {"type": kind, "factor": float(scaling["factor"])} if kind else None,
    }


DIALECTS = (
    dialect(
        Fork(
            name="moss2",
            title="LLaVA-MOSS2 (pytorch_model.bin, fused wqkv); also MOSS2 and InternLM2 alone",
            whole=("Moss2ForCausalLM", "llava_moss2"),
            alone=("Moss2ForCausalLM", "moss2"),
            template="llava_llama_2",
            prefix="model.",
            embedding=(EMBEDDING, "model.tok_embeddings.weight"),
            evidence="model.layers.0.attention.wqkv.weight",
            rules=rules,
            canonical_text=canonical_text,
            stored_text=stored_text,
            overlay="mm_projector.bin",
        )
    ),
)

"""LLaVA-Lightning-MPT, and MPT on its own.

Only names change: the canonical layout keeps MPT's fused `Wqkv` (its rows are query, key, value,
each by heads) as transformers' MptForCausalLM does. The output head is the embedding matrix; LLaVA
1.2 saves it a second time. No model of unillava runs MPT: its checkpoints can be converted and
compared, not loaded.

Source: LLaVA and KoLLaVA of May 2023, llava/model/llava_mpt.py; transformers, models/mpt.
"""

from __future__ import annotations

from weight_convert import canonical
from weight_convert.canonical import HEAD, LANGUAGE, MPT_DEFAULTS, MPT_EMBEDDING, Config
from weight_convert.dialects import fork
from weight_convert.dialects.configs import check_types
from weight_convert.dialects.fork import Fork, dialect
from weight_convert.errors import CheckpointError
from weight_convert.mapping import Rule, prefixed, rule

NAMES = (
    "transformer.wte.weight",
    "transformer.blocks.{n}.norm_1.{p}",
    "transformer.blocks.{n}.attn.Wqkv.{p}",
    "transformer.blocks.{n}.attn.out_proj.{p}",
    "transformer.blocks.{n}.norm_2.{p}",
    "transformer.blocks.{n}.ffn.up_proj.{p}",
    "transformer.blocks.{n}.ffn.down_proj.{p}",
    "transformer.norm_f.{p}",
)
_FIELDS: Config = {
    **MPT_DEFAULTS,
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "emb_pdrop": 0.0,
    "embedding_fraction": 1.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "learned_pos_emb": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0.0,
    "use_cache": False,
}
"""The fields of MptConfig and their defaults. `logit_scale` is a number or a word."""
_MORE = ("logit_scale", "bos_token_id", "eos_token_id", "pad_token_id")


def rules(text: Config) -> list[Rule]:
    """Canonical <-> stored names of the language model, whose head is only read."""
    names = prefixed([rule(name, name) for name in NAMES], LANGUAGE, "")
    return [*names, rule(HEAD, "lm_head.weight")]


def canonical_text(config: Config, dtype: str, where: str) -> Config:
    """The language model's part of the canonical configuration.

    Args:
        config: config.json of MPT or LLaVA-Lightning-MPT.
        dtype: what the weights are stored in.
        where: names the file in errors.

    Raises:
        CheckpointError: a field has a value that cannot be.
    """
    check_types(config, _FIELDS, f"config.json of {where}")
    attention = {**_FIELDS["attn_config"], **config.get("attn_config", {})}
    if attention["qk_ln"] or attention["attn_type"] != "multihead_attention":
        raise CheckpointError(
            f"config.json of {where}: attn_config asks for what LLaVA's MPT does not have",
            given=f"qk_ln {attention['qk_ln']}, attn_type {attention['attn_type']!r}",
            expected="qk_ln false, attn_type 'multihead_attention'",
        )
    text = {
        **_FIELDS,
        **{key: config[key] for key in (*_FIELDS, *_MORE) if key in config},
        "architectures": ["MptForCausalLM"],
        "attn_config": attention,
        "model_type": "mpt",
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    text = canonical.text_config({"text_config": text})
    return {
        "text_config": dict(sorted(text.items())),
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }


def stored_text(text: Config) -> Config:
    """The fields of config.json.

    Args:
        text: text_config with its defaults filled in.

    Raises:
        CheckpointError: it is another language model.
    """
    if text["model_type"] != "mpt":
        raise CheckpointError(
            "dialect mpt holds MPT alone", given=f"text_config.model_type {text['model_type']!r}"
        )
    known = (*_FIELDS, *_MORE, "hidden_size")
    return {**_FIELDS, **{key: text[key] for key in known if key in text}}


MPT = Fork(
    name="mpt",
    title="LLaVA-Lightning-MPT; also MPT alone (conversion only: unillava runs no MPT)",
    whole=("LlavaMptForCausalLM", "llava_mpt"),
    alone=("MptForCausalLM", "mpt"),
    template="mpt_multimodal",
    prefix="transformer.",
    embedding=(MPT_EMBEDDING, "transformer.wte.weight"),
    evidence="transformer.blocks.0.attn.Wqkv.weight",
    rules=rules,
    canonical_text=canonical_text,
    stored_text=stored_text,
)


def there_and_back(config: Config) -> Config:
    """What a canonical configuration becomes when it is written and read."""
    return fork.there_and_back(MPT, config)


DIALECTS = (dialect(MPT),)

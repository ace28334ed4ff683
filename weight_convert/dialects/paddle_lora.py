"""PaddleNLP's LoRA directories, and PaddleMIX's, which hold the projector too.

`lora_config.json` and `lora_model_state.pdparams` (or one per tensor-parallel rank), or
`peft_model*.safetensors`. The two matrices of a module are parameters of the layer itself:
`MODULE.lora_A` [in, r] and `MODULE.lora_B` [r, out], turned like all of Paddle's matrices. Whatever
else was trained lies in the same file under its own name. `target_modules` are regular expressions
for whole module names.

The scaling is lora_alpha / r, with `rslora` lora_alpha / sqrt(r), with `pissa` 1. With pissa
PaddleNLP has taken the adapter's beginning out of the base: the base that it belongs to is the one
that was saved then.

Source: PaddleNLP 3.0.0b4, peft/lora/{lora_config,lora_model,lora_layers}.py; PaddleMIX 2.1,
paddlemix/tools/{supervised_finetune,merge_lora_params}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from weight_convert import canonical, files, lora
from weight_convert.canonical import Config
from weight_convert.cast import CODES
from weight_convert.contents import Contents
from weight_convert.dialects import hf, paddlemix, paddlenlp
from weight_convert.dialects.base import Dialect
from weight_convert.dialects.mm_settings import TOWER
from weight_convert.errors import CheckpointError
from weight_convert.mapping import NameTable
from weight_convert.source import (
    Adapter,
    Options,
    Source,
    Target,
    WeightFile,
    as_json,
    pick_files,
)
from weight_convert.storage.tensor import Tensor, few
from weight_convert.storage.tensor_parallel import open_tensor_parallel

NAME = "paddle-lora"
CONFIG_FILE, STEM, UNIFIED_STEM = "lora_config.json", "lora_model_state", "peft_model"
BASES = ("llama", "qwen2")
"""Language models, which all names but the head's begin with."""
NOT_LINEAR = (*lora.EMBEDDINGS, "language_model.lm_head")
"""Modules that are no Linear layers in PaddleNLP, which its LoRA fails on."""
BIASES = {None: "none", "lora": "lora_only", "all": "all"}
"""trainable_bias -> PEFT's `bias`."""
REFUSED = {
    "do_qat": "training with quantisation",
    "enable_lora_list": "adapters of parts of a joined matrix",
    "lora_use_mixer": "a matrix between A and B (MoSLoRA)",
    "loraga": "LoRA-GA, which changes the base",
    "use_mora": "MoRA, whose matrix is square",
}
"""Fields that, if they are set, make it something else than W + scaling * A @ B."""
DEFAULTS: Config = {
    "base_model_name_or_path": None,
    "do_qat": False,
    "dtype": None,
    "enable_lora_list": None,
    "head_dim": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_plus_scale": 1.0,
    "lora_use_mixer": False,
    "loraga": False,
    "merge_weights": False,
    "pissa": False,
    "r": 8,
    "rslora": False,
    "target_modules": None,
    "tensor_parallel_degree": -1,
    "trainable_bias": None,
    "trainable_modules": None,
    "use_mora": False,
    "use_quick_lora": False,
}
"""PaddleNLP's LoRAConfig."""

# --- names -----------------------------------------------------------------------------------


class _Names:
    """Canonical <-> stored names and orientation, of parameters and of the two matrices alike."""

    def __init__(self, table: NameTable) -> None:
        self._table = table

    def parts(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """See `lora.Parts`: the tensor is turned, as its matrix would be."""
        mapped = self._table.to_canonical({name: tensor})
        if mapped.unnamed:
            raise CheckpointError("an adapter names a tensor of no known model", given=name)
        return mapped.tensors

    def stored(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """A canonical parameter as it is stored."""
        mapped = self._table.to_stored({name: tensor})
        if mapped.unnamed:
            raise CheckpointError("PaddleMIX has no place for what the adapter holds", given=name)
        ((stored, turned),) = mapped.tensors.items()
        return stored, turned


def _names_of(stored: Iterable[str], config: Config, where: str) -> _Names:
    """The names of a file.

    Args:
        stored: names of parameters, and of modules with `.weight`.
        config: PaddleNLP's config.json, or `{}`.
        where: names the directory in errors.
    """
    stored = list(stored)
    base = next((one for one in BASES if any(n.startswith(f"{one}.") for n in stored)), BASES[0])
    qkv, ffn = paddlenlp.fused_forms(stored)
    heads = config.get("num_attention_heads", None if qkv else 1)
    kv_heads = config.get("num_key_value_heads") or heads
    if type(heads) is not int or type(kv_heads) is not int:
        raise CheckpointError(
            f"{where}: an adapter changes q, k and v in one matrix, and it is not said how they "
            "lie in it",
            expected="config.json with num_attention_heads and num_key_value_heads",
        )
    siglip = any(name.startswith(f"{base}.{TOWER}encoder.") for name in stored)
    tower = "siglip_vision_model" if siglip else "clip_vision_model"
    text = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return _Names(_table(text, base, tower, _projector_in(stored), qkv=qkv, ffn=ffn))


def _projector_in(stored: Iterable[str]) -> str:
    """linear or mlp{N}x_gelu, by any of its layers."""
    found = [re.search(r"\.mm_projector\.(?:(\d+)\.)?\w+$", name) for name in stored]
    places = [match[1] for match in found if match]
    if places and None in places:
        return "linear"
    depth = max((int(place) // 2 + 1 for place in places), default=2)
    return f"mlp{depth}x_gelu"


def _table(
    text: Config, base: str, tower: str, projector: str, *, qkv: bool = False, ffn: bool = False
) -> NameTable:
    language = paddlenlp.language_rules({**text, "tie_word_embeddings": False}, base, qkv, ffn)
    return NameTable([*language, *paddlemix.image_rules(base, tower, projector)])


def _names_for(source: Source) -> _Names:
    """The names that an adapter is written with."""
    config = source.config
    wanted = [*(f"{module}.weight" for module in source.adapter.pairs), *source.tensors]
    base, tower = BASES[0], "clip_vision_model"
    if "text_config" in config and canonical.text_config(config)["model_type"] in BASES:
        base = canonical.text_config(config)["model_type"]
    if "vision_config" in config:
        tower = canonical.vision_config(config)["model_type"]
    whole = config.get("model_type") in canonical.TOP_DEFAULTS
    projector = canonical.projector_kind(config) if whole else _kind_of_projector(wanted)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return _Names(_table(heads, base, tower, projector))


def _kind_of_projector(names: Iterable[str]) -> str:
    """linear or mlp{N}x_gelu, by canonical names."""
    layers = {name.split(".")[1] for name in names if name.startswith(canonical.PROJECTOR)}
    return "linear" if layers == {"linear_1"} else f"mlp{max(2, len(layers))}x_gelu"


# --- reading ---------------------------------------------------------------------------------


def _evidence(contents: Contents) -> str:
    weights = [name for name in contents.names if name.startswith((STEM, UNIFIED_STEM))]
    return f"{CONFIG_FILE} and {min(weights)}" if weights and CONFIG_FILE in contents.names else ""


def _read(contents: Contents, options: Options) -> Source:
    where = str(contents.path / CONFIG_FILE)
    given = contents.json(CONFIG_FILE)
    if not given:
        raise CheckpointError(f"there is no {where}", expected="a directory of PaddleNLP's LoRA")
    rank, alpha, settings = read_settings(given, where)
    kind, stored = _open(contents)
    low, whole = _sorted_out(stored)
    names = _names_of([*(f"{module}.weight" for module in low), *whole], contents.config, where)
    placed = lora.pair_up(_pairs(low), names.parts)
    pairs = {module: pair for group in placed.values() for module, pair in group.items()}
    _check_ranks(pairs, rank, where)
    config = contents.manifest.get("config") or {}
    tensors = lora.named_parts(whole, names.parts, config, options)
    memory = {"lora_config": given, "config": contents.config, "weights": kind}
    source = Source(
        NAME,
        contents.path,
        config,
        tensors,
        pick_files(contents.path, hf.SIDE_FILES),
        adapter=Adapter(rank, alpha, settings, pairs),
        notes=_notes(given),
        memory={NAME: memory},
    )
    return lora.with_base(source, options)


def read_settings(given: Config, where: str) -> tuple[int, float, Config]:
    """Rank, alpha and `Adapter.settings` from lora_config.json.

    Args:
        given: its contents.
        where: names the file.

    Raises:
        CheckpointError: what is no LoRA, or a value that cannot be.
    """
    for field, meaning in REFUSED.items():
        if given.get(field):
            raise CheckpointError(
                f"{where} asks for {meaning}, which is not supported",
                given=f"{field}: {given[field]!r}",
            )
    said = {**DEFAULTS, **given}
    rank, alpha, bias = said["r"], said["lora_alpha"], said["trainable_bias"]
    if not isinstance(bias, str | None) or bias not in BIASES:
        raise CheckpointError(
            f"{where}: trainable_bias is unknown", given=repr(bias), expected="null, lora or all"
        )
    settings = {
        "base_model_name_or_path": said["base_model_name_or_path"],
        "bias": BIASES[bias],
        "lora_dropout": said["lora_dropout"],
        "use_rslora": False if said["pissa"] else said["rslora"],
    }
    lora.check_settings(rank, alpha, settings, where)
    return rank, rank if said["pissa"] else alpha, settings


def _notes(given: Config) -> tuple[str, ...]:
    if not given.get("pissa"):
        return ()
    return (
        "the adapter was made with pissa: it belongs to the base that PaddleNLP saved when it "
        "took the adapter's beginning out of it",
    )


def _open(contents: Contents) -> tuple[str, Mapping[str, Tensor]]:
    """The format of the adapter's weights, and its tensors under their stored names."""
    if any(re.match(rf"{STEM}\.tp\d+", name) for name in contents.names):
        return "pdparams", open_tensor_parallel(contents.path, contents.config, stem=STEM)
    for kind, stem in (
        ("pdparams", STEM),
        ("safetensors", UNIFIED_STEM),
        ("pdparams", UNIFIED_STEM),
    ):
        stored = files.open_set(contents.path, kind, stem)
        if stored is not None:
            return kind, {name: _as_bfloat16(tensor) for name, tensor in stored.items()}
    raise CheckpointError(
        f"{contents.path} holds no adapter's weights",
        given=f"files: {few(sorted(contents.names))}",
        expected=f"{STEM}.pdparams or {UNIFIED_STEM}*.safetensors",
    )


def _as_bfloat16(tensor: Tensor) -> Tensor:
    """PaddleNLP writes bfloat16 into safetensors under the tag U16."""
    return replace(tensor, dtype="BF16") if tensor.dtype == "U16" else tensor


def _sorted_out(
    stored: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Stored module -> its matrices by name, and the parameters saved in full."""
    low: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for name, tensor in stored.items():
        module, _, side = name.rpartition(".")
        if side.startswith("lora_"):
            low.setdefault(module, {})[side] = tensor
        else:
            whole[name] = tensor
    return low, whole


def _pairs(low: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Stored module -> (A [r, in], B as it is stored)."""
    for module, sides in low.items():
        if sides.keys() != {"lora_A", "lora_B"}:
            raise CheckpointError(
                f"the adapter's tensors of {module} are incomplete, or of an unknown kind",
                given=few(sorted(sides)),
                expected="lora_A and lora_B",
            )
        lora.check_flat(module, sides["lora_A"], sides["lora_B"])
    if not low:
        raise CheckpointError("there are no low-rank matrices in the adapter's file")
    return {m: (lora.turned(sides["lora_A"]), sides["lora_B"]) for m, sides in low.items()}


def _check_ranks(pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, where: str) -> None:
    for module, (a, _) in pairs.items():
        if a.shape[0] != rank:
            raise CheckpointError(
                f"{where} contradicts the adapter's weights",
                given=f"rank {a.shape[0]} of {module}",
                expected=f"r {rank}",
                fix="use the file that was saved with these weights",
            )


# --- writing ---------------------------------------------------------------------------------


def _write(source: Source, options: Options) -> Target:
    adapter, kept = source.adapter, _kept(source)
    _check_held(adapter)
    names = _names_for(source)
    low: dict[str, Tensor] = {}
    modules = []
    for module, pair in adapter.pairs.items():
        for side, tensor in zip("AB", pair, strict=True):
            stored, turned = names.stored(f"{module}.weight", tensor)
            low[f"{stored.removesuffix('.weight')}.lora_{side}"] = turned
        modules.append(stored.removesuffix(".weight"))
    whole = {n: names.stored(n, tensor) for n, tensor in source.tensors.items()}
    weights, index = _weight_files({**low, **dict(whole.values())}, options, kept)
    depth = {
        _beginning(names, before, tensor): count for before, count in lora.depths(source).items()
    }
    targets = lora.patterns_of(modules, depth)
    trained = [stored for n, (stored, _) in whole.items() if _module(n) not in adapter.pairs]
    settings = _settings(source, targets, trained, kept)
    documents = {CONFIG_FILE: as_json(settings), **source.files, **index}
    if kept.get("config"):
        documents["config.json"] = as_json(kept["config"])
    return Target(NAME, weights, documents)


def _kept(source: Source) -> Config:
    """What reading remembered, unless somebody changed the manifest that it travelled in."""
    kept = source.memory.get(NAME, {})
    tables = (kept.get("lora_config"), kept.get("config"))
    sound = all(isinstance(table, dict) for table in tables)
    return kept if sound and kept.get("weights") in ("pdparams", "safetensors") else {}


def _check_held(adapter: Adapter) -> None:
    """PaddleNLP has one rank and one scaling for all modules, and adapts Linear layers alone."""
    ranks = {pair[0].shape[0] for pair in adapter.pairs.values()}
    others = [module for module in adapter.pairs if module in NOT_LINEAR]
    for what, is_there, given in (
        ("DoRA", adapter.magnitudes, f"lengths of {len(adapter.magnitudes)} modules"),
        ("updates of embeddings and of the output head", others, few(others)),
        ("several ranks", ranks != {adapter.rank}, f"ranks {sorted(ranks)}"),
        ("several alphas", adapter.alphas, f"alphas {sorted({*adapter.alphas.values()})}"),
    ):
        if is_there:
            raise CheckpointError(
                f"PaddleNLP's LoRA has no {what}",
                given=given,
                fix="merge the adapter into its model instead: --base DIR --to paddlemix",
            )


def _weight_files(
    tensors: Mapping[str, Tensor], options: Options, kept: Config
) -> tuple[tuple[WeightFile, ...], dict[str, bytes]]:
    kind = options.weights or kept.get("weights") or "pdparams"
    if kind == "pdparams":
        return (WeightFile(f"{STEM}.pdparams", kind, tensors),), {}
    if kind != "safetensors":
        raise CheckpointError(
            "PaddleNLP does not read adapters in this format",
            given=kind,
            expected="pdparams or safetensors",
        )
    # PaddleNLP's own loader finds safetensors by their index alone.
    name = f"{UNIFIED_STEM}-00001-of-00001.safetensors"
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), name),
    }
    document = {f"{UNIFIED_STEM}.safetensors.index.json": as_json(index)}
    # It refuses files that say they are torch's.
    return (WeightFile(name, kind, tensors, {"metadata": {"format": "np"}}),), document


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _beginning(names: _Names, before: str, tensor: Tensor) -> str:
    """How the stored names of layers begin, from how the canonical ones do; `tensor` is any."""
    tail = "0.self_attn.q_proj.weight"
    stored, _ = names.stored(before + tail, tensor)
    return stored.removesuffix(tail)


def _settings(source: Source, targets: list[str], trained: list[str], kept: Config) -> Config:
    """lora_config.json: as it was, if it still says what holds, else anew."""
    adapter = source.adapter
    if kept:
        said = read_settings(kept["lora_config"], CONFIG_FILE)
        if said == (adapter.rank, adapter.alpha, adapter.settings):
            return {**kept["lora_config"], "tensor_parallel_degree": -1}
    own = adapter.settings
    biases = {theirs: ours for ours, theirs in BIASES.items()}
    first = next(iter(adapter.pairs))
    settings = {
        **DEFAULTS,
        "base_model_name_or_path": own.get("base_model_name_or_path"),
        "dtype": {code: name for name, code in CODES.items()}.get(adapter.pairs[first][0].dtype),
        "lora_alpha": adapter.alpha,
        "lora_dropout": own.get("lora_dropout", 0.0),
        "r": adapter.rank,
        "rslora": own.get("use_rslora", False),
        "scaling": adapter.scaling(first),
        "target_modules": targets,
        "trainable_bias": biases.get(own.get("bias", "none")),
        "trainable_modules": [re.escape(name) for name in trained] or None,
    }
    return dict(sorted(settings.items()))


PADDLE_LORA = Dialect(
    NAME,
    "PaddleNLP LoRA directory, also PaddleMIX's with its projector; merged with --base",
    _evidence,
    _read,
    _write,
    adapters=True,
)
DIALECTS = (PADDLE_LORA,)

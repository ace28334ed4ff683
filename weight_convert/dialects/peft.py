"""PEFT's LoRA directories, alone and as LLaVA leaves them.

`adapter_config.json` and `adapter_model.safetensors` or `.bin`; LLaVA adds `config.json` and
`non_lora_trainables.bin`, with whatever else was trained (projector, newline, embeddings). Names
begin with `base_model.model.`; what follows is the name in the model that was trained: original
LLaVA or a plain LLaMA, transformers' LLaVA of any version, MOSS2 with its joined `wqkv`.

With `--base` the adapter is merged into its model while it is read, and the result is a whole
model; without it, it stays an adapter, which can be written for PEFT or PaddleNLP.

Not everything that PEFT calls LoRA is an update of one matrix: what is not is refused by name.
So are adapters that began as a part of the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ): PEFT takes
that part out of the base again when it loads them, by a decomposition that no other program
repeats bit for bit.

Source: PEFT 0.4 to 0.21, tuners/lora/{config,layer,model}.py, utils/save_and_load.py; LLaVA,
llava/train/train.py and llava/model/builder.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from weight_convert import canonical, files, lora
from weight_convert.canonical import PROJECTOR, VISION, Config
from weight_convert.contents import Contents
from weight_convert.dialects import hf, llava_config, moss2
from weight_convert.dialects.base import Dialect
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

CONFIG_FILE, STEM, BESIDE = "adapter_config.json", "adapter_model", "non_lora_trainables.bin"
PREFIX = "base_model.model."

# --- names -----------------------------------------------------------------------------------

_DEEPEST_PROJECTOR = 8
ORIGINAL: hf.Spelling = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.transformer.": "transformer.",
    "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "image_newline": "model.image_newline",
    **{
        f"{PROJECTOR}linear_{k + 1}.": f"model.mm_projector.{2 * k}."
        for k in range(_DEEPEST_PROJECTOR)
    },
}
"""Original LLaVA, and a language model alone."""
LINEAR_PROJECTOR: hf.Spelling = {**ORIGINAL, f"{PROJECTOR}linear_1.": "model.mm_projector."}
SPELLINGS: Mapping[str, hf.Spelling] = {**hf.SPELLINGS, "original": ORIGINAL}
"""What `Options.spelling` may be. PEFT saves names as they are in memory: `hub` is what it saves
with transformers before 4.52."""
NEWEST = "in memory, transformers 5"

_TO_CANONICAL = sorted(
    {
        (prefix, canonical_prefix)
        for table in (*SPELLINGS.values(), LINEAR_PROJECTOR)
        for canonical_prefix, prefix in table.items()
    },
    key=lambda pair: (-len(pair[0]), pair),
)


def canonical_name(name: str) -> str:
    """The canonical name of a parameter in any of SPELLINGS; an unknown name stays itself."""
    for prefix, meaning in _TO_CANONICAL:
        if name.startswith(prefix):
            return meaning + name[len(prefix) :]
    return name


def spelling_of(names: Iterable[str]) -> str | None:
    """Which of SPELLINGS all names are written in, None if in no single one."""
    names = list(names)
    for label, table in (*SPELLINGS.items(), ("original", LINEAR_PROJECTOR)):
        if all(hf.spelled_name(canonical_name(name), table) == name for name in names):
            return label
    return None


_OF_MOSS2 = re.compile(r"\.(?:attention|feed_forward)\.w|\.tok_embeddings\.|^output\.")


class _Names:
    """What a stored parameter is in canonical terms, in whichever spelling it is written."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def parts(self, name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        """See `lora.Parts`."""
        if not _OF_MOSS2.search(name):
            return {canonical_name(name): tensor}
        mapped = self._moss2.to_canonical({name: tensor})
        if mapped.unnamed:
            raise CheckpointError("an adapter names a tensor of no known model", given=name)
        return mapped.tensors

    @cached_property
    def _moss2(self) -> NameTable:
        """MOSS2's names: q, k and v are the rows of one matrix, laid out by the heads."""
        config = self._contents.config
        if not config:
            raise CheckpointError(
                "an adapter changes q, k and v in one matrix (wqkv), and it is not said how they "
                "lie in it",
                expected="config.json with num_attention_heads and num_key_value_heads",
                fix="put the model's config.json into the directory, as LLaVA does",
            )
        text = moss2.canonical_text(config, "float32", str(self._contents.path))
        return NameTable(moss2.rules(canonical.text_config(text)))


# --- adapter_config.json ---------------------------------------------------------------------

REFUSED = {
    "alora_invocation_tokens": "an activated LoRA, which works from some tokens on",
    "arrow_config": "Arrow, which chooses between adapters token by token",
    "kasa_config": "KaSA",
    "layer_replication": "layers that are repeated",
    "lora_bias": "a bias in lora_B",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "parameters that are no layer's weight",
    "trainable_token_indices": "single trained tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools its input",
}
"""Fields that, unless they are empty, make it something else than W + scaling * B @ A."""
STARTED_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which the base is not what it was."""


def read_settings(given: Config, where: str) -> tuple[int, float, Config]:
    """Rank, alpha and `Adapter.settings` from adapter_config.json.

    Args:
        given: its contents.
        where: names the file.

    Raises:
        CheckpointError: another kind of adapter, or a value that cannot be.
    """
    if given.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{where} is of a kind of adapter that is not supported",
            given=f"peft_type {given['peft_type']!r}",
            expected="LORA",
        )
    for field, meaning in REFUSED.items():
        if given.get(field):
            raise CheckpointError(
                f"{where} asks for {meaning}, which is not supported",
                given=f"{field}: {given[field]!r}",
            )
    start = given.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(STARTED_FROM_BASE):
        raise CheckpointError(
            f"{where}: the adapter began as a part of the base, and holds only together with "
            "what PEFT makes of the base when it loads it",
            given=f"init_lora_weights: {start!r}",
            fix="convert it to a plain LoRA with PEFT: save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…); if the base was saved without that "
            "part, set init_lora_weights to true",
        )
    rank, alpha = given.get("r", 8), given.get("lora_alpha", 8)
    settings = {
        "base_model_name_or_path": given.get("base_model_name_or_path"),
        "bias": given.get("bias", "none"),
        "lora_dropout": given.get("lora_dropout", 0.0),
        "use_rslora": given.get("use_rslora", False),
    }
    lora.check_settings(rank, alpha, settings, where)
    return rank, alpha, settings


def _of_module(patterns: Any, module: str, default: Any, where: str) -> Any:
    """The value of the first pattern that ends a stored module's name, as PEFT looks it up."""
    if not isinstance(patterns or {}, dict):
        raise CheckpointError(f"{where}: rank_pattern or alpha_pattern is no object")
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{where} holds a pattern that cannot be read", given=pattern, expected=error
            ) from None
    return default


# --- reading ---------------------------------------------------------------------------------

Low = dict[str, dict[str, Tensor]]
"""Stored module -> the adapter's own tensors, by what they are (`lora_A`, ...)."""
_LOW = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<side>lora_[AB])(?:\.[^.]+)?\.weight"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.[^.]+)?"
    r"|(?P<vector>lora_magnitude_vector)(?:\.[^.]+)?)"
)
"""The adapter's name (`default`) stands in them only if it was not PEFT that saved them."""
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[^.]+)?)(?=\.(?:weight|bias)$)")


def _evidence(contents: Contents) -> str:
    settings = contents.json(CONFIG_FILE)
    return f"{CONFIG_FILE}: peft_type {settings['peft_type']!r}" if "peft_type" in settings else ""


def _read(contents: Contents, options: Options) -> Source:
    where = str(contents.path / CONFIG_FILE)
    given = contents.json(CONFIG_FILE)
    if not given:
        raise CheckpointError(f"there is no {where}", expected="a directory that PEFT saved")
    rank, alpha, settings = read_settings(given, where)
    kind, stored = _open(contents)
    low, whole = _sorted_out(stored)
    beside = _open_beside(contents)
    names = _Names(contents)
    config = _config(contents)
    placed = lora.pair_up(_pairs(low, where), names.parts)
    adapter = Adapter(
        rank,
        alpha,
        settings,
        {module: pair for group in placed.values() for module, pair in group.items()},
        _own_alphas(given, placed, rank, alpha, where),
        _magnitudes(low, names),
    )
    # PEFT loads its own file last.
    tensors = lora.named_parts({**beside, **whole}, names.parts, config, options)
    memory = {
        "adapter_config": given,
        "beside": sorted(one for name in beside for one in names.parts(name, beside[name])),
        "config": contents.config,
        "spelling": spelling_of([*(f"{module}.weight" for module in low), *whole, *beside]),
        "weights": kind,
    }
    side_files = pick_files(contents.path, hf.SIDE_FILES)
    source = Source(
        "peft", contents.path, config, tensors, side_files, adapter=adapter, memory={"peft": memory}
    )
    return lora.with_base(source, options, _described(contents))


def _config(contents: Contents) -> Config:
    """The canonical configuration, if the directory has that of a llava-hf model.

    Original LLaVA's does not say what its vision tower is: it counts only with a base.
    """
    given = contents.config or contents.manifest.get("config") or {}
    return given if {"model_type", "text_config", "vision_config"} <= given.keys() else {}


def _described(contents: Contents) -> Config | None:
    """config.json, if it is original LLaVA's."""
    given, listed = contents.config, contents.config.get("architectures")
    named = [*(listed if isinstance(listed, list) else ()), given.get("model_type")]
    known = any(isinstance(name, str) and name in llava_config.KINDS for name in named)
    return given if known and any(key.startswith("mm_") for key in given) else None


def _open(contents: Contents) -> tuple[str, Mapping[str, Tensor]]:
    """The format of the adapter's weights, and its tensors under their stored names."""
    for kind in ("safetensors", "bin"):
        stored = files.open_set(contents.path, kind, STEM)
        if stored is not None:
            return kind, stored
    raise CheckpointError(
        f"{contents.path} holds no adapter's weights",
        given=f"files: {few(sorted(contents.names))}",
        expected=f"{STEM}.safetensors or {STEM}.bin",
    )


def _open_beside(contents: Contents) -> dict[str, Tensor]:
    path = contents.path / BESIDE
    return _unwrapped(files.open_file(path)) if path.is_file() else {}


def _unwrapped(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the model itself. LLaVA's loader also takes those that lack `base_model.`."""
    again = "model." if any(name.startswith("model.model.") for name in stored) else ""
    return {
        _WRAPPER.sub("", name.removeprefix(PREFIX if name.startswith(PREFIX) else again)): tensor
        for name, tensor in stored.items()
        if ".original_module." not in name
    }


def _sorted_out(stored: Mapping[str, Tensor]) -> tuple[Low, dict[str, Tensor]]:
    """The adapter's own tensors, and those saved in full, with the names of the model."""
    low: Low = {}
    whole = {}
    for name, tensor in _unwrapped(stored).items():
        match = _LOW.fullmatch(name)
        if match:
            what = match["side"] or match["embedding"] or match["vector"]
            parts = low.setdefault(match["module"], {})
            if what in parts:
                raise CheckpointError(
                    f"there are several adapters in one file: {match['module']} has two {what}",
                    fix="save them one by one with PEFT",
                )
            parts[what] = tensor
        elif ".lora_" in name or ".token_adapter." in name:
            raise CheckpointError("an adapter's tensor is of an unknown kind", given=name)
        else:
            whole[name] = tensor
    return low, whole


def _pairs(low: Low, where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Stored module -> (A, B), those of embeddings turned to the orientation of their matrix."""
    pairs = {}
    for module, parts in low.items():
        held = parts.keys() - {"lora_magnitude_vector"}
        if held == {"lora_A", "lora_B"}:
            pairs[module] = parts["lora_A"], parts["lora_B"]
        elif held == {"lora_embedding_A", "lora_embedding_B"} and held == parts.keys():
            a, b = parts["lora_embedding_B"], parts["lora_embedding_A"]
            pairs[module] = lora.turned(a), lora.turned(b)
        else:
            raise CheckpointError(
                f"the adapter's tensors of {module} are incomplete, or of an unknown kind",
                given=few(sorted(parts)),
                expected="lora_A and lora_B (with lora_magnitude_vector for DoRA), or "
                "lora_embedding_A and lora_embedding_B",
            )
    if not pairs:
        raise CheckpointError(f"there are no low-rank matrices beside {where}")
    return pairs


def _own_alphas(
    given: Config,
    placed: Mapping[str, Mapping[str, Any]],
    rank: int,
    alpha: float,
    where: str,
) -> dict[str, float]:
    """Canonical module -> alpha, where it has one of its own; ranks are held to the tensors."""
    own = {}
    for stored, group in placed.items():
        expected = _of_module(given.get("rank_pattern"), stored, rank, where)
        value = _of_module(given.get("alpha_pattern"), stored, alpha, where)
        lora.check_numbers(expected, value, where)
        found = next(iter(group.values()))[0].shape[0]
        if found != expected:
            raise CheckpointError(
                f"{where} contradicts the adapter's weights",
                given=f"rank {found} of {stored}",
                expected=f"{expected}, by r and rank_pattern",
                fix="use the file that was saved with these weights",
            )
        if value != alpha:
            own |= dict.fromkeys(group, value)
    return own


def _magnitudes(low: Low, names: _Names) -> dict[str, Tensor]:
    """DoRA's lengths by canonical module."""
    vectors = {}
    for stored, parts in low.items():
        vector = parts.get("lora_magnitude_vector")
        if vector is None:
            continue
        if vector.shape != parts["lora_B"].shape[:1]:
            raise CheckpointError(
                f"DoRA's lengths of {stored} do not fit its rows",
                given=f"{list(vector.shape)}, lora_B {list(parts['lora_B'].shape)}",
            )
        for name, part in names.parts(f"{stored}.weight", vector).items():
            vectors[name.removesuffix(".weight")] = part
    return vectors


# --- writing ---------------------------------------------------------------------------------

PORTABLE = {
    "language_model.model.": r"(?:.*\.)?language_model\.(?:model\.)?",
    "language_model.lm_head": r"(?:.*\.)?lm_head",
    VISION: r"(?:.*\.)?vision_tower\.(?:vision_model\.)?",
    PROJECTOR: r"(?:.*\.)?multi_modal_projector\.",
}
"""Canonical beginnings of names -> what matches them in every version of transformers, so that
the same adapter_config.json serves all of them."""


def _write(source: Source, options: Options) -> Target:
    adapter, kept = source.adapter, _kept(source)
    spelling = options.spelling or kept.get("spelling") or NEWEST
    stored = _stored_names(source, spelling)
    beside = _is_beside(source, spelling, kept)
    low = _low_tensors(adapter, stored)
    whole = {PREFIX + _in_wrapper(stored[n], n, adapter): n for n in source.tensors}
    inside = {name: source.tensors[n] for name, n in whole.items() if n not in beside}
    outside = {PREFIX + stored[n]: source.tensors[n] for n in source.tensors if n in beside}
    kind = options.weights or kept.get("weights") or "safetensors"
    weights = [WeightFile(f"{STEM}{files.FORMATS[kind].suffix}", kind, {**low, **inside})]
    weights += [WeightFile(BESIDE, "bin", outside)] if outside else []
    settings = _settings(source, spelling, kept, [n for n in source.tensors if n not in beside])
    documents = {CONFIG_FILE: as_json(settings), **source.files}
    if kept.get("config"):
        documents["config.json"] = as_json(kept["config"])
    return Target("peft", tuple(weights), documents)


def _kept(source: Source) -> Config:
    """What reading remembered, unless somebody changed the manifest that it travelled in."""
    kept = source.memory.get("peft", {})
    beside = kept.get("beside")
    sound = (
        isinstance(kept.get("adapter_config"), dict)
        and isinstance(kept.get("config"), dict)
        and isinstance(beside, list)
        and all(isinstance(name, str) for name in beside)
        and kept.get("spelling") in (None, *SPELLINGS)
        and kept.get("weights") in ("safetensors", "bin")
    )
    return kept if sound else {}


def _stored_names(source: Source, spelling: str) -> dict[str, str]:
    """Canonical parameter -> its name in the model, for all that the adapter touches."""
    if spelling not in SPELLINGS:
        raise CheckpointError(
            "peft has no such names", given=spelling, expected=f"one of {', '.join(SPELLINGS)}"
        )
    table = SPELLINGS[spelling]
    wanted = [*(f"{module}.weight" for module in source.adapter.pairs), *source.tensors]
    if spelling == "original" and _has_linear_projector(source.config, wanted):
        table = LINEAR_PROJECTOR
    return {name: hf.spelled_name(name, table) for name in wanted}


def _has_linear_projector(config: Config, names: Iterable[str]) -> bool:
    """Whether the projector is one Linear, which has another name than the first of several."""
    if config.get("model_type") in canonical.TOP_DEFAULTS:
        return canonical.projector_kind(config) == "linear"
    layers = {name.split(".")[1] for name in names if name.startswith(PROJECTOR)}
    return layers == {"linear_1"}


def _is_beside(source: Source, spelling: str, kept: Config) -> set[str]:
    """Canonical names of what goes into non_lora_trainables.bin.

    LLaVA's loader wants everything there that is no adapter; PEFT's own loads only what belongs
    to a module, from its own file.
    """
    if kept and spelling == kept.get("spelling"):
        return set(kept["beside"])
    if spelling == "original":
        return set(source.tensors)
    return {name for name in source.tensors if not name.endswith((".weight", ".bias"))}


def _in_wrapper(stored: str, name: str, adapter: Adapter) -> str:
    """PEFT puts the module that it adapts into a wrapper, as `base_layer`."""
    module, _, kind = name.rpartition(".")
    if module not in adapter.pairs:
        return stored
    return f"{stored.removesuffix(f'.{kind}')}.base_layer.{kind}"


def _low_tensors(adapter: Adapter, stored: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = {}
    for module, (a, b) in adapter.pairs.items():
        name = PREFIX + stored[f"{module}.weight"].removesuffix(".weight")
        if module in lora.EMBEDDINGS:
            tensors[f"{name}.lora_embedding_A"] = lora.turned(b)
            tensors[f"{name}.lora_embedding_B"] = lora.turned(a)
        else:
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        if module in adapter.magnitudes:
            tensors[f"{name}.lora_magnitude_vector"] = adapter.magnitudes[module]
    return tensors


def _settings(source: Source, spelling: str, kept: Config, inside: Iterable[str]) -> Config:
    """adapter_config.json: as it was, if it still says what holds, else anew.

    Written anew, it has the fields that every PEFT since 0.4 (LLaVA-1.5's) knows, and later ones
    only where they say something: older versions fail on fields that they do not know.
    """
    adapter = source.adapter
    if kept and spelling == kept.get("spelling"):
        said = read_settings(kept["adapter_config"], CONFIG_FILE)
        if said == (adapter.rank, adapter.alpha, adapter.settings):
            return kept["adapter_config"]
    own = adapter.settings
    expression = "|".join(_patterns(source, spelling, adapter.pairs))
    settings: Config = {
        "auto_mapping": None,
        "base_model_name_or_path": own.get("base_model_name_or_path"),
        "bias": own.get("bias", "none"),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": adapter.alpha,
        "lora_dropout": own.get("lora_dropout", 0.0),
        "modules_to_save": _modules_to_save(inside, adapter) or None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "revision": None,
        "target_modules": expression,
        "task_type": "CAUSAL_LM",
    }
    ranks = {module: pair[0].shape[0] for module, pair in adapter.pairs.items()}
    later = {
        "alpha_pattern": _by_value(source, spelling, adapter.alphas),
        "rank_pattern": _by_value(
            source, spelling, {m: rank for m, rank in ranks.items() if rank != adapter.rank}
        ),
        "use_dora": bool(adapter.magnitudes),
        "use_rslora": own.get("use_rslora", False),
    }
    return dict(sorted({**settings, **{key: v for key, v in later.items() if v}}.items()))


def _patterns(source: Source, spelling: str, modules: Iterable[str]) -> list[str]:
    """Expressions for exactly these modules, as they are named in a spelling."""
    depth = lora.depths(source)
    if spelling != "original":
        return lora.patterns_of(modules, depth, PORTABLE)
    stored = _stored_names(source, spelling)
    inner = {hf.spelled_name(before, ORIGINAL): count for before, count in depth.items()}
    names = [stored[f"{module}.weight"].removesuffix(".weight") for module in modules]
    return lora.patterns_of(names, inner)


def _by_value(source: Source, spelling: str, values: Mapping[str, Any]) -> Config:
    """Pattern -> value. PEFT lets any name stand before what the pattern matches."""
    modules: dict[Any, list[str]] = {}
    for module, value in values.items():
        modules.setdefault(value, []).append(module)
    return {"|".join(_patterns(source, spelling, group)): v for v, group in modules.items()}


_LEADING = re.compile(r"^(?:language_model\.(?:model\.)?|vision_tower\.vision_model\.)")
"""What differs between versions of transformers."""


def _modules_to_save(names: Iterable[str], adapter: Adapter) -> list[str]:
    """The modules of tensors that are saved in full; PEFT goes by the end of their names."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    chosen = []
    for module in modules:
        if module in adapter.pairs:
            continue
        if module.startswith(PROJECTOR):
            chosen.append(PROJECTOR.removesuffix("."))
        else:
            chosen.append(_LEADING.sub("", module))
    return sorted(set(chosen))


PEFT = Dialect(
    "peft",
    "PEFT LoRA directory, also with LLaVA's non_lora_trainables.bin; merged with --base",
    _evidence,
    _read,
    _write,
    adapters=True,
)
DIALECTS = (PEFT,)

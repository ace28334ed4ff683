"""Low-rank adapters in canonical terms: put together, described, and merged into their model.

Merging is arithmetic on one matrix after the other: W + scaling * B @ A, with DoRA's lengths if
there are any, in float64, by blocks of rows, rounded to float32 and then to the dtype that is
stored. So the result is the same on every machine, which no float32 product is: each library adds
in an order of its own. PEFT multiplies in float32; what it gives differs from this by its own
rounding, and is equal to it when PEFT is run in float64.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from weight_convert import canonical
from weight_convert.blocks import for_blocks
from weight_convert.canonical import (
    EMBEDDING,
    HEAD,
    NEWLINE,
    PARTS,
    PROJECTOR,
    TOP_DEFAULTS,
    Config,
    expected_names,
    is_buffer,
    part_of,
)
from weight_convert.cast import CODES, cast, from_float, to_float
from weight_convert.contents import Replaced
from weight_convert.dialects import llava_config, original
from weight_convert.dialects.base import check_complete, to_stored
from weight_convert.dialects.configs import restored
from weight_convert.dialects.vocabulary import MATRICES, grow, rows_of, trim
from weight_convert.errors import CheckpointError
from weight_convert.mapping import TRANSPOSE, derive
from weight_convert.opening import open_source
from weight_convert.source import Adapter, Options, Source, describe_parts, matches
from weight_convert.storage.tensor import FLOATS, NUMPY_DTYPES, Tensor, few

Parts = Callable[[str, Tensor], Mapping[str, Tensor]]
"""(stored name, tensor) -> canonical name -> what of the tensor belongs there: several where a
layout joins the rows of several matrices. Raises CheckpointError for a name without a rule."""

MODULES = re.compile(
    r"language_model\.(?:"
    r"lm_head|model\.embed_tokens"
    r"|model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    r"|transformer\.(?:wte|blocks\.\d+\.(?:attn\.(?:Wqkv|out_proj)|ffn\.(?:up|down)_proj)))"
    r"|vision_tower\.vision_model\.encoder\.layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
    r"|multi_modal_projector\.linear_\d+"
)
"""Canonical modules whose weight is a matrix to which an update can be added."""
BEGINNINGS = (
    "language_model.",
    canonical.VISION,
    f"{canonical.PROJECTOR}linear_",
    canonical.NEWLINE,
)
"""Of all canonical names."""
EMBEDDINGS = ("language_model.model.embed_tokens", "language_model.transformer.wte")
"""Those of them that are looked up rather than multiplied with."""


# --- putting together ------------------------------------------------------------------------


def pair_up(
    low: Mapping[str, tuple[Tensor, Tensor]], parts: Parts
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Stored module -> canonical modules that it stands for -> (A, B).

    Where a layout joins the rows of several matrices (q, k and v), B is cut like them and A is
    shared: the update of a row is that row of B times all of A.

    Args:
        low: stored module -> (A [r, in], and B as the layout stores a matrix [out, r]).
        parts: of the layout; asked for `MODULE.weight` with B.

    Raises:
        CheckpointError: a module that no LLaVA has, or matrices that do not belong together.
    """
    placed: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    seen: set[str] = set()
    for stored, (a, b) in low.items():
        check_flat(stored, a, b)
        made = parts(f"{stored}.weight", b).items()
        placed[stored] = {name.removesuffix(".weight"): (a, part) for name, part in made}
        for module, (_, part) in placed[stored].items():
            _check_pair(stored, a, part)
            if not MODULES.fullmatch(module):
                raise CheckpointError(
                    "an adapter changes a module that no low-rank matrix can be added to",
                    given=stored,
                    expected="Linear and embedding layers of a LLaVA",
                )
            if module in seen:
                raise CheckpointError(f"an adapter has two updates of one module: {module}")
            seen.add(module)
    return placed


def turned(tensor: Tensor) -> Tensor:
    """A matrix, transposed lazily."""
    return TRANSPOSE.to_stored([tensor])[0]


def named_parts(
    tensors: Mapping[str, Tensor], parts: Parts, config: Config, options: Options
) -> dict[str, Tensor]:
    """Tensors that an adapter saved in full, under canonical names.

    Args:
        tensors: stored name -> tensor; buffers are left out.
        parts: of the layout.
        config: canonical; if it is not empty, only what it describes may be there.
        options: `allow_unused`, of stored names.

    Raises:
        CheckpointError: a tensor that no rule names, or that the configuration has no place for.
    """
    wanted = {n: t for n, t in tensors.items() if not is_buffer(n)}
    placed: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        if matches(name, options.allow_unused):
            continue
        for one, part in parts(name, tensor).items():
            if one in placed:
                raise CheckpointError(f"an adapter holds one tensor twice: {one}", given=name)
            placed[one] = part
    known = set(expected_names(config)) if config.get("model_type") in TOP_DEFAULTS else None
    odd = [n for n in placed if (n not in known if known else not n.startswith(BEGINNINGS))]
    if odd:
        raise CheckpointError(
            "an adapter holds whole tensors that its model has no place for",
            given=few(odd),
            fix="if they may be left out, say so: --allow-unused PATTERN",
        )
    return placed


def check_flat(module: str, a: Tensor, b: Tensor) -> None:
    """Refuse matrices without rows or columns.

    Raises:
        CheckpointError: says how that comes.
    """
    for tensor in (a, b):
        if not all(tensor.shape) or len(tensor.shape) < 2:
            raise CheckpointError(
                f"the low-rank matrices of {module} are empty or flat",
                given=f"A {list(a.shape)}, B {list(b.shape)}",
                fix="they were saved before DeepSpeed ZeRO-3 or FSDP had gathered them; save the "
                "adapter again with gathering",
            )


def _check_pair(module: str, a: Tensor, b: Tensor) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"the low-rank matrices of {module} do not belong together",
            given=f"A {list(a.shape)}, B {list(b.shape)}",
            expected="A [r, in] and B [out, r]; convolutions are not supported",
        )


# --- settings --------------------------------------------------------------------------------

BIASES = ("none", "all", "lora_only")
"""PEFT's `bias`: which biases are trained and saved in full."""
LARGEST_ALPHA = 1e30


def check_numbers(rank: Any, alpha: Any, where: str) -> None:
    """Refuse a rank or an alpha that cannot be.

    Raises:
        CheckpointError: names the file `where`.
    """
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{where}: r is not a rank", given=repr(rank))
    if type(alpha) not in (int, float) or not abs(alpha) < LARGEST_ALPHA:
        raise CheckpointError(f"{where}: lora_alpha is not a number", given=repr(alpha))


def check_settings(rank: Any, alpha: Any, settings: Config, where: str) -> None:
    """Refuse a rank, an alpha or `Adapter.settings` that cannot be.

    Raises:
        CheckpointError: names the file `where`, and the field in PEFT's terms.
    """
    check_numbers(rank, alpha, where)
    dropout, base = settings["lora_dropout"], settings["base_model_name_or_path"]
    for key, fits in (
        ("lora_dropout", type(dropout) in (int, float) and 0 <= dropout <= 1),
        ("base_model_name_or_path", isinstance(base, str | None)),
        ("bias", settings["bias"] in BIASES),
        ("use_rslora", isinstance(settings["use_rslora"], bool)),
    ):
        if not fits:
            raise CheckpointError(
                f"{where}: {key} has a value that cannot be", given=repr(settings[key])
            )


# --- describing ------------------------------------------------------------------------------

_LAYER = re.compile(r"(.*\.(?:layers|blocks)\.)(\d+)\.(.+)")


def patterns_of(
    modules: Iterable[str], depth: Mapping[str, int], prefixes: Mapping[str, str] | None = None
) -> list[str]:
    """Regular expressions that match exactly these stored module names, and few of them.

    Args:
        modules: stored names.
        depth: what stands before a layer's number -> how many layers there are; where it is not
            known, the numbers are listed.
        prefixes: beginnings of names -> expressions to write for them.
    """
    layers: dict[tuple[str, str], list[int]] = {}
    single = []
    for name in modules:
        match = _LAYER.fullmatch(name)
        if match:
            layers.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            single.append(name)
    groups: dict[tuple[str, str], list[str]] = {}
    for (before, after), numbers in layers.items():
        whole = set(numbers) == set(range(depth.get(before, 0)))
        which = r"\d+" if whole else _any_of(map(str, sorted(numbers)))
        groups.setdefault((before, which), []).append(re.escape(after))
    written = prefixes or {}
    return [
        *(
            f"{_begin(before, written)}{which}\\.{_any_of(after)}"
            for (before, which), after in groups.items()
        ),
        *(_begin(name, written) for name in single),
    ]


def _any_of(choices: Iterable[str]) -> str:
    choices = list(choices)
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"


def _begin(name: str, written: Mapping[str, str]) -> str:
    for prefix, expression in written.items():
        if name.startswith(prefix):
            return expression + re.escape(name[len(prefix) :])
    return re.escape(name)


def depths(source: Source) -> dict[str, int]:
    """Canonical beginning of the names of layers -> how many there are, as far as that is known.

    From the configuration, else from the config.json that lay beside the adapter.
    """
    found = {}
    if "text_config" in source.config:
        text = canonical.text_config(source.config)
        mpt = text["model_type"] == "mpt"
        before = "transformer.blocks." if mpt else "model.layers."
        found[canonical.LANGUAGE + before] = text["n_layers" if mpt else "num_hidden_layers"]
    else:
        beside = [kept.get("config") for kept in source.memory.values()]
        counts = [one.get("num_hidden_layers") for one in beside if isinstance(one, dict)]
        found |= {f"{canonical.LANGUAGE}model.layers.": n for n in counts if type(n) is int}
    if "vision_config" in source.config:
        count = canonical.vision_config(source.config)["num_hidden_layers"]
        found[f"{canonical.VISION}encoder.layers."] = count
    return found


# --- merging ---------------------------------------------------------------------------------


def with_base(adapter: Source, options: Options, described: Config | None = None) -> Source:
    """The adapter merged into the checkpoint that `--base` names; itself, if none is named.

    Args:
        adapter: a source with `adapter`.
        options: see `merge`.
        described: config.json of original LLaVA, if the adapter's directory has one.

    Raises:
        CheckpointError: see `merge`; or the base cannot be opened.
    """
    if options.base is None:
        return adapter
    base = open_source(options.base, replace(options, base=None))
    return merge(adapter, base, options, described)


def merge(
    adapter: Source, base: Source, options: Options, described: Config | None = None
) -> Source:
    """The model that an adapter makes of its base; nothing is computed before it is written.

    Tensors saved in full beside the adapter replace those of the base. Everything takes the
    dtype of the base, as it does when PEFT or LLaVA load it, or the one of `options`.

    Args:
        adapter: a source with `adapter`.
        base: the model that it was trained on; or the language model alone, if projector and
            configuration are with the adapter and the vision tower is named by `options`.
        options: `dtype`, `vision`, `allow_missing` and `allow_unused` matter here.
        described: config.json of original LLaVA that says what the result is.

    Raises:
        CheckpointError: a module or tensor of the adapter has no counterpart in the base, or
            another shape; or the result is no complete model.
    """
    low = adapter.adapter
    if low is None or base.adapter is not None:
        raise CheckpointError(
            "merging takes an adapter and a whole model",
            given=f"{adapter.path}: {_kind(adapter)}; {base.path}: {_kind(base)}",
        )
    whole = base.config.get("model_type") in TOP_DEFAULTS
    grown = _has_rows_too_many(adapter, base, described)
    plain = trim(base) if grown else base
    code = CODES[options.dtype] if options.dtype else _dtype_of(base)
    saved = {name: cast(tensor, code) for name, tensor in adapter.tensors.items()}
    held = {**plain.tensors, **saved}
    _check_targets(low, held, base)
    tensors = {**held, **_updated(low, held, CODES.get(options.dtype or ""))}
    _check_projector(adapter, tensors, base.config if whole else described)
    if described:
        described = {**described, **_facts(tensors, code)}
    if described and not whole:
        source = _as_original(adapter, plain, tensors, described, options)
    else:
        source = _as_base(adapter, plain, tensors, described)
        source = grow(source) if grown else source
        _check_whole(source, options)
    return replace(
        source,
        dialect=adapter.dialect,
        path=adapter.path,
        notes=(*base.notes, _report(low, adapter, base)),
    )


def _has_rows_too_many(adapter: Source, base: Source, described: Config | None) -> bool:
    """Whether the adapter belongs to the base as it was before tokens were added to it."""
    if base.vocabulary is None:
        return False
    pairs = adapter.adapter.pairs.items()
    rows = {b.shape[0] for module, (_, b) in pairs if f"{module}.weight" in MATRICES}
    rows |= {t.shape[0] for name, t in adapter.tensors.items() if name in MATRICES}
    return base.vocabulary.rows in rows if rows else described is not None


def _facts(tensors: Mapping[str, Tensor], code: str) -> Config:
    """What the tensors say, and not always config.json."""
    facts: Config = {"torch_dtype": next((n for n, c in CODES.items() if c == code), "float32")}
    if EMBEDDING in tensors:
        facts["vocab_size"] = tensors[EMBEDDING].shape[0]
    return facts


def _as_original(
    adapter: Source,
    base: Source,
    tensors: Mapping[str, Tensor],
    described: Config,
    options: Options,
) -> Source:
    """The directory that original LLaVA would have saved after merging, read as such."""
    layers = [name for name in tensors if re.fullmatch(rf"{PROJECTOR}linear_\d+\.weight", name)]
    kind = "linear" if len(layers) == 1 else f"mlp{len(layers)}x_gelu"
    stored, _ = to_stored(tensors, original.table(kind if layers else "identity"), options)
    side = {**base.files, **adapter.files}
    contents = Replaced(adapter.path, stored, described, side)
    return original.DIALECTS[0].read(contents, replace(options, base=None))


def _as_base(
    adapter: Source, base: Source, tensors: Mapping[str, Tensor], described: Config | None
) -> Source:
    """The base with other tensors; its configuration with what `described` says otherwise."""
    config = base.config
    if described:
        facts = llava_config.facts_of(config)
        stored = llava_config.stored_config(config, "", inside=True)
        before = llava_config.canonical_config(stored, facts, str(base.path))
        facts = replace(facts, newline=NEWLINE in tensors)
        now = llava_config.canonical_config(described, facts, str(adapter.path))
        config = restored(config, before, now)
    elif EMBEDDING in tensors and "text_config" in config:
        rows = tensors[EMBEDDING].shape[0]
        config = {**config, "text_config": {**config["text_config"], "vocab_size": rows}}
    return replace(base, config=config, tensors=tensors, files={**base.files, **adapter.files})


def _check_whole(source: Source, options: Options) -> None:
    whole = source.config.get("model_type") in TOP_DEFAULTS
    parts = PARTS if whole else sorted(source.parts)
    check_complete(source.tensors, source.config, parts, options)
    rows_of(source)


def _kind(source: Source) -> str:
    return "an adapter" if source.adapter else describe_parts(source.parts)


def _dtype_of(base: Source) -> str:
    """The dtype code of the base's language model."""
    codes = [t.dtype for n, t in base.tensors.items() if part_of(n) == "language"]
    return next((code for code in codes if code in FLOATS), "F32")


def _check_targets(low: Adapter, held: Mapping[str, Tensor], base: Source) -> None:
    """Every update has its matrix: an adapter of which nothing fits must not pass for merged."""
    absent = [module for module in low.pairs if f"{module}.weight" not in held]
    if absent:
        names = list(held)
        near = difflib.get_close_matches(f"{absent[0]}.weight", names, 1, 0.6)
        tied = any(f"{module}.weight" == HEAD for module in absent) and EMBEDDING in held
        raise CheckpointError(
            f"{len(absent)} of the adapter's {len(low.pairs)} modules are not in {base.path}",
            given=few(absent) + (f" (nearest: {near[0]})" if near else ""),
            expected=f"the model that it was trained on; this one has {describe_parts(base.parts)}",
            fix="the base's head is its embedding matrix (tie_word_embeddings), which an update "
            "of the head alone would part from it; untie it first"
            if tied
            else "name the right model with --base",
        )
    for module, (a, b) in low.pairs.items():
        weight = held[f"{module}.weight"]
        if weight.shape != (b.shape[0], a.shape[1]) or weight.dtype not in FLOATS:
            raise CheckpointError(
                f"the adapter's update of {module} does not fit {base.path}",
                given=f"B @ A {[b.shape[0], a.shape[1]]}, base {weight.dtype} {list(weight.shape)}",
                expected="one shape, and a base that is not quantised",
                fix="name the model that the adapter was trained on with --base",
            )


def _updated(low: Adapter, held: Mapping[str, Tensor], code: str | None) -> dict[str, Tensor]:
    return {
        f"{module}.weight": merged(
            held[f"{module}.weight"],
            pair,
            low.scaling(module),
            low.magnitudes.get(module),
            code or held[f"{module}.weight"].dtype,
        )
        for module, pair in low.pairs.items()
    }


def merged(
    weight: Tensor,
    pair: tuple[Tensor, Tensor],
    scaling: float,
    magnitude: Tensor | None = None,
    dtype: str | None = None,
) -> Tensor:
    """W + scaling * B @ A, lazily; with `magnitude`, its rows stretched to those lengths (DoRA).

    Args:
        weight: W [out, in].
        pair: A [r, in] and B [out, r].
        scaling: a number.
        magnitude: [out].
        dtype: code of the result; that of `weight` if absent.
    """
    inputs = [weight, *pair, *([magnitude] if magnitude else [])]
    code = dtype or weight.dtype
    final = np.float64 if code == "F64" else np.float32

    def add(*arrays: np.ndarray) -> np.ndarray:
        values_OI = arrays[0]
        a_RI, b_OR, *lengths_O = (
            to_float(array, tensor.dtype).astype(np.float64)
            for array, tensor in zip(arrays[1:], inputs[1:], strict=True)
        )
        result_OI = np.empty(weight.shape, NUMPY_DTYPES[code])

        def work(rows: slice) -> None:
            sum_XI = b_OR[rows] @ a_RI
            sum_XI *= scaling
            sum_XI += to_float(values_OI[rows], weight.dtype)
            if lengths_O:
                with np.errstate(divide="ignore", invalid="ignore"):
                    sum_XI *= (lengths_O[0][rows] / np.linalg.norm(sum_XI, axis=1))[:, None]
            result_OI[rows] = from_float(sum_XI.astype(final, copy=False), code)

        for_blocks(*weight.shape, work)
        return result_OI

    how = f"+ {scaling:g} B A" if magnitude is None else f"DoRA, {scaling:g} B A"
    return derive(inputs, weight.shape, add, how, code)


def _check_projector(adapter: Source, tensors: Mapping[str, Tensor], config: Config | None) -> None:
    """The projector and what says that there is one come together.

    LLaVA's loader goes on with a random projector if the file with it is not there.
    """
    held = any(name.startswith(PROJECTOR) for name in tensors)
    if held and not config:
        raise CheckpointError(
            f"{adapter.path} holds a projector, and the base is a language model alone",
            expected="the config.json of a LLaVA beside the adapter, or a LLaVA as the base",
            fix="copy the config.json that training wrote into the adapter's directory",
        )
    if held or not config:
        return
    kind = config.get("mm_projector_type") or canonical.projector_kind(config)
    if kind != "identity":
        raise CheckpointError(
            f"the projector is neither in the base nor in {adapter.path}",
            given=f"projector {kind}",
            fix="intermediate checkpoints of LLaVA lack non_lora_trainables.bin: take it from "
            "the end of the run, or name a base that has the projector",
        )


def _report(low: Adapter, adapter: Source, base: Source) -> str:
    scalings = sorted({round(low.scaling(module), 6) for module in low.pairs})
    kind = "DoRA" if low.magnitudes else "LoRA"
    return (
        f"{kind}: {len(low.pairs)} modules of {adapter.path.name} merged into {base.path.name} "
        f"(scaling {few(map(str, scalings))}); {len(adapter.tensors)} tensors replaced"
    )

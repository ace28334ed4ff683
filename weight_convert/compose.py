"""A LLaVA from a vision tower, a language model and a projector: what stage 1 starts from.

Nothing of the parts changes. New are the projector and the newline, if they are not given, and the
rows of the vocabulary for the tokens of images and padding (`dialects.vocabulary`). New weights
follow from the seed and the tensor's name alone, on every machine and with every version of
NumPy: they come from the Mersenne twister, whose numbers NumPy never changes (NEP 19).

Source: torch.nn.Linear.reset_parameters; haotian-liu/LLaVA, llava/model/llava_arch.py.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weight_convert import canonical
from weight_convert.canonical import LANGUAGE, NEWLINE, PARTS, PROJECTOR, VISION, Config
from weight_convert.cast import CODES, cast_all, dtype_name, from_float
from weight_convert.dialects.assembly import (
    KIND,
    Design,
    check_design,
    processor_files,
    whole_config,
)
from weight_convert.dialects.base import check_complete
from weight_convert.dialects.clip import image_processor, tower_processor
from weight_convert.dialects.language import SIDE_FILES
from weight_convert.dialects.vocabulary import grow, trim
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Content, Options, Source, describe_parts
from weight_convert.storage.tensor import Tensor

MAX_SEED = 2**32 - 1


def compose(
    *,
    vision: str | Path,
    language: str | Path,
    projector: str | Path = "mlp2x_gelu",
    family: str = "llava",
    image_mode: str | None = None,
    feature_layer: int | tuple[int, ...] | None = None,
    strategy: str | None = None,
    template: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    options: Options | None = None,
) -> Source:
    """Put a model together. No tensor is read.

    Args:
        vision: a CLIP or SigLIP, or any checkpoint with a vision tower.
        language: a language model of the LLaMA family, or any checkpoint with one. Its tokenizer
            becomes the model's.
        projector: a checkpoint with a projector (`mm_projector.bin`, …), or the kind of a new one:
            identity, linear, mlp2x_gelu, mlp3x_gelu, …
        family: llava, llava_next or llava_next_video.
        image_mode: square, pad or anyres; the family's usual one if absent.
        feature_layer: which hidden states of the tower are projected. If absent, what the
            projector was trained on, as far as it says; else -2.
        strategy: default (without the class token) or full. If absent, as before; else what suits
            the tower.
        template: name of a conversation template, for config.json.
        seed: of new weights, 0 to 2**32 - 1.
        dtype: float32, float16 or bfloat16, for all tensors. If absent, each part keeps its own,
            and new ones get the language model's.
        options: how the parts are opened.

    Returns:
        A source of the whole model; `convert.plan(source, "hf", directory)` writes it.

    Raises:
        CheckpointError: a part cannot be opened or is not what it should be, the parts do not fit
            together, or a choice that there is not.
    """
    options = options or Options()
    text, tower = _open(language, "language", options), _open(vision, "vision", options)
    given = _open(projector, "projector", options) if _is_place(projector) else None
    design = Design(
        family=family,
        projector=str(projector) if given is None else _kind_of(given),
        projector_bias=given is None or f"{PROJECTOR}linear_1.bias" in given.tensors,
        image_mode=image_mode,
        feature_layer=_chosen(feature_layer, given, "vision_feature_layer", -2),
        strategy=_chosen(strategy, given, "vision_feature_select_strategy", None),
        template=template,
    )
    check_design(design)
    config = whole_config(design, text.config, tower.config)
    tensors = {
        **{name: t for name, t in tower.tensors.items() if name.startswith(VISION)},
        **_projector(config, given, seed),
        **{name: t for name, t in text.tensors.items() if name.startswith(LANGUAGE)},
    }
    if dtype is not None:
        tensors = cast_all(tensors, dtype_name(dtype))
        config = canonical.with_dtype(config, dtype_name(dtype))
    source = grow(
        Source(
            "parts",
            text.path,
            config,
            tensors,
            _files(config, text, tower),
            dropped=(*tower.dropped, *text.dropped, *_unused(given, tensors)),
            memory={**_only(tower.memory, "clip", "siglip"), **_only(text.memory, "llama")},
        )
    )
    check_complete(source.tensors, source.config, PARTS, options)
    return source


def _is_place(projector: str | Path) -> bool:
    """Whether a checkpoint is meant; a kind of projector is a text that names no file."""
    known = KIND.fullmatch(str(projector)) is not None
    return isinstance(projector, Path) or (not known and Path(projector).exists())


def _chosen(choice: Any, projector: Source | None, key: str, otherwise: Any) -> Any:
    """A choice; if there is none, what the projector's configuration says."""
    stated = projector.config.get(key, otherwise) if projector else otherwise
    stated = tuple(stated) if isinstance(stated, list) else stated
    return stated if choice is None else choice


def _unused(projector: Source | None, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What came with a projector and is not taken: a newline, rows of the embedding."""
    mine = [n for n in projector.tensors if n.startswith((PROJECTOR, NEWLINE))] if projector else []
    return tuple(name for name in mine if name not in tensors)


def _files(config: Config, text: Source, tower: Source) -> dict[str, Content]:
    processor = tower_processor(config, image_processor(tower))
    return {**_only(text.files, *SIDE_FILES), **processor_files(config, processor)}


def _only(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: table[key] for key in keys if key in table}


def _open(path: str | Path, part: str, options: Options) -> Source:
    """A part; a language model without the rows and tokens that were added to its vocabulary.

    Raises:
        CheckpointError: it has not that part.
    """
    source = open_source(path, options)
    if part not in source.parts:
        raise CheckpointError(
            f"{path} cannot be the {part} part",
            given=f"dialect {source.dialect}: {describe_parts(source.parts)}",
            expected=f"a checkpoint with {part}",
        )
    return trim(source) if part == "language" else source


def _kind_of(projector: Source) -> str:
    """The kind of a projector that is given."""
    stated = (projector.config.get("unillava") or {}).get("projector")
    layers = [n for n in projector.tensors if n.startswith(PROJECTOR) and n.endswith(".weight")]
    if stated:
        return stated
    return "linear" if len(layers) == 1 else f"mlp{len(layers)}x_gelu"


def _projector(config: Config, given: Source | None, seed: int) -> dict[str, Tensor]:
    """Projector and newline: those that are given, new ones for the others.

    Raises:
        CheckpointError: what is given was made for other parts.
    """
    tensors = _new_tensors(config, seed)
    for name, shape in _shapes(config).items():
        held = given.tensors.get(name) if given else None
        if held is None:
            continue
        if held.shape != shape:
            raise CheckpointError(
                f"the projector of {given.path} belongs to other parts",
                given=f"{name} {list(held.shape)}",
                expected=f"{list(shape)}: from the tower's {_columns(config)} columns to the "
                f"language model's {_width(config)}",
            )
        tensors[name] = held
    return tensors


# --- new weights -----------------------------------------------------------------------------


def _columns(config: Config) -> int:
    """Columns of the tower's features."""
    layers = config["vision_feature_layer"]
    return config["vision_config"]["hidden_size"] * (1 if isinstance(layers, int) else len(layers))


def _width(config: Config) -> int:
    return canonical.text_config(config)["hidden_size"]


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Projector and newline: canonical name -> shape."""
    columns, width = _columns(config), _width(config)
    depth = canonical.projector_depth(config)
    if depth == 0 and columns != width:
        raise CheckpointError(
            "a projector `identity` needs a tower as wide as the language model",
            given=f"{columns} columns of features, {width} of text",
            fix="choose another projector: linear, mlp2x_gelu, …",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(1, depth + 1):
        shapes[f"{PROJECTOR}linear_{n}.weight"] = (width, columns if n == 1 else width)
        if config["multimodal_projector_bias"]:
            shapes[f"{PROJECTOR}linear_{n}.bias"] = (width,)
    return shapes | ({NEWLINE: (width,)} if canonical.has_newline(config) else {})


def _new_tensors(config: Config, seed: int) -> dict[str, Tensor]:
    """Projector and newline as they are before training.

    Linear layers as torch.nn.Linear makes them: weight and bias uniform between
    ± 1 / sqrt(inputs). The newline as LLaVA does: normal, divided by sqrt(width).
    """
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise CheckpointError("the seed cannot be used", given=seed, expected=f"0 to {MAX_SEED}")
    code = CODES[canonical.stored_dtype(config)]
    shapes = _shapes(config)
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name == NEWLINE:
            spread = 1 / math.sqrt(shape[0])
            made[name] = _drawn(name, shape, code, seed, _normal(spread), f"normal * {spread:.3g}")
        else:
            inputs = shapes[name.replace(".bias", ".weight")][1]
            bound = 1 / math.sqrt(inputs)
            made[name] = _drawn(name, shape, code, seed, _uniform(bound), f"uniform ± {bound:.3g}")
    return made


Draw = Callable[[np.random.RandomState, tuple[int, ...]], np.ndarray]


def _uniform(bound: float) -> Draw:
    return lambda random, shape: (2 * random.random_sample(shape) - 1) * bound


def _normal(spread: float) -> Draw:
    return lambda random, shape: random.standard_normal(shape) * spread


def _drawn(name: str, shape: tuple[int, ...], code: str, seed: int, draw: Draw, how: str) -> Tensor:
    def read() -> np.ndarray:
        random = np.random.RandomState([seed, zlib.crc32(name.encode())])
        return from_float(draw(random, shape).astype(np.float32), code)

    return Tensor(code, shape, read, (), (f"new: {how}, seed {seed}",))

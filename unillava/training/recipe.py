"""A recipe: everything that decides what a run computes. YAML, strictly read.

    model: {path: llava-hf/llava-1.5-7b-hf}
    data: {files: [{path: train.json, images: images/}], max_length: 2048}
    rates: {projector: 1.0e-3}
    steps: {batch: 256, micro_batch: 8, epochs: 1}
    output: checkpoints/pretrain

A part without a learning rate is frozen. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unillava.errors import ConfigError


@dataclass(frozen=True)
class ModelSettings:
    """What is trained. Either `path`, or the parts that stage 1 starts from."""

    path: str | None = None
    """A checkpoint of any dialect, or a hub id."""
    base: str | None = None
    vision: str | None = None
    """As in `unillava.load`; with `language`, the tower to compose with."""
    language: str | None = None
    """A plain language model: the model is composed with `vision` and a new projector."""
    projector: str = "mlp2x_gelu"
    """For a composed model: identity, linear, mlp{N}x_gelu, or a file of weights."""
    family: Literal["llava", "llava_next", "llava_next_video"] = "llava"
    image_mode: Literal["square", "pad", "anyres"] | None = None
    """How pictures become tiles; None: as the checkpoint says."""
    anyres_variant: Literal["hf", "llava"] | None = None
    """anyres: whose rounding; None: as the checkpoint says (hf, where it is silent)."""
    template: str | None = None
    """Conversation template; None: as the checkpoint says."""
    pretrain_mm_mlp_adapter: str | None = None
    """A projector file of stage 1 (mm_projector.bin or safetensors), loaded over the model's."""


@dataclass(frozen=True)
class DataFile:
    """One file of records."""

    path: str
    """JSON, JSON lines, or a YAML mixture (`unillava data mix`)."""
    images: str | None = None
    """Folder that relative picture paths start from; None: the file's own."""
    sample: str = "all"
    """all, first:N, end:N, random:N; N a count or a percentage."""


@dataclass(frozen=True)
class DataSettings:
    """What is learnt from."""

    files: tuple[DataFile, ...]
    max_length: int = 2048
    """Positions of the merged sequence; longer samples are cut."""
    packing: bool = False
    """Fill rows with several samples that do not see one another."""
    row_length: int | None = None
    """With packing: positions of a row; None: `max_length`. Rows four to eight times as long as
    usual samples are filled to 98 % (benchmarks/packing.py); lower `steps` accordingly."""
    group_by: Literal["none", "modality_length"] = "none"
    """modality_length: LLaVA's batches of like samples."""
    compat: str | None = None
    """Prompts and labels as a historical system had them: a mode of `unillava.data.compat`."""
    shuffle: bool = True
    workers: int = 2
    num_frames: int = 8
    on_bad: Literal["skip", "stop"] = "skip"
    """What happens to a sample that cannot be read: counted and named, or the run stops."""
    pad_to: int = 128
    """Lengths are rounded up to this: few shapes for compiled graphs."""


@dataclass(frozen=True)
class Rates:
    """Learning rate per part; None: the part is frozen."""

    language: float | None = None
    projector: float | None = None
    vision: float | None = None


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the language model's Linear layers (Hu et al., arXiv 2106.09685).

    They are what `rates.language` then trains; projector and tower are trained in full.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0
    """Of what goes into an adapter."""
    targets: tuple[str, ...] = ("*.self_attn.*_proj", "*.mlp.*_proj")
    """Patterns of full module paths under `language_model`."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank."""
    base: Literal["full", "nf4", "int8", "int4"] = "full"
    """What the language model's frozen matrices are stored in: as they are computed with, or in
    fewer bits (QLoRA). The adapters belong to the model in full all the same."""
    names: Literal["auto", "transformers", "original"] = "auto"
    """Whose names the result has, so that PEFT can put it on their model; auto: the base's."""


@dataclass(frozen=True)
class Steps:
    """How much is learnt at a time, and how long."""

    batch: int
    """Samples (with packing: rows) per update, over all ranks."""
    micro_batch: int = 1
    """Samples (rows) per rank and pass."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Updates; None: as many as `epochs` take."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its schedule."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; biases and norms are never decayed."""
    clip_norm: float | None = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    floor: float = 0.0
    normalise: Literal["tokens", "micro_batch"] = "tokens"
    """tokens: sum of losses over the global batch divided by its learnt tokens. micro_batch: mean
    of the means of micro-batches, as transformers' Trainer before 4.46 did."""


@dataclass(frozen=True)
class Running:
    """How it is computed: nothing here changes the result but rounding."""

    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Of computing; trained parameters are float32. None: bfloat16 where the device has it."""
    recompute: bool = False
    recompute_layers: int | None = None
    """The first so many layers of the language model; None: all."""
    compiled: bool | None = None
    """Use the framework's compiler; None: where it pays (MindSpore)."""
    strategy: str = "auto"
    """single, ddp, fsdp, zero2, zero3, …; auto: single for one process; else, with `deepspeed`, the
    stage that it names, or zero1 on a backend without that; else ddp."""
    deepspeed: str | None = None
    """A DeepSpeed configuration, for zero2 and zero3 on torch; what a recipe decides itself is not
    taken from it."""
    memory: float | None = None
    """GiB that each device gives to the run, which is refused where it cannot fit; None: what the
    device has; 0: not checked."""
    seed: int = 42


@dataclass(frozen=True)
class Saving:
    """What is kept."""

    every: int = 500
    """Updates between checkpoints."""
    keep: int = 2


@dataclass(frozen=True)
class Logging:
    """What is shown."""

    every: int = 1
    tensorboard: bool = False
    wandb: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    output: str
    model: ModelSettings
    data: DataSettings
    steps: Steps
    rates: Rates
    lora: Lora | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    running: Running = field(default_factory=Running)
    saving: Saving = field(default_factory=Saving)
    logging: Logging = field(default_factory=Logging)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `read_recipe` takes them."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file.

    Args:
        path: the file.
        overrides: `key.inner=value`, the value in YAML; put over the file's.

    Raises:
        ConfigError: unreadable, an unknown key (names the nearest), a value of a wrong type, or
            settings that contradict one another.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        for text in overrides:
            _override(content, text, yaml.safe_load)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as a recipe", given=error) from None
    return read_recipe(content, str(path))


def read_recipe(content: Any, name: str = "recipe") -> Recipe:
    """A recipe from plain values.

    Raises:
        ConfigError: see `load_recipe`.
    """
    recipe = _read(Recipe, content, name, "")
    _check(recipe, name)
    return recipe


def _override(content: Any, text: str, parse: Any) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(
            "an override cannot be read", given=text, expected="KEY=VALUE, e.g. steps.batch=64"
        )
    *path, last = key.split(".")
    for part in path:
        content = content.setdefault(part, {}) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ConfigError("an override goes into something that has no keys", given=text)
    content[last] = parse(value)


# --- strict reading --------------------------------------------------------------------------


def _read(kind: Any, value: Any, name: str, where: str) -> Any:
    """`value` as an instance of a dataclass or a plain type, or a ConfigError with its place."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _read_optional(inner, value, name, where)
    if origin is Literal:
        if value not in inner:
            raise _wrong(name, where, value, f"one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(name, where, value, "a list")
        return tuple(_read(inner[0], item, name, f"{where}[{n}]") for n, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, value, name, where)
    return _read_plain(kind, value, name, where)


def _read_optional(kinds: tuple[Any, ...], value: Any, name: str, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    (kind,) = (k for k in kinds if k is not type(None))
    return _read(kind, value, name, where)


def _read_object(kind: Any, value: Any, name: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(name, where, value, "keys and values")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            raise ConfigError(
                f"{name}: {_dotted(where, key)} is not known",
                expected=f"one of {', '.join(hints)}",
                fix=f"did you mean {_dotted(where, near[0])}?" if near else None,
            )
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for key in required:
        if key not in value:
            raise ConfigError(f"{name}: {_dotted(where, key)} is missing")
    read = {key: _read(hints[key], item, name, _dotted(where, key)) for key, item in value.items()}
    return kind(**read)


def _read_plain(kind: type, value: Any, name: str, where: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 2e-5 as text; nobody means that.
        try:
            value = float(value)
        except ValueError:
            raise _wrong(name, where, value, "a number") from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise _wrong(name, where, value, words[kind])
    return value


def _wrong(name: str, where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{name}: {where or 'the file'} cannot be used", given=repr(value),
                       expected=expected)  # fmt: skip


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


# --- whole -----------------------------------------------------------------------------------


def _check(recipe: Recipe, name: str) -> None:
    model, steps, rates = recipe.model, recipe.steps, recipe.rates
    if (model.path is None) == (model.language is None):
        raise ConfigError(
            f"{name}: model needs either path (a whole model) or language and vision (its parts)",
            given=f"path {model.path}, language {model.language}",
        )
    if model.language is not None and model.vision is None:
        raise ConfigError(f"{name}: model.vision is missing", fix="name the tower to compose with")
    if not recipe.data.files:
        raise ConfigError(f"{name}: data.files is empty")
    positive = {
        "steps.batch": steps.batch,
        "steps.micro_batch": steps.micro_batch,
        "steps.epochs": steps.epochs,
        "data.max_length": recipe.data.max_length,
        "data.pad_to": recipe.data.pad_to,
        "saving.every": recipe.saving.every,
        "saving.keep": recipe.saving.keep,
        "logging.every": recipe.logging.every,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{name}: {key} must be above 0", given=value)
    if steps.max_steps is not None and steps.max_steps <= 0:
        raise ConfigError(f"{name}: steps.max_steps must be above 0", given=steps.max_steps)
    if all(rate is None for rate in dataclasses.astuple(rates)):
        raise ConfigError(
            f"{name}: nothing is trained", expected="a rate for language, projector or vision"
        )
    _check_lora(recipe, name)
    if steps.batch % steps.micro_batch:
        raise ConfigError(
            f"{name}: steps.batch must be a multiple of steps.micro_batch",
            given=f"{steps.batch} and {steps.micro_batch}",
        )


def _check_lora(recipe: Recipe, name: str) -> None:
    lora = recipe.lora
    if lora is None:
        return
    if recipe.rates.language is None:
        raise ConfigError(
            f"{name}: lora adapts the language model, and rates.language is not given",
            fix="give the adapters' learning rate as rates.language, or leave lora out",
        )
    for key, fits in (
        ("rank", lora.rank > 0),
        ("alpha", lora.alpha > 0),
        ("dropout", 0 <= lora.dropout < 1),
        ("targets", bool(lora.targets)),
    ):
        if not fits:
            raise ConfigError(f"{name}: lora.{key} cannot be used", given=getattr(lora, key))

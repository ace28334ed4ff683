"""How much memory each device needs in training, before anything is loaded.

What is kept between updates follows exactly from the parameter table; what a pass needs besides is
an estimate. Its terms were found by listing the tensors that torch keeps for the backward pass
(`torch.autograd.graph.saved_tensors_hooks`), with fused attention; they hold for the positions
given, so with the longest rows it is what the fullest batch needs. tests/torch/test_estimate.py
holds it against what a process really takes. Not counted: the framework itself, its exchange
buffers and fragmentation, commonly 1 to 3 GiB on an accelerator.

Shape letters: S positions of a row, D width, F feed-forward width, H heads, K key/value heads,
E size of a head, V rows of the head, C and G the tower's widths, c bytes of the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from backends.quantised import block_of
from unillava.data.layout import image_tokens, video_tokens
from unillava.errors import ConfigError
from unillava.memory import DTYPE_BYTES, count, most_tiles
from unillava.spec import LlavaSpec, parameter_table
from unillava.training.lora import LANGUAGE, linear_layers
from unillava.training.recipe import Recipe
from unillava.training.run import Plan, read_deepspeed
from weight_convert.canonical import part_of

CHUNK_BYTES = 64 << 20
"""Logits of the head that exist at a time (`linear_cross_entropy`), in float32."""
BUCKET = 500_000_000
"""Elements that DeepSpeed exchanges at a time (its `reduce_bucket_size`)."""
TOLERANCE = 1.25
"""A need beyond this many times the device's memory cannot be an error of the estimate."""

CHARACTERS, TYPICAL_HW = 4, (480, 640)
"""Of a token, and of a picture, where nothing more is known."""

SHARDS = {
    "single": (),
    "ddp": (),
    "zero1": ("moments",),
    "zero2": ("masters", "gradients", "moments"),
    "zero3": ("weights", "masters", "gradients", "moments"),
    "fsdp": ("weights", "masters", "gradients", "moments"),
}
"""Strategy -> what is spread evenly over the devices."""
KEEPS_COPIES = ("zero2", "zero3")
"""Strategies with a copy of the trained parameters in the compute dtype beside the originals."""
GATHERS = ("fsdp", "zero3")
"""Strategies that gather two blocks at a time, and what is outside the blocks."""


@dataclass(frozen=True)
class Setting:
    """What memory depends on, besides the model."""

    trained: Mapping[str, tuple[int, ...]]
    """Name -> shape, adapters included."""
    rows: int
    """Of a pass (`steps.micro_batch`)."""
    length: int
    """Positions of a row."""
    precision: str = "bfloat16"
    recompute: bool = False
    recompute_layers: int | None = None
    """The first so many blocks of the decoder; None: all."""
    strategy: str = "single"
    world: int = 1
    packing: bool = False
    hosted: tuple[str, ...] = ()
    """What lies in the host's memory (DeepSpeed's offloading): names of `Estimate`."""
    bits: Mapping[str, float] = field(default_factory=dict)
    """Frozen weights that are stored in fewer bits than the precision -> bits per element."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device."""

    weights: int
    """Frozen parameters, and copies of trained ones in the compute dtype that stay."""
    masters: int
    """Trained parameters in float32."""
    gradients: int
    """float32."""
    moments: int
    """AdamW's two, float32."""
    gathered: int
    """What a sharded strategy puts together at a time."""
    activations: int
    """What the backward pass needs of the forward pass."""
    head: int
    """Chunks of logits, and the gradients that are computed with them."""

    @property
    def kept(self) -> int:
        """What is there all the time: no estimate."""
        return self.weights + self.masters + self.gradients + self.moments

    @property
    def total(self) -> int:
        """Everything at its fullest moment."""
        return sum(getattr(self, one.name) for one in fields(self))


def estimate(spec: LlavaSpec, setting: Setting) -> Estimate:
    """What each device needs.

    Raises:
        ConfigError: an unknown strategy.
    """
    if setting.strategy not in SHARDS:
        raise ConfigError(
            f"nothing is known about the memory of strategy {setting.strategy!r}",
            expected=f"one of {', '.join(SHARDS)}",
        )
    table, size = parameter_table(spec), DTYPE_BYTES[setting.precision]
    trained = count(setting.trained)
    frozen = {name: shape for name, shape in table.items() if name not in setting.trained}
    weights = sum(
        math.prod(shape) * setting.bits.get(name, 8 * size) / 8 for name, shape in frozen.items()
    )
    copies = trained * size if setting.strategy in KEEPS_COPIES and size < 4 else 0
    whole = {
        "weights": weights + copies,
        "masters": 4 * trained,
        "gradients": 4 * trained,
        "moments": 8 * trained,
    }
    for name in SHARDS[setting.strategy]:
        whole[name] /= setting.world
    whole |= dict.fromkeys(setting.hosted, 0)
    return Estimate(
        **{name: math.ceil(value) for name, value in whole.items()},
        gathered=_gathered(table, setting, size, trained),
        activations=math.ceil(_activations(spec, setting, size)),
        head=_head(spec, setting, size),
    )


def _gathered(
    table: Mapping[str, tuple[int, ...]], setting: Setting, size: int, trained: int
) -> int:
    if setting.strategy == "zero2":
        return 2 * size * min(trained, BUCKET)
    if setting.strategy not in GATHERS or setting.world == 1:
        return 0
    inside: dict[str, int] = {}
    outside = 0
    for name, shape in table.items():
        owner, layers, rest = name.partition(".layers.")
        if layers:
            block = f"{owner}.{rest.split('.')[0]}"
            inside[block] = inside.get(block, 0) + math.prod(shape)
        else:
            outside += math.prod(shape)
    # Of a block also the gradient, before it is shared out.
    return max(inside.values()) * (2 * size + 4) + outside * size


# --- what a pass needs ---------------------------------------------------------------------------


def _activations(spec: LlavaSpec, setting: Setting, size: int) -> float:
    text, tower = spec.text, spec.vision
    parts = {_part(name) for name in setting.trained}
    positions, tiles = setting.rows * setting.length, _tiles(spec, setting)
    block = positions * _block(spec, setting, size, "language" in parts)
    again = 0
    if setting.recompute:
        again = min(text.num_layers, setting.recompute_layers or text.num_layers)
    kept = again * positions * text.hidden_size * size
    # While a block is recomputed, everything of it is there.
    whole = text.num_layers - again + (again > 0)
    kept += whole * block + _casts(setting, size) * whole / text.num_layers
    kept += tiles * spec.rows_per_tile * size * (spec.projector.input_size + 2 * text.hidden_size)
    if "vision" in parts:
        return kept + tiles * _tower(spec, size)
    # A frozen tower runs block by block, and what it used is gone before the text begins.
    passing = 4 * tower.hidden_size + 2 * tower.intermediate_size
    return max(kept, tiles * tower.num_positions * passing * size)


def _part(name: str) -> str:
    """Of the model; an adapter belongs to the part of its module."""
    return part_of(name.partition(".lora_")[0])


def _tiles(spec: LlavaSpec, setting: Setting) -> int:
    """The most tiles of a pass: of packed rows, as many as have room."""
    per_row = setting.length // spec.rows_per_tile if setting.packing else 0
    return setting.rows * max(most_tiles(spec), per_row)


def _block(spec: LlavaSpec, setting: Setting, size: int, trained: bool) -> float:
    """Bytes per position that the decoder's block keeps.

    Queries, keys, values and attention's result; the gate before and after its activation, and
    up; the residual stream before both norms, in float32; with packing the mask; where a matrix
    is trained (or has an adapter) also what goes into it.
    """
    text = spec.text
    heads, kv_heads = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    elements = 2 * heads + 2 * kv_heads + 3 * text.intermediate_size
    elements += setting.length if setting.packing else 0
    if trained:
        elements += 3 * text.hidden_size + heads + text.intermediate_size
    return elements * size + 2 * 4 * text.hidden_size


def _tower(spec: LlavaSpec, size: int) -> float:
    """Bytes per tile of a trained tower: eight tensors as wide as the rows and three of the
    feed-forward layer in each block that is run."""
    tower = spec.vision
    deepest = max(n if n >= 0 else tower.num_layers + 1 + n for n in spec.feature_layers)
    block = 8 * tower.hidden_size + 3 * tower.intermediate_size
    return size * tower.num_positions * deepest * block


def _casts(setting: Setting, size: int) -> int:
    """The decoder's trained matrices in the compute dtype, which the backward pass keeps."""
    if size == 4 or setting.strategy in (*KEEPS_COPIES, "fsdp"):
        return 0
    named = setting.trained.items()
    shapes = [s for name, s in named if name.startswith("language_model") and len(s) > 1]
    return size * sum(map(math.prod, shapes))


def _head(spec: LlavaSpec, setting: Setting, size: int) -> int:
    """The head at every position: logits, probabilities, their gradient; then two gradients."""
    text, positions = spec.text, setting.rows * setting.length
    chunk = min(CHUNK_BYTES, 4 * positions * text.vocab_size)
    matrix = text.vocab_size * text.hidden_size
    name = "language_model.lm_head.weight"
    name = "language_model.model.embed_tokens.weight" if text.tie_embeddings else name
    gradient = (4 + (size if size < 4 else 0)) * matrix if name in setting.trained else 0
    return 3 * chunk + positions * text.hidden_size * size + gradient


# --- of a recipe ---------------------------------------------------------------------------------


def setting_of(plan: Plan, precision: str, strategy: str, world: int) -> Setting:
    """What a run's memory depends on.

    Args:
        plan: the run.
        precision: of computing, as decided.
        strategy: as decided.
        world: number of devices.
    """
    recipe, spec = plan.recipe, plan.checkpoint.spec
    bits: dict[str, float] = {}
    if recipe.lora is not None and recipe.lora.base != "full":
        for path, (_, width) in linear_layers(spec).items():
            block = block_of(width, recipe.lora.base)
            code = 8 if recipe.lora.base == "int8" else 4
            bits[f"{LANGUAGE}{path}.weight"] = code + 32 / block
    return Setting(
        trained=plan.trained_shapes,
        rows=recipe.steps.micro_batch,
        length=(recipe.data.row_length if recipe.data.packing else None) or recipe.data.max_length,
        precision=precision,
        recompute=recipe.running.recompute,
        recompute_layers=recipe.running.recompute_layers,
        strategy=strategy,
        world=world,
        packing=recipe.data.packing,
        hosted=_hosted(recipe, strategy),
        bits=bits,
    )


def tokens_per_update(plan: Plan) -> tuple[float, str]:
    """Positions of an average update that are not padding, and how they are known.

    With packing the lengths are exact. Else they are guessed from the index of the data: four
    characters to a token, and pictures of 640 x 480.
    """
    recipe, order, records = plan.recipe, plan.order, plan.records
    if recipe.data.packing:
        return recipe.steps.batch * order.clipped.sum() / len(order.rows_of_epoch(0)), "exact"
    spec = plan.checkpoint.spec
    lengths = records.characters / CHARACTERS + records.images * image_tokens(spec, TYPICAL_HW)
    if spec.video is not None:
        lengths = lengths + records.videos * video_tokens(spec, recipe.data.num_frames)
    return recipe.steps.batch * float(lengths.clip(max=recipe.data.max_length).mean()), "rough"


def _hosted(recipe: Recipe, strategy: str) -> tuple[str, ...]:
    if recipe.running.deepspeed is None or strategy not in ("zero2", "zero3"):
        return ()
    options = read_deepspeed(recipe.running.deepspeed)["zero_optimization"]
    hosted = {
        "offload_optimizer": ("masters", "gradients", "moments"),
        "offload_param": ("weights",),
    }
    chosen = (names for key, names in hosted.items() if _on_host(options.get(key)))
    return tuple(name for names in chosen for name in names)


def _on_host(option: Mapping[str, str] | None) -> bool:
    return bool(option) and option.get("device", "none") != "none"


# --- whether it fits -----------------------------------------------------------------------------


def check_fits(spec: LlavaSpec, setting: Setting, memory: int, where: str) -> str | None:
    """Hold the estimate to what a device has.

    Args:
        spec: the model.
        setting: the run.
        memory: bytes of a device.
        where: which device, for messages.

    Returns:
        A warning if the estimate is above it, but not by more than it may be wrong; else None.

    Raises:
        ConfigError: it cannot fit; says what to change, and what that would need.
    """
    need = estimate(spec, setting)
    if need.total <= memory:
        return None
    told = f"{gib(need.total)} ({gib(need.kept)} of them always), {where} has {gib(memory)}"
    if need.kept <= memory and need.total <= TOLERANCE * memory:
        return f"this may not fit: the fullest batch needs about {told}"
    raise ConfigError(
        "the recipe cannot fit",
        given=f"each device needs about {told}",
        expected="less than the device has",
        fix="; ".join(_remedies(spec, setting, need)) or "use a smaller model, or more devices",
    )


def _remedies(spec: LlavaSpec, setting: Setting, need: Estimate) -> list[str]:
    """Changes that help by a tenth or more, each with what it would need."""
    given = {one.name: getattr(setting, one.name) for one in fields(setting)}
    projector = {n: s for n, s in setting.trained.items() if _part(n) == "projector"}
    changes = [
        ("running.recompute=true", {"recompute": True}),
        ("steps.micro_batch=1", {"rows": 1}),
        (f"data.max_length={setting.length // 2}", {"length": setting.length // 2}),
        ("running.precision=bfloat16", {"precision": "bfloat16"}),
        ("running.strategy=fsdp (torch, all devices)", {"strategy": "fsdp"}),
        ("adapters (lora) in place of whole matrices", {"trained": projector}),
    ]
    told = []
    for words, change in changes:
        found = estimate(spec, Setting(**{**given, **change}))
        if found.total < 0.9 * need.total:
            told.append(f"{words}: {gib(found.total)}")
    return told


def gib(size: float) -> str:
    """Bytes in words: GiB, small ones in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"

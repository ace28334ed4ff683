"""How much device memory a model needs, from its parameter table alone.

Everything is bytes on one device, without sharding. Not counted: the framework itself, kernels'
work space and fragmentation, commonly 1 to 3 GiB.

Shape letters: S positions, L blocks, D width, F feed-forward width, V rows of the vocabulary,
T tiles, P rows of a tile, C vision width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from unillava.spec import LlavaSpec, parameter_table
from weight_convert.canonical import part_of

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LORA_RANK = 128
"""LLaVA-1.5's LoRA recipe."""
TRAINED_BYTES = 2
"""Weights, gradients and activations in bfloat16."""
MOMENT_BYTES = 8
"""AdamW's two moments in float32."""
MASTER_BYTES = 4
"""A float32 copy of each trained weight, as mixed-precision engines keep it."""

_BLOCK_MATRIX = re.compile(r"language_model\.model\.layers\.\d+\..*_proj\.weight")

Trained = Callable[[str], bool]


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes to hold a model and one conversation of `context` positions."""

    dtype: str
    context: int
    weights: int
    """parameters * bytes of the dtype."""
    cache: int
    """Keys and values: 2 * L * key/value heads * head size * context * bytes of the dtype."""

    @property
    def total(self) -> int:
        return self.weights + self.cache


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes to train with AdamW on one sample of `context` positions at a time."""

    kind: str
    trained: int
    """Number of trained parameters."""
    weights: int
    """2 bytes for each parameter, trained or not (LoRA adapters included)."""
    gradients: int
    """2 bytes for each trained parameter."""
    moments: int
    """8 bytes for each trained parameter: AdamW's two moments in float32."""
    master: int
    """4 bytes for each trained parameter: its float32 copy."""
    activations: int
    """See `activation_bytes`."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.master + self.activations


def count(table: Mapping[str, tuple[int, ...]]) -> int:
    """Number of parameters of a table name -> shape."""
    return sum(math.prod(shape) for shape in table.values())


def inference_memory(spec: LlavaSpec, dtype: str, context: int | None = None) -> InferenceMemory:
    """What one conversation needs.

    Args:
        spec: the model.
        dtype: a key of DTYPE_BYTES; weights and cache are held in it.
        context: positions of the static cache; default: the model's whole context.
    """
    context = spec.text.max_position if context is None else context
    text, size = spec.text, DTYPE_BYTES[dtype]
    cache = 2 * text.num_layers * text.num_kv_heads * text.head_dim * context * size
    return InferenceMemory(dtype, context, count(parameter_table(spec)) * size, cache)


def training_memory(spec: LlavaSpec, context: int | None = None) -> list[TrainingMemory]:
    """What each kind of training needs, in the order of TRAININGS.

    Args:
        spec: the model.
        context: positions of one sample; default: the model's whole context.
    """
    context = spec.text.max_position if context is None else context
    table = parameter_table(spec)
    plans = []
    for kind, is_trained in TRAININGS.items():
        trained = count({name: shape for name, shape in table.items() if is_trained(name)})
        adapters = lora_parameters(spec) if kind.startswith("LoRA") else 0
        vision = any(part_of(name) == "vision" and is_trained(name) for name in table)
        plans.append(
            _plan(kind, count(table), trained, adapters, activation_bytes(spec, context, vision))
        )
    return plans


def _plan(
    kind: str, parameters: int, trained: int, adapters: int, activations: int
) -> TrainingMemory:
    trained += adapters
    return TrainingMemory(
        kind=kind,
        trained=trained,
        weights=(parameters + adapters) * TRAINED_BYTES,
        gradients=trained * TRAINED_BYTES,
        moments=trained * MOMENT_BYTES,
        master=trained * MASTER_BYTES,
        activations=activations,
    )


def lora_parameters(spec: LlavaSpec, rank: int = LORA_RANK) -> int:
    """Adapters on every projection of the language model's blocks: rank * (in + out) each."""
    table = parameter_table(spec)
    return sum(rank * sum(shape) for name, shape in table.items() if _BLOCK_MATRIX.fullmatch(name))


def activation_bytes(spec: LlavaSpec, context: int, vision: bool) -> int:
    """Estimate of what the backward pass keeps, in bfloat16, with every block recomputed.

    The input of each block (L * S * D), and for the block being recomputed about 8 D + 3 F per
    position (norms, queries, keys, values, attention's result, gate, up and their product).
    Logits are never held as a whole. The same with P rows of T tiles if the tower is trained;
    T is the most tiles that one image takes.
    """
    text, tower = spec.text, spec.vision
    elements = context * ((text.num_layers + 8) * text.hidden_size + 3 * text.intermediate_size)
    if vision:
        rows = most_tiles(spec) * tower.num_positions
        elements += rows * (
            (tower.num_layers + 8) * tower.hidden_size + 2 * tower.intermediate_size
        )
    return elements * TRAINED_BYTES


def most_tiles(spec: LlavaSpec) -> int:
    """Tiles of the image that takes most of them."""
    if spec.image_mode != "anyres":
        return 1
    return 1 + max(h * w for h, w in spec.grid_pinpoints) // spec.vision.image_size**2


TRAININGS: dict[str, Trained] = {
    "stage 1: projector": lambda name: part_of(name) == "projector",
    f"LoRA rank {LORA_RANK}, projector": lambda name: part_of(name) == "projector",
    "stage 2: all but vision": lambda name: part_of(name) != "vision",
    "stage 2: everything": lambda name: True,
}
"""Kind of training -> which parameters of the model it changes; LoRA adds its adapters."""

ASSUMPTIONS = (
    "Inference: weights, and keys and values of one conversation that fills the context.",
    "Training: bfloat16 weights (2 bytes per parameter) and, per trained parameter, gradient 2, "
    "AdamW moments 8, float32 master copy 4 bytes; one sample that fills the context, every "
    "block recomputed in the backward pass; no sharding.",
    "Not counted: the framework itself and its work space, commonly 1 to 3 GiB.",
)

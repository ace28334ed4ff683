"""How much computing an update takes, and which share of the device's peak that is (MFU).

Model FLOPs in the sense of PaLM (arXiv 2204.02311, appendix B): what the mathematics needs, once;
neither recomputation nor padding count. A matrix product of n rows with [O, I] takes 2 n O I
forward, as much for the gradient of its weight and as much for that of its input. Attention of a
sequence of n takes 4 n^2 times the width of all heads forward and twice that backward, without a
discount for causality, as in PaLM (12 L H Q T per token).

Two things are counted more strictly than by the usual 6 N: a frozen matrix needs no gradient of
its weight, and what lies before every trained parameter no backward pass at all; and the head is
counted at the learnt positions only, for it is computed nowhere else. So a number from here is
lower than the usual one for the same speed, never higher.

Shape letters: B rows, S positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from unillava.spec import LlavaSpec, parameter_table

PEAKS: dict[str, float] = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A800": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H800": 989e12,
    "H800 PCIE": 756e12,
    "H200": 989e12,
    "910B1": 414e12,
    "910B2": 376e12,
    "910B3": 313e12,
    "910B4": 280e12,
}
"""Words of a device's name -> its peak of dense bfloat16 or float16 products, FLOP/s.

Sources: NVIDIA's data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core
GPU", "A10", "A30", "A40", "L4" and "L40S", the figures without sparsity; A800, H800 and H20 are
their export variants; Ascend 910B1 to B4 as in the Atlas A2 series' product tables."""


def peak_flops(device: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device; None: unknown, and then there is no MFU.

    Args:
        device: as `runtime.device_name` gives it.
        dtype: of computing. For float32 there is no figure, because it depends on whether the
            framework rounds products to TF32.
    """
    words = set(re.split(r"[^A-Z0-9]+", device.upper().replace("ASCEND", "ASCEND ")))
    fitting = [name for name in PEAKS if words.issuperset(name.split())]
    if dtype == "float32" or not fitting:
        return None
    return PEAKS[max(fitting, key=len)]


@dataclass(frozen=True)
class Work:
    """What an update went through, over all ranks."""

    positions: int
    """Text positions that are not padding."""
    pairs: int
    """Sum over the samples of what `attention_pairs` counts."""
    learnt: int
    """Positions at which the head is computed."""
    tiles: int
    frames: int = 0


@dataclass(frozen=True)
class Cost:
    """FLOPs of an update: forward and backward together, linear in `Work`."""

    position: float
    pair: float
    learnt: float
    tile: float
    frame: float

    def of(self, work: Work) -> float:
        """Model FLOPs of an update."""
        return (
            self.position * work.positions
            + self.pair * work.pairs
            + self.learnt * work.learnt
            + self.tile * work.tiles
            + self.frame * work.frames
        )


def attention_pairs(segment_ids_BS: np.ndarray, window: int | None = None) -> int:
    """Sum over all samples of positions times the positions each may see (no causal discount).

    Args:
        segment_ids_BS: int [B, S]; 0 = padding, 1… = sample within the row.
        window: the most positions that one sees (sliding window); None: all.
    """
    pairs = 0
    for row in segment_ids_BS:
        sizes = np.bincount(row)[1:].astype(np.int64)
        pairs += int((sizes * np.minimum(sizes, window or sizes)).sum())
    return pairs


# --- the cost of a model -------------------------------------------------------------------------

_ADAPTER = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?(\.weight)?")


@dataclass(frozen=True)
class _Stage:
    """Products that run side by side, between which and the next stage a gradient flows."""

    unit: str
    """Which count of `Work` it is multiplied with."""
    names: tuple[str, ...]
    """Parameters."""
    rows: float = 1.0
    """Rows per unit."""
    pairs: float = 0.0
    """FLOPs of attention behind it, forward, per `pairs_unit`."""
    pairs_unit: str = "pair"


def update_cost(spec: LlavaSpec, trained: Mapping[str, tuple[int, ...]]) -> Cost:
    """What an update costs.

    Args:
        spec: the model.
        trained: name -> shape of the trained parameters; low-rank adapters are named after their
            module (`MODULE.lora_A.weight` [rank, in], `MODULE.lora_B.weight` [out, rank]).
    """
    table = parameter_table(spec)
    adapters = _adapter_sizes(trained)
    found = dict.fromkeys(("position", "pair", "learnt", "tile", "frame"), 0.0)
    flows = {"tile": False, "frame": False}
    for stage in _stages(spec, table):
        # The text goes on from both pictures and videos.
        flowing = flows.get(stage.unit, any(flows.values()))
        for name in stage.names:
            size = math.prod(table[name]) if len(table[name]) > 1 else 0
            down, up = adapters.get(name, (0, 0))
            times = 1 + (name in trained) + flowing
            flops = size * times + down * (2 + flowing) + up * 3
            found[stage.unit] += 2 * stage.rows * flops
        flowing = flowing or any(name in trained or name in adapters for name in stage.names)
        found[stage.pairs_unit] += stage.pairs * (3 if flowing else 1)
        for unit in flows if stage.unit not in flows else (stage.unit,):
            flows[unit] = flowing
    return Cost(**found)


def _adapter_sizes(trained: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Weight -> elements of its adapter's first and second matrix."""
    sizes: dict[str, dict[str, int]] = {}
    for name, shape in trained.items():
        if match := _ADAPTER.fullmatch(name):
            sizes.setdefault(f"{match['module']}.weight", {})[match["side"]] = math.prod(shape)
    return {name: (sides.get("A", 0), sides.get("B", 0)) for name, sides in sizes.items()}


def _stages(spec: LlavaSpec, table: Mapping[str, tuple[int, ...]]) -> Iterator[_Stage]:
    yield from _tower(spec, table, "tile")
    yield from _projector(spec, table, "tile", spec.rows_per_tile)
    if spec.video is not None:
        yield from _tower(spec, table, "frame")
        yield from _projector(spec, table, "frame", _frame_rows(spec))
    yield from _decoder(spec, table)


def _tower(spec: LlavaSpec, table: Mapping[str, tuple[int, ...]], unit: str) -> Iterator[_Stage]:
    tower, prefix = spec.vision, "vision_tower.vision_model."
    rows = tower.num_positions
    yield _Stage(unit, _under(table, f"{prefix}embeddings.patch_embedding"), tower.grid**2)
    # The position table and the class token are added, not multiplied.
    deepest = max(n if n >= 0 else tower.num_layers + 1 + n for n in spec.feature_layers)
    for n in range(deepest):
        block = f"{prefix}encoder.layers.{n}."
        first = [f"{block}layer_norm1", *(f"{block}self_attn.{x}_proj" for x in "qkv")]
        pairs = 4 * rows * rows * tower.hidden_size
        yield _Stage(unit, _under(table, *first), rows, pairs, unit)
        yield _Stage(unit, _under(table, f"{block}self_attn.out_proj"), rows)
        yield _Stage(unit, _under(table, f"{block}layer_norm2", f"{block}mlp.fc1"), rows)
        yield _Stage(unit, _under(table, f"{block}mlp.fc2"), rows)


def _projector(
    spec: LlavaSpec, table: Mapping[str, tuple[int, ...]], unit: str, rows: float
) -> Iterator[_Stage]:
    for n in range(1, spec.projector.depth + 1):
        yield _Stage(unit, _under(table, f"multi_modal_projector.linear_{n}"), rows)


def _frame_rows(spec: LlavaSpec) -> float:
    """Rows of a frame that the projector sees."""
    if spec.video.pool_mode == "none" or spec.video.pool_position != "before_projector":
        return spec.rows_per_tile
    return spec.rows_per_tile / spec.video.pool_stride**2


def _decoder(spec: LlavaSpec, table: Mapping[str, tuple[int, ...]]) -> Iterator[_Stage]:
    text, prefix = spec.text, "language_model.model."
    # Looking up a row is no product; training the table lets the gradient flow.
    first = _under(table, f"{prefix}embed_tokens")
    yield _Stage("position", first + tuple({"image_newline"} & set(table)), rows=0.0)
    for n in range(text.num_layers):
        block = f"{prefix}layers.{n}."
        first = [f"{block}input_layernorm", *(f"{block}self_attn.{x}_proj" for x in "qkv")]
        pairs = 4 * text.num_heads * text.head_dim
        yield _Stage("position", _under(table, *first), 1.0, pairs)
        yield _Stage("position", _under(table, f"{block}self_attn.o_proj"))
        third = [
            f"{block}{x}" for x in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj")
        ]
        yield _Stage("position", _under(table, *third))
        yield _Stage("position", _under(table, f"{block}mlp.down_proj"))
    head = f"{prefix}embed_tokens" if text.tie_embeddings else "language_model.lm_head"
    yield _Stage("learnt", _under(table, f"{prefix}norm", head))


def _under(table: Mapping[str, tuple[int, ...]], *modules: str) -> tuple[str, ...]:
    """The weights and biases of modules, as far as there are any."""
    names = (f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))
    return tuple(name for name in names if name in table)

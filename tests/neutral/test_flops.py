"""FLOPs of an update and peaks of devices, against hand counts; torch counts in tests/torch."""

from __future__ import annotations

import numpy as np
import pytest

from tests.real_configs import REAL_CONFIGS
from unillava.config import read_spec
from unillava.spec import parameter_table
from unillava.training.flops import PEAKS, Work, attention_pairs, peak_flops, update_cost
from weight_convert.canonical import part_of

LLAVA_7B = read_spec(REAL_CONFIGS["LLaVA-1.5-7B"])
TABLE = parameter_table(LLAVA_7B)


def shapes(*parts: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in TABLE.items() if part_of(name) in parts}


def test_everything_trained_is_palms_rule() -> None:
    """6 N per position for the blocks, 12 L H Q T for attention, 6 V D for the head."""
    cost = update_cost(LLAVA_7B, shapes("vision", "projector", "language"))
    blocks = sum(
        int(np.prod(shape))
        for name, shape in TABLE.items()
        if ".layers." in name and name.startswith("language") and len(shape) == 2
    )
    assert cost.position == 6 * blocks
    assert cost.learnt == 6 * 32064 * 4096
    length = 2048
    assert cost.pair * length == 12 * 32 * 32 * 128 * length  # L H Q T, per token


def test_frozen_parts_are_counted_for_what_they_do() -> None:
    whole = update_cost(LLAVA_7B, shapes("vision", "projector", "language"))
    stage_1 = update_cost(LLAVA_7B, shapes("projector"))
    # No gradients of the language model's weights, but the way back through it.
    assert stage_1.position == pytest.approx(whole.position * 2 / 3)
    assert stage_1.learnt == pytest.approx(whole.learnt * 2 / 3)
    assert stage_1.pair == whole.pair
    # Nothing of a frozen tower is done twice; the projector's first input needs no gradient.
    projector = 576 * 2 * (1024 * 4096 * 2 + 4096 * 4096 * 3)
    trained = whole.tile - 576 * 6 * (1024 * 4096 + 4096 * 4096)
    first = 2 * 576 * 3 * 14 * 14 * 1024  # of the patches: their pixels need no gradient
    assert stage_1.tile - projector == pytest.approx((trained - 2 * first) / 3 + first)
    # Forward alone: only the head, if nothing before it is trained.
    head = update_cost(LLAVA_7B, {"language_model.lm_head.weight": (32064, 4096)})
    assert head.position == pytest.approx(whole.position / 3)
    assert head.learnt == pytest.approx(whole.learnt * 2 / 3)


def test_adapters() -> None:
    """Of one matrix, behind a trained projector: base forward and input, adapter all three."""
    name = "language_model.model.layers.3.mlp.up_proj"
    adapter = {f"{name}.lora_A.weight": (8, 4096), f"{name}.lora_B.weight": (11008, 8)}
    stage_1 = update_cost(LLAVA_7B, shapes("projector"))
    both = update_cost(LLAVA_7B, {**shapes("projector"), **adapter})
    assert both.position - stage_1.position == 6 * (8 * 4096 + 11008 * 8)
    alone = update_cost(LLAVA_7B, adapter)
    assert alone.tile == update_cost(LLAVA_7B, shapes("language")).tile
    blocks_behind = both.position - 2 * 8 * 4096 - alone.position
    # Blocks 0 to 2, the attention of block 3, and its gate and up need no gradient of their input.
    block, attention, wide = 4 * 4096**2 + 3 * 4096 * 11008, 4 * 4096**2, 2 * 4096 * 11008
    assert blocks_behind == 2 * (3 * block + attention + wide)


def test_pairs_are_those_of_each_sample() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    assert attention_pairs(segments) == 9 + 4 + 1
    assert attention_pairs(segments, window=2) == 6 + 4 + 1


def test_an_update_adds_up() -> None:
    cost = update_cost(LLAVA_7B, shapes("projector", "language"))
    work = Work(positions=1000, pairs=10**6, learnt=100, tiles=2)
    by_hand = cost.position * 1000 + cost.pair * 1e6 + cost.learnt * 100 + cost.tile * 2
    assert cost.of(work) == pytest.approx(by_hand)
    # 6 N of 6.7 B parameters, roughly: embeddings and most of the head are no products.
    assert 0.9 < cost.position * 1000 / (6 * 6.7e9 * 1000) < 1.0


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("Ascend910B3", 313e12),
        ("Intel(R) Xeon(R) Processor", None),
        ("NVIDIA H1000", None),
        ("Ascend910ProB", None),
        ("", None),
    ],
)
def test_peaks_by_name(device: str, peak: float | None) -> None:
    assert peak_flops(device, "bfloat16") == peak
    assert peak_flops(device, "float32") is None


def test_every_peak_can_be_found() -> None:
    assert all(peak_flops(name, "float16") == value for name, value in PEAKS.items())

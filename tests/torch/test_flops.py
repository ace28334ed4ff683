"""FLOPs of an update against torch's own counter, which sees every product that is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import backends
from tests.real_configs import REAL_CONFIGS
from unillava.config import read_spec
from unillava.rope import rotary_tables
from unillava.spec import LlavaSpec, parameter_table
from unillava.training.flops import Work, update_cost
from weight_convert.canonical import part_of

LENGTH, LEARNT, TILES = 24, 7, 2


@pytest.fixture(autouse=True)
def portable_kernels() -> Iterator[None]:
    """Attention as plain products, which the counter knows."""
    backends.select("torch", device="cpu", dtype="float32", kernels="portable")
    yield
    backends.select("torch", device="cpu", dtype="float32", kernels="auto")


def small() -> LlavaSpec:
    spec = read_spec(REAL_CONFIGS["LLaVA-1.5-7B"])
    text = dataclasses.replace(
        spec.text, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=8, vocab_size=100,
    )  # fmt: skip
    vision = dataclasses.replace(
        spec.vision, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=3,
        image_size=28, patch_size=14,
    )  # fmt: skip
    projector = dataclasses.replace(spec.projector, input_size=24, output_size=32)
    return dataclasses.replace(spec, text=text, vision=vision, projector=projector)


def counted(spec: LlavaSpec, trained: list[str]) -> int:
    """Of a forward and a backward pass."""
    from unillava.models.llava import LlavaForTraining

    runtime = backends.runtime
    network = runtime.build(lambda: LlavaForTraining(spec))
    runtime.set_trained(network, trained)
    for name, shape in parameter_table(spec).items():
        runtime.assign(network, name, np.full(shape, 0.01, np.float32))
    rows = TILES * spec.rows_per_tile
    places = np.r_[LENGTH + np.arange(rows), np.arange(rows, LENGTH)][None]
    cos, sin = rotary_tables(spec.text, LENGTH)
    inputs = [
        runtime.tensor(np.ones((1, LENGTH), np.int64)),
        runtime.tensor(places),
        runtime.tensor(np.arange(LENGTH)[None]),
        None,
        runtime.tensor32(cos),
        runtime.tensor32(sin),
        runtime.tensor(np.arange(LEARNT)),
        runtime.tensor(np.ones(LEARNT, np.int64)),
        runtime.tensor(np.zeros((TILES, 3, 28, 28), np.float32)),
        None,
    ]
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        network(*inputs).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "parts",
    [("projector",), ("language",), ("projector", "language"), ("vision", "projector", "language"),
     ("vision",)],
)  # fmt: skip
def test_every_product_is_counted_once(parts: tuple[str, ...]) -> None:
    spec = small()
    table = parameter_table(spec)
    unused = ("post_layernorm", "encoder.layers.2.")
    names = [
        name for name in table if part_of(name) in parts and not any(u in name for u in unused)
    ]
    work = Work(positions=LENGTH, pairs=LENGTH**2, learnt=LEARNT, tiles=TILES)
    cost = update_cost(spec, {name: table[name] for name in names}).of(work)
    assert cost == counted(spec, names)

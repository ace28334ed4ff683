"""What a training step on torch really takes, in a process of its own.

    python tests/training_workers/memory.py JSON

The argument is one case of tests/torch/test_estimate.py; prints the peak of the resident memory
minus what the process had before the model was built, and the estimate, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

import backends
from backends.contract import AdamW, Group
from tests.real_configs import REAL_CONFIGS
from unillava.config import read_spec
from unillava.rope import rotary_tables
from unillava.spec import LlavaSpec, parameter_table
from unillava.training.estimate import Setting, estimate
from weight_convert.canonical import part_of


def middle_model() -> LlavaSpec:
    """LLaVA-1.5 with few and narrow blocks: about 80 million parameters."""
    spec = read_spec(REAL_CONFIGS["LLaVA-1.5-7B"])
    text = dataclasses.replace(
        spec.text, hidden_size=512, intermediate_size=1376, num_layers=12, num_heads=8,
        num_kv_heads=8, head_dim=64, vocab_size=16000,
    )  # fmt: skip
    vision = dataclasses.replace(
        spec.vision, hidden_size=384, intermediate_size=1536, num_layers=8, num_heads=6,
        image_size=224,
    )  # fmt: skip
    projector = dataclasses.replace(spec.projector, input_size=384, output_size=512)
    return dataclasses.replace(spec, text=text, vision=vision, projector=projector)


def main(case: dict) -> None:
    runtime = backends.select("torch", device="cpu", dtype=case["precision"])
    from unillava.models.llava import LlavaForTraining

    spec, rows, length = middle_model(), case["rows"], case["length"]
    table = parameter_table(spec)
    unused = ("post_layernorm", "encoder.layers.7.")
    names = [
        n for n in table if part_of(n) in case["parts"] and not any(word in n for word in unused)
    ]
    random = np.random.default_rng(0)
    warm = np.ones((256, 256), np.float32)
    runtime.numpy(runtime.tensor(warm) @ runtime.tensor(warm))  # the libraries' own buffers
    before = backends.process.peak_resident_bytes()
    network = runtime.build(lambda: LlavaForTraining(spec))
    runtime.set_trained(network, names)
    for name, shape in table.items():
        values = random.standard_normal(shape, np.float32)
        values *= 0.02
        runtime.assign(network, name, values)
    if case["recompute"]:
        for block in network.language_model.model.layers:
            runtime.recompute(block)
    engine = backends.training.Engine(network, [Group("all", tuple(names))], AdamW(clip_norm=1.0))
    cos, sin = rotary_tables(spec.text, length)
    ids = np.ones((rows, length), np.int64)
    places = np.arange(rows * length).reshape(rows, length)
    places[:, :256] = rows * length + np.arange(256)  # the first tile's rows, in every sample
    targets = np.arange(rows * length)
    inputs = [
        ids, places, np.tile(np.arange(length), (rows, 1)), None, cos.astype(np.float64),
        sin.astype(np.float64), targets, np.ones_like(targets),
        np.zeros((rows, 3, 224, 224), np.float32), None,
    ]  # fmt: skip
    engine.accumulate(inputs, 1e-3)
    engine.accumulate(inputs, 1e-3)
    engine.update({"all": 1e-5})
    setting = Setting(
        trained={name: table[name] for name in names},
        rows=rows,
        length=length,
        precision=case["precision"],
        recompute=case["recompute"],
    )
    found = dataclasses.asdict(estimate(spec, setting))
    peak = backends.process.peak_resident_bytes() - before
    print(json.dumps({"peak": peak, "estimate": found}))


main(json.loads(sys.argv[1]))

"""Peak memory and time of making and applying a delta of a 13B model, beside LLaVA's way.

    python benchmarks/delta.py               # 2 and 4 of the 40 blocks
    python benchmarks/delta.py --layers 40   # all of them: 100 GB of disk

The model has the matrices of LLaVA-13B v0 (embedding 32003 x 5120, MLP 13824 x 5120, float16) and
few blocks. What matters is the largest tensor: memory must not grow with the number of blocks.
Each run is a process of its own, whose peak resident memory the kernel reports; mapped files count
in it. LLaVA's make_delta and apply_delta hold both models; the same is done here with torch on the
same files, and what a whole 13B would take that way is worked out. Writes
benchmarks/results/delta.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")

WIDTH, INNER, HEADS, WORDS, ADDED, BLOCKS = 5120, 13824, 40, 32000, 3, 40
TOWER_WIDTH = 32
BAR_MIB = 2048
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "vocab_size": WORDS,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
}
IMAGES = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "vocab_size": WORDS + ADDED,
    "mm_vision_tower": "openai/clip-vit-large-patch14",
    "mm_hidden_size": TOWER_WIDTH,
    "mm_vision_select_layer": -2,
    "use_mm_proj": True,
}
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    options = parse()
    if options.worker:
        as_llava(options.worker, *map(Path, options.arguments))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        runs = [measure(Path(scratch), layers) for layers in options.layers]
    result = {"model": "LLaVA-13B v0, float16", "cpus": os.cpu_count(), "bar_mib": BAR_MIB}
    result |= {"largest_tensor_mib": round(2 * (WORDS + ADDED) * WIDTH / 2**20), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "delta.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", help="where the disk has room; default: the system's")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the models ------------------------------------------------------------------------------


def shapes_of(layers: int, words: int) -> Shapes:
    square, wide, flat = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH,)
    leaves: Shapes = {
        **{f"self_attn.{part}_proj": square for part in "qkvo"},
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), wide),
        "mlp.down_proj": wide[::-1],
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), flat),
    }
    ends: Shapes = {"model.embed_tokens": (words, WIDTH), "lm_head": (words, WIDTH)}
    blocks = {f"model.layers.{n}.{leaf}": s for n in range(layers) for leaf, s in leaves.items()}
    named = {**ends, **blocks, "model.norm": flat}
    return {f"{name}.weight": shape for name, shape in named.items()}


def save(directory: Path, config: dict[str, Any], shapes: Shapes, seed: int) -> Path:
    from weight_convert.storage.safetensors import write_shards

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    pool = (np.random.default_rng(seed).standard_normal(1 << 24) * 0.02).astype(np.float16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for n, (name, shape) in enumerate(shapes.items()):
            yield name, np.resize(np.roll(pool, 4099 * n), shape)

    write_shards(directory, {name: ("F16", shape) for name, shape in shapes.items()}, tensors())
    return directory


def build(folder: Path, layers: int) -> dict[str, Path]:
    """Base, target, and the directory of a small vision tower."""
    sys.path.insert(0, str(ROOT))
    from unillava.tiny import build_tiny
    from weight_convert.convert import convert

    convert(build_tiny(folder / "tiny", "llava"), folder / "clip", "clip")
    deep = {**CONFIG, "num_hidden_layers": layers}
    projector: Shapes = {"model.mm_projector.weight": (WIDTH, TOWER_WIDTH)}
    projector["model.mm_projector.bias"] = (WIDTH,)
    target = {**shapes_of(layers, WORDS + ADDED), **projector}
    return {
        "base": save(folder / "base", deep, shapes_of(layers, WORDS), 0),
        "target": save(folder / "target", {**deep, **IMAGES}, target, 1),
        "clip": folder / "clip",
    }


# --- measuring -------------------------------------------------------------------------------


def measure(folder: Path, layers: int) -> dict[str, Any]:
    folder = folder / str(layers)
    folder.mkdir()
    held = build(folder, layers)
    common = ["--base", str(held["base"]), "--vision", str(held["clip"])]
    delta, whole = folder / "delta", folder / "whole"
    made = run(["convert", str(held["target"]), str(delta), "--to", "delta", *common])
    arguments = ["convert", str(delta), str(whole), "--from", "delta", "--to", "original"]
    applied = run([*arguments, *common])
    theirs = {
        f"llava_{step}": run([step, str(held["base"]), str(one), str(folder / step)], peer=True)
        for step, one in (("make", held["target"]), ("apply", delta))
    }
    result = {
        "layers": layers,
        "gigabytes": round(size_of(held["target"]) / 1e9, 2),
        "make": made,
        "apply": applied,
        **theirs,
        "llava_apply_at_40_layers_gib": round(2 * whole_bytes() / 2**30),
    }
    print(json.dumps(result), flush=True)
    shutil.rmtree(folder)
    return result


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def whole_bytes() -> int:
    """Bytes of the language model of a whole 13B in float16; base and delta have as much each."""
    return sum(2 * int(np.prod(shape)) for shape in shapes_of(BLOCKS, WORDS).values())


def run(arguments: list[str], *, peer: bool = False) -> dict[str, float]:
    """Seconds and peak MiB of a process."""
    code = "import sys; from unillava.cli.app import main; main(sys.argv[1:])"
    command = [str(Path(__file__)), "--worker", *arguments] if peer else ["-c", code, *arguments]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(arguments)}")
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 1), "peak_mib": round(usage.ru_maxrss / 1024)}


def as_llava(step: str, base: Path, other: Path, destination: Path) -> None:
    """In the peer's process: both models in memory, one loop over all tensors, saved."""
    import safetensors.torch
    import torch

    def load(directory: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            state |= safetensors.torch.load_file(path)
        return {name: value.clone() for name, value in state.items()}

    held, state = load(base), load(other)
    sign = -1 if step == "make" else 1
    for name, value in held.items():
        state[name][tuple(slice(size) for size in value.shape)] += sign * value
    destination.mkdir()
    safetensors.torch.save_file(state, destination / "model.safetensors")


if __name__ == "__main__":
    main()

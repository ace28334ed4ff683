"""Time and peak memory of conversions, against copying the same bytes and against the peers.

    python benchmarks/convert.py                   # whole: 12 GB of random bfloat16
    python benchmarks/convert.py --layers 4        # a slice of it

Builds a checkpoint of LLaVA-1.5-7B's widths and depth with random weights (two key/value heads, as
the tiny checkpoint has them: 12.2 GB), then converts it along ROUTES. Each conversion
runs in a process of its own, whose peak resident memory the kernel reports, and between a `cp` of
its source files and another, both brought to the disk (`sync`): the ratio is to their mean. The
page cache is emptied before each step where that is allowed.

The peers do what their scripts do (whole model in memory, then rename, then save): transformers'
convert_llava_weights_to_hf.py, MindFormers' convert_weight.py, LLaVA's consolidation of shards.
They get `--peer-layers` blocks, because they would not fit into memory otherwise, and so does
unillava in the same comparison. Writes benchmarks/results/convert.json and convert.md.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")

ROUTES = (
    ("hf", "original", "rename"),
    ("original", "hf", "rename"),
    ("hf", "mindformers", "rename, concatenate"),
    ("mindformers", "hf", "rename, cut"),
    ("hf", "paddlemix", "transpose"),
    ("paddlemix", "hf", "transpose"),
    ("hf", "mindspore", "rename"),
)
"""From, to, and what happens to most of the bytes. Each source was written by an earlier route."""
BARS = {"transpose": 2.0}
"""Wall time relative to `cp`; 1.5 for everything else."""
PEERS = {
    "transformers": ("original", "hf"),
    "mindformers": ("hf", "mindformers"),
}


def main() -> None:
    options = parse()
    if options.worker:
        work(options.worker, *options.arguments)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        result = {
            "layers": options.layers,
            "cpus": os.cpu_count(),
            "routes": measure_routes(folder, options.layers, options.sources),
            "peers": measure_peers(folder, options.peer_layers),
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "convert.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "convert.md").write_text(markdown(result))
    print(markdown(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="blocks of the language model")
    parser.add_argument("--peer-layers", type=int, default=8)
    parser.add_argument("--sources", nargs="+", help="only routes from these dialects")
    parser.add_argument("--folder", help="where about 45 GB are free; default: the system's")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- what is converted -----------------------------------------------------------------------


def build(directory: Path, layers: int) -> Path:
    """LLaVA-1.5-7B's widths in the hub's layout: random finite bfloat16, a tiny tokenizer."""
    sys.path.insert(0, str(ROOT))
    from unillava.config import read_spec
    from unillava.spec import parameter_table
    from unillava.tiny import build_tiny
    from weight_convert.storage.safetensors import write_shards

    build_tiny(directory, "llava", dtype="bfloat16")
    for path in directory.glob("model*"):
        path.unlink()
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    }
    config["vision_config"] |= {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    config["image_seq_length"] = 576
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shapes = parameter_table(read_spec(config))
    random = np.random.default_rng(0)
    # One block of random values, read at many offsets: as incompressible, and much faster.
    pool = (random.integers(0, 0x4000, 1 << 24, dtype=np.uint16) & 0xBFFF).astype(np.uint16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            start = int(random.integers(0, 1 << 20))
            count = int(np.prod(shape))
            yield name, np.resize(np.roll(pool, start), count).reshape(shape)

    write_shards(directory, {name: ("BF16", shape) for name, shape in shapes.items()}, tensors())
    return directory


# --- our routes ------------------------------------------------------------------------------


def measure_routes(folder: Path, layers: int, sources: list[str] | None) -> list[dict[str, Any]]:
    held = {"hf": build(folder / "hf", layers)}
    largest = largest_tensor(held["hf"])
    found = []
    routes = [route for route in ROUTES if not sources or route[0] in sources]
    for source, target, kind in routes:
        destination = folder / f"{target}-from-{source}"
        seconds, peak = converted(held[source], destination, target)
        copies = [copied(held[source], folder / "copy") for _ in range(2)]
        size = sum(path.stat().st_size for path in files_of(destination))
        found.append(
            {
                "route": f"{source} -> {target}",
                "kind": kind,
                "gigabytes": size / 1e9,
                "seconds": seconds,
                "cp_seconds": copies,
                "ratio": seconds / (sum(copies) / len(copies)),
                "bar": BARS.get(kind, 1.5),
                "peak_mib": peak,
                "bar_mib": 3 * largest / 2**20 + 200,
            }
        )
        print(json.dumps(found[-1]), flush=True)
        used_later = [s for s, _, _ in routes[len(found) :]]
        if target in used_later and target not in held:
            held[target] = destination
        else:
            shutil.rmtree(destination)
        for name in [name for name in held if name not in used_later]:
            shutil.rmtree(held.pop(name))
    return found


def files_of(path: Path) -> list[Path]:
    return [one for one in path.rglob("*") if one.is_file()]


def largest_tensor(directory: Path) -> int:
    """Bytes."""
    from weight_convert.files import open_weights

    return max(tensor.nbytes for tensor in open_weights(directory).values())


def converted(source: Path, destination: Path, target: str) -> tuple[float, float]:
    """Seconds and peak MiB of a conversion in its own process, on the disk at the end."""
    code = "import sys; from unillava.cli.app import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "convert", str(source), str(destination), "--to", target]
    return run(command)


def run(command: list[str]) -> tuple[float, float]:
    empty_cache()
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_maxrss / 1024


def copied(source: Path, destination: Path) -> float:
    empty_cache()
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    subprocess.run(["sync", *map(str, files_of(destination))], check=True)
    seconds = time.monotonic() - began
    shutil.rmtree(destination)
    return seconds


def empty_cache() -> None:
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("the page cache could not be emptied: ratios say less", file=sys.stderr)


# --- the peers -------------------------------------------------------------------------------


def measure_peers(folder: Path, layers: int) -> list[dict[str, Any]]:
    held = {"hf": build(folder / "peer-hf", layers)}
    held["original"] = folder / "peer-original"
    converted(held["hf"], held["original"], "original")
    found = []
    for peer, (source, target) in PEERS.items():
        destination = folder / "ours"
        ours = converted(held[source], destination, target)
        shutil.rmtree(destination)
        worker = [sys.executable, str(Path(__file__)), "--worker", peer]
        theirs = run([*worker, str(held[source]), str(held["hf"]), str(folder / "theirs")])
        shutil.rmtree(folder / "theirs")
        found.append(
            {
                "peer": peer,
                "route": f"{source} -> {target}",
                "seconds": ours[0],
                "peak_mib": ours[1],
                "peer_seconds": theirs[0],
                "peer_peak_mib": theirs[1],
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def work(peer: str, source: str, config: str, destination: str) -> None:
    """In the peer's process: the way it converts."""
    Path(destination).mkdir()
    if peer == "transformers":
        as_transformers(Path(source), Path(config), Path(destination))
    else:
        as_mindformers(Path(source), Path(destination))


def as_transformers(source: Path, config: Path, destination: Path) -> None:
    """Every shard into one dict, rename, load into the model, save."""
    import safetensors.torch
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    state: dict[str, Any] = {}
    for path in sorted(source.glob("*.safetensors")):
        state |= safetensors.torch.load_file(path)
    for path in sorted(source.glob("pytorch_model*.bin")):
        state |= torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(config))
    model.load_state_dict(dict(renamed(state.items())), strict=False, assign=True)
    model.save_pretrained(destination)


def renamed(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Names of the original repository -> those of the model in memory."""
    pairs = (
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
        ("model.", "model.language_model."),
    )
    for name, value in items:
        old, new = next(((o, n) for o, n in pairs if name.startswith(o)), ("", ""))
        yield new + name[len(old) :], value


def as_mindformers(source: Path, destination: Path) -> None:
    """The whole model, a MindSpore copy of every parameter, one file."""
    import mindspore as ms
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    saved, fused = [], {}
    for name, value in model.named_parameters():
        data = ms.Tensor(value.detach().to(torch.float32).numpy(), dtype=ms.bfloat16)
        part = next(
            (k for k in "qkv" if "vision_tower.encoder" in name and f".{k}_proj." in name), None
        )
        if part:
            fused.setdefault(name.replace(f".{part}_proj.", ".in_proj."), {})[part] = data
        else:
            saved.append({"name": name, "data": data})
    for name, parts in fused.items():
        saved.append({"name": name, "data": ms.ops.cat([parts[k] for k in "qkv"])})
    ms.save_checkpoint(saved, str(destination / "model.ckpt"))


# --- what people look at ---------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"LLaVA-1.5-7B widths, two key/value heads, {result['layers']} language blocks, bfloat16, "
        f"{result['cpus']} CPUs. Time relative to `cp` of the source, both synced to the disk.",
        "",
        "| route | what happens | GB | seconds | cp | ratio (bar) | peak MiB (bar) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["routes"]:
        copies = " / ".join(f"{seconds:.1f}" for seconds in row["cp_seconds"])
        lines.append(
            f"| {row['route']} | {row['kind']} | {row['gigabytes']:.1f} | {row['seconds']:.1f} | "
            f"{copies} | {row['ratio']:.2f} ({row['bar']}) | "
            f"{row['peak_mib']:.0f} ({row['bar_mib']:.0f}) |"
        )
    lines += [
        "",
        "| peer | route | seconds | peer | peak MiB | peer |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["peers"]:
        lines.append(
            f"| {row['peer']} | {row['route']} | {row['seconds']:.1f} | {row['peer_seconds']:.1f} "
            f"| {row['peak_mib']:.0f} | {row['peer_peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

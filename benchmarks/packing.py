"""Positions that are padding, with and without packing, and the time that packing takes.

    python benchmarks/packing.py                     # 66,500 samples
    python benchmarks/packing.py --samples 665000    # as many as llava_v1_5_mix665k.json has

Lengths are drawn like those of LLaVA's 665k instruction mix: its parts with their numbers of
samples (arXiv 2310.03744, table 7), the text of each with a log-normal length (our estimate from
the form of its questions and answers), and pictures of COCO's shapes: 576 positions for LLaVA-1.5,
anyres for LLaVA-NeXT. Writes benchmarks/results/packing.json and packing.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
sys.path.insert(0, str(ROOT))

from unillava.data.layout import best_resolution, unpadded_box  # noqa: E402
from unillava.data.order import Order  # noqa: E402

PROMPT = 40
"""Tokens of the system text and the speakers' names."""
PARTS = (
    # samples in thousands, median of text tokens, sigma of its logarithm, with a picture
    ("LLaVA", 158, 230, 0.45, True),
    ("ShareGPT", 40, 900, 0.90, False),
    ("VQAv2", 83, 130, 0.40, True),
    ("GQA", 72, 180, 0.40, True),
    ("OKVQA", 9, 70, 0.50, True),
    ("OCRVQA", 80, 120, 0.35, True),
    ("A-OKVQA", 66, 90, 0.40, True),
    ("TextCaps", 22, 60, 0.35, True),
    ("RefCOCO", 48, 420, 0.60, True),
    ("VG", 86, 450, 0.60, True),
)
SHAPES = ((480, 640), (640, 480), (427, 640), (640, 427), (426, 640), (500, 332), (333, 500))
"""(height, width) of usual pictures of COCO."""
GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""LLaVA-NeXT's candidates, in pixels; 24 rows of patches in 336."""
PACKED = {"LLaVA-1.5": (2048, 4096, 8192), "LLaVA-NeXT": (4096, 8192, 16384)}
LONGEST = {"LLaVA-1.5": 2048, "LLaVA-NeXT": 4096}


def main() -> None:
    options = parse()
    models = {name: measure(name, options) for name in PACKED}
    result = {"samples": options.samples, "batch": options.batch, "cpus": os.cpu_count()}
    result |= {"micro_batch": options.micro_batch, "models": models}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "packing.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "packing.md").write_text(markdown(result))
    print(markdown(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=66_500)
    parser.add_argument("--batch", type=int, default=128, help="samples per update")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples padded together")
    return parser.parse_args()


def draw(model: str, count: int) -> np.ndarray:
    """int64 [count]: lengths, negative without a picture."""
    random = np.random.default_rng(0)
    counts = np.array([part[1] for part in PARTS], float)
    kinds = random.choice(len(PARTS), count, p=counts / counts.sum())
    medians, sigmas = (np.array([part[n] for part in PARTS])[kinds] for n in (2, 3))
    text = PROMPT + random.lognormal(np.log(medians), sigmas).astype(np.int64)
    pictures = np.array([picture_tokens(model, shape) for shape in SHAPES])
    has_picture = np.array([part[4] for part in PARTS])[kinds]
    lengths = text + np.where(has_picture, random.choice(pictures, count), 0)
    return np.where(has_picture, 1, -1) * np.minimum(lengths, LONGEST[model])


def picture_tokens(model: str, shape: tuple[int, int]) -> int:
    """Positions that a picture takes."""
    if model == "LLaVA-1.5":
        return 576
    rows, columns = (side // 14 for side in best_resolution(shape, GRID))
    top, bottom, left, right = unpadded_box((rows, columns), shape)
    return 576 + (bottom - top) * (right - left + 1)


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Share of padding of every way to make batches, and samples packed per second."""
    lengths = draw(model, options.samples)
    size = np.abs(lengths)
    plain = Order(len(size), options.batch, 0)
    grouped = Order(len(size), options.batch, 0, lengths=lengths)
    padded = {
        "shuffled": padding(plain, size, options.micro_batch),
        "grouped by length and modality": padding(grouped, size, options.micro_batch),
    }
    packed = []
    for row in PACKED[model]:
        order = Order(len(size), options.batch, 0, max_length=row, lengths=size)
        began = time.perf_counter()
        rows = len(order.rows_of_epoch(0))
        seconds = time.perf_counter() - began
        packed.append({"row": row, "rows": rows, "fill": order.fill(), "seconds": seconds})
    quantiles = np.quantile(size, [0.05, 0.5, 0.95]).tolist()
    return {"mean": float(size.mean()), "quantiles": quantiles, "padded": padded, "packed": packed}


def padding(order: Order, size: np.ndarray, micro_batch: int) -> float:
    """Share of positions that are padding if each micro-batch is padded to its longest sample."""
    sequence = np.concatenate(order.rows_of_epoch(0)[:])
    batches = size[sequence[: len(size) // micro_batch * micro_batch]].reshape(-1, micro_batch)
    return 1 - float(batches.sum() / (batches.max(axis=1) * micro_batch).sum())


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Padding with and without packing",
        "",
        f"{result['samples']:,} samples with lengths like those of LLaVA's 665k mix, "
        f"{result['micro_batch']} of them padded together where they are not packed.",
        "",
        "| model (5 %, median, 95 % of lengths) | batches | padding | positions against shuffled "
        "| packed in |",
        "|---|---|---:|---:|---:|",
    ]
    for name, found in result["models"].items():
        quantiles = ", ".join(f"{length:,.0f}" for length in found["quantiles"])
        worst = 1 - found["padded"]["shuffled"]
        for way, share in found["padded"].items():
            ratio = worst / (1 - share)
            lines.append(f"| {name} ({quantiles}) | {way} | {share:.1%} | {ratio:.2f} | |")
        for one in found["packed"]:
            ratio = worst / one["fill"]
            lines.append(
                f"| {name} ({quantiles}) | packed in rows of {one['row']:,} "
                f"| {1 - one['fill']:.1%} | {ratio:.2f} | {one['seconds']:.1f} s |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

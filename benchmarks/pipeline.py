"""Preparing training batches: unillava's feed against a torch DataLoader that does the same work.

    python benchmarks/pipeline.py                    # a minute on two cores
    python benchmarks/pipeline.py --samples 2000 --workers 8

Both read the same records and the same JPEG pictures (COCO's sizes), render and tokenise the
conversations, mark what is learnt, make the pixels of CLIP at 336 (LLaVA-1.5: one tile, LLaVA-NeXT:
anyres), and put batches together; with as many worker processes. The DataLoader uses transformers'
processor of the model, once with its default image processor (torchvision) and once with Pillow's.
They take turns, each in a process of its own; the first batch, which waits for the processes to
start, is not counted. Writes benchmarks/results/pipeline.json and pipeline.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
sys.path.insert(0, str(ROOT))

FAMILIES = ("llava", "llava_next")
WAYS = ("unillava", "DataLoader", "DataLoader, Pillow")
SHAPES = ((640, 480), (480, 640), (640, 427), (427, 640), (640, 426), (500, 332))
TURNS = (1, 1, 2, 3)
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


def main() -> None:
    options = parse()
    if options.way:
        print(json.dumps(run_one(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        make(Path(scratch), options)
        result = measure(scratch, options)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pipeline.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "pipeline.md").write_text(markdown(result))
    print(markdown(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3, help="how often each way is measured")
    parser.add_argument("--folder", help="where the data are made; default: the system's")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--family", choices=FAMILIES, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, options: argparse.Namespace) -> None:
    """Checkpoints whose processors have real sizes, pictures that compress like photographs."""
    from PIL import Image

    from unillava.tiny import build_tiny

    for family in FAMILIES:
        build_tiny(folder / family, family, image_size=336, patch_size=14)
    random = np.random.default_rng(0)
    records = []
    for n in range(options.samples):
        width, height = SHAPES[n % len(SHAPES)]
        coarse = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{n}.jpg", quality=90)
        turns = []
        for turn in range(TURNS[n % len(TURNS)]):
            words = int(random.integers(5, 25)), int(random.integers(2, 120))
            question, answer = (" ".join(["picture"] * count) for count in words)
            marker = "" if turn else "<image>\n"
            turns += [{"from": "human", "value": marker + question}]
            turns += [{"from": "gpt", "value": answer}]
        records.append({"id": str(n), "image": f"{n}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


# --- the two ways ------------------------------------------------------------------------------


def run_one(options: argparse.Namespace) -> dict[str, float]:
    """Samples per second of one way, and the positions of all samples."""
    folder = Path(options.folder)
    ways = {"unillava": ours, "DataLoader": theirs}
    batches = ways[options.way.split(",")[0]](folder, options)
    positions = samples = 0
    began = time.perf_counter()
    for n, (count, length) in enumerate(batches):
        positions += length
        if n == 0:
            began = time.perf_counter()
        else:
            samples += count
    seconds = time.perf_counter() - began
    return {"per_second": samples / seconds, "positions": positions}


def ours(folder: Path, options: argparse.Namespace) -> Any:
    """Batches of unillava's feed, as (samples, positions)."""
    from unillava.checkpoint import open_checkpoint
    from unillava.data.feed import Feed
    from unillava.data.order import Order
    from unillava.data.records import open_records
    from unillava.light import import_transformers_light
    from unillava.loading import load_pipeline

    import_transformers_light()
    records = open_records(folder / "data.json")
    checkpoint = open_checkpoint(str(folder / options.family))
    pipeline = load_pipeline(checkpoint, template="vicuna_v1")
    order = Order(len(records), options.batch, 0)
    feed = Feed(records, pipeline, order, options.batch, 4096, workers=options.workers)
    for (batch,) in feed.updates(0, len(records) // options.batch):
        yield len(batch.samples), batch.positions


class Conversations:
    """The same for a torch DataLoader, with transformers' processor."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from transformers import AutoProcessor

        backend = {"backend": "pil"} if "Pillow" in options.way else {}
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder / options.family, **backend)
        self.records = json.loads((folder / "data.json").read_text())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from PIL import Image

        record = self.records[number]
        image = Image.open(self.folder / record["image"]).convert("RGB")
        text, starts = PROMPT, []
        for turn in record["conversations"]:
            if turn["from"] == "human":
                text += f"USER: {turn['value']} ASSISTANT:"
            else:
                starts.append((len(text), len(text) + len(turn["value"]) + 5))
                text += f" {turn['value']}</s>"
        inputs = self.processor(images=image, text=text, return_tensors="pt")
        # Which tokens are answers: by their offsets in the text before the marker was expanded.
        short = self.processor.tokenizer(text, return_offsets_mapping=True)
        ids, labels = inputs["input_ids"][0], None
        labels = ids.clone().fill_(-100)
        ahead = len(ids) - len(short["input_ids"])
        for place, (start, end) in enumerate(short["offset_mapping"]):
            if any(first <= start and end <= last for first, last in starts):
                labels[place + ahead] = ids[place + ahead]
        return {"input_ids": ids, "labels": labels, "pixel_values": inputs["pixel_values"][0]}


def together(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A padded batch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    labels = [sample["labels"] for sample in samples]
    pixels = [sample["pixel_values"] for sample in samples]
    same = pixels[0].ndim == 3
    return {
        "input_ids": ids,
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence(
            [torch.ones_like(sample["input_ids"]) for sample in samples], batch_first=True
        ),
        "pixel_values": torch.stack(pixels) if same else torch.cat(pixels),
    }


def theirs(folder: Path, options: argparse.Namespace) -> Any:
    """Batches of a torch DataLoader, as (samples, positions)."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Conversations(folder, options),
        batch_size=options.batch,
        shuffle=True,
        num_workers=options.workers,
        collate_fn=together,
        drop_last=True,
    )
    for batch in loader:
        yield len(batch["input_ids"]), int(batch["attention_mask"].sum())


# --- measuring ---------------------------------------------------------------------------------


def measure(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn."""
    found: dict[str, dict[str, list[float]]] = {}
    for family in FAMILIES:
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.turns):
            positions = set()
            for way in WAYS:
                told = start(folder, family, way, options)
                rates[way].append(told["per_second"])
                positions.add(told["positions"])
            if len(positions) > 1:
                raise SystemExit(f"they did not do the same work: {positions} positions")
        found[family] = rates
    return {
        "samples": options.samples,
        "batch": options.batch,
        "workers": options.workers,
        "cpus": os.cpu_count(),
        "per_second": found,
    }


def start(folder: str, family: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, "--folder", folder, "--family", family, "--way", way]
    command += ["--batch", str(options.batch), "--workers", str(options.workers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Preparing training batches",
        "",
        f"{result['samples']:,} samples with one JPEG each, batches of {result['batch']}, "
        f"{result['workers']} worker processes on {result['cpus']} cores. Samples per second, the "
        "median of several turns.",
        "",
        "| model | " + " | ".join(WAYS) + " | unillava against the faster |",
        "|---|" + "---:|" * (len(WAYS) + 1),
    ]
    for family, rates in result["per_second"].items():
        medians = {way: statistics.median(rates[way]) for way in WAYS}
        ratio = medians["unillava"] / max(medians[way] for way in WAYS[1:])
        shown = " | ".join(f"{medians[way]:.1f}" for way in WAYS)
        lines.append(f"| {family} | {shown} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

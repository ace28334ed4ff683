"""A training step against a plain loop of transformers and torch.optim, and what packing adds.

    python benchmarks/train.py                                   # cpu, float32, a small LLaVA
    python benchmarks/train.py --backend mindspore
    python benchmarks/train.py --device cuda --dtype bfloat16 --size 7b --layers 8

All sides learn the same samples with the same weights: one picture (or, sometimes, none) and text
of lengths as mixed as those of LLaVA's instruction data; the tower is frozen, projector and
language model are trained by AdamW with clipping. Below float32 both sides keep float32 parameters
(transformers by autocast). Each side is a process of its own; they take turns, several rounds,
and medians are compared. `unillava` pads rows as transformers does, `packed` fills them with
several samples. Writes benchmarks/results/train-*.json and train.md.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.process import processor_name
from unillava.checkpoint import Checkpoint, open_checkpoint
from unillava.data.collate import IMAGE, TEXT, Sample, collate_rows
from unillava.data.order import best_fit
from unillava.spec import LlavaSpec, parameter_table

RESULTS = Path(__file__).with_name("results")
RATE = 1e-5
BETAS, EPS, DECAY, CLIP = (0.9, 0.999), 1e-8, 0.01, 1.0
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Part of a GPU's name -> its bfloat16 operations per second, dense, as NVIDIA gives them."""


@dataclass(frozen=True)
class Size:
    """A model and what it is trained with."""

    width: int
    inner: int
    heads: int
    layers: int
    vision: tuple[int, int, int, int]
    """Width, inner width, heads, layers of the tower."""
    picture: int
    """Pixels per side; a patch has 14."""
    max_length: int
    samples: int
    """Per update."""
    rows: int
    """Of a padded micro-batch."""
    packed: tuple[int, int]
    """Rows of a packed micro-batch, and their length."""


SIZES = {
    "small": Size(256, 704, 4, 4, (128, 512, 4, 2), 224, 2048, 64, 8, (3, 2048)),
    "7b": Size(4096, 11008, 32, 4, (1024, 4096, 16, 24), 336, 2048, 128, 16, (4, 4096)),
}
VOCABULARY, PATCH = 32000, 14
TEXT_ONLY = 0.06
"""Share of samples without a picture, as in llava_v1_5_mix665k.json."""

Update = Callable[[], float]
"""Takes one update over all samples; returns its loss."""


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.checkpoint = build(Path(scratch) / "checkpoint", options)
        result = measure(options)
    RESULTS.mkdir(exist_ok=True)
    name = f"train-{options.backend}-{result['device'].split(':')[0]}-{options.size}"
    (RESULTS / f"{name}-{options.dtype}.json").write_text(json.dumps(result, indent=2) + "\n")
    write_table()
    print("\n".join(rows_of(result)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="torch", choices=["torch", "mindspore", "paddle"])
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--layers", type=int, help="of the language model; default: by size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recompute", action="store_true", help="activations, on all sides")
    parser.add_argument("--updates", type=int, default=1, help="per side and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compiled", action="store_true", help="our sides compiled")
    parser.add_argument("--worker", choices=["transformers", "unillava", "packed"])
    parser.add_argument("--samples", type=int, help="per update; default: by size")
    parser.add_argument("--checkpoint", type=Path)
    return parser.parse_args()


def size_of(options: argparse.Namespace) -> Size:
    size = SIZES[options.size]
    return replace(
        size, layers=options.layers or size.layers, samples=options.samples or size.samples
    )


def build(directory: Path, options: argparse.Namespace) -> Path:
    """A random LLaVA-1.5 of that size."""
    from unillava.tiny import build_tiny

    size = size_of(options)
    text = {
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 4096,
        "vocab_size": VOCABULARY,
    }
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    return build_tiny(
        directory,
        "llava",
        image_size=size.picture,
        patch_size=PATCH,
        max_shard_bytes=2**30,
        dtype=options.dtype,
        config={"text_config": text, "vision_config": dict(zip(names, size.vision, strict=True))},
    )


# --- the samples -----------------------------------------------------------------------------


def make_samples(size: Size) -> list[Sample]:
    """Lengths of text are log-normal, so that few are much longer than most."""
    rng = np.random.default_rng(0)
    rows = (size.picture // PATCH) ** 2
    samples = []
    for n in range(size.samples):
        pictures = int(n > 0 and rng.random() >= TEXT_ONLY) if n % 8 else 1
        median = rows * (0.35 if pictures else 0.9)
        words = int(np.clip(rng.lognormal(np.log(median), 0.8), 16, size.max_length - rows))
        before = min(8, words // 2)
        kind = np.repeat(np.array([TEXT, IMAGE, TEXT], np.int8), (before, pictures * rows, words))
        row = np.zeros(len(kind), np.int64)
        row[kind == IMAGE] = np.arange(pictures * rows)
        kind, row = kind[: size.max_length], row[: size.max_length]
        ids = np.where(kind == TEXT, rng.integers(3, VOCABULARY - 100, len(kind)), 0)
        learnt = np.arange(len(kind)) >= before + pictures * rows + words // 3
        pixels = rng.standard_normal((1, 3, size.picture, size.picture)).astype(np.float32)
        samples.append(
            Sample(ids, kind, row, learnt, pixels if pictures else None, None, pictures * rows)
        )
    return samples


def micro_batches(size: Size, samples: list[Sample], packed: bool) -> list[list[list[Sample]]]:
    """The samples of an update as rows of micro-batches."""
    if not packed:
        rows = [[sample] for sample in samples]
        return [rows[n : n + size.rows] for n in range(0, len(rows), size.rows)]
    count, length = size.packed
    numbers = best_fit(range(len(samples)), [len(s) for s in samples], length)
    rows = [[samples[n] for n in row] for row in numbers]
    return [rows[n : n + count] for n in range(0, len(rows), count)]


def operations(spec: LlavaSpec, samples: list[Sample]) -> float:
    """Multiplications and additions that an update needs, backward included, nothing twice.

    The tower runs forward only; attention is causal; the head counts where a token is learnt.
    """
    sizes = {name: float(np.prod(shape)) for name, shape in parameter_table(spec).items()}
    blocks = sum(n for name, n in sizes.items() if name.startswith("language_model.model.layers"))
    tower = sum(n for name, n in sizes.items() if name.startswith("vision_tower"))
    projector = sum(n for name, n in sizes.items() if name.startswith("multi_modal"))
    width, layers = spec.text.hidden_size, spec.text.num_layers
    total = 0.0
    for sample in samples:
        length, rows = len(sample), sample.image_rows
        total += 6 * blocks * length + 6 * layers * width * length**2
        total += 6 * spec.text.vocab_size * width * int(sample.learnt_S[1:].sum())
        total += (2 * tower + 6 * projector) * rows
        total += 4 * spec.vision.num_layers * spec.vision.hidden_size * rows**2
    return total


# --- the sides, each in its process ----------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Answer each line of stdin, a number of updates, with seconds and losses as JSON."""
    # Frameworks print to stdout, which belongs to the answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    make = theirs if options.worker == "transformers" else ours
    update, about, memory = make(options)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        losses = [update() for _ in range(int(line))]
        found = {"seconds": time.perf_counter() - started, "losses": losses, "memory": memory()}
        print(json.dumps(found), file=answers, flush=True)


def ours(options: argparse.Namespace) -> tuple[Update, dict[str, Any], Callable[[], int]]:
    import backends
    from backends.contract import AdamW

    size, checkpoint = size_of(options), open_checkpoint(options.checkpoint)
    runtime = backends.select(options.backend, device=options.device, dtype=options.dtype)
    groups = trained_groups(checkpoint.spec)
    compiled = options.compiled or options.backend == "mindspore"
    engine = backends.training.Engine(
        network(options, checkpoint, groups, runtime),
        groups,
        AdamW(*BETAS, EPS, CLIP),
        compiled=compiled,
    )
    samples, packed = make_samples(size), options.worker == "packed"
    parts = micro_batches(size, samples, packed)
    # Graphs are compiled for each shape, so there they should be few.
    steps = {"pad_to": 128, "pad_targets_to": 256} if compiled else {}
    steps |= {"pad_to": size.packed[1]} if packed else {}
    batches = [collate_rows(part, spare=samples[0], **steps) for part in parts]
    learnt = sum(int((batch["targets"] != -100).sum()) for batch in batches)
    inputs = [in_order(checkpoint.spec, batch, packed) for batch in batches]

    def update() -> float:
        loss = 0.0
        for n, arrays in enumerate(inputs, 1):
            loss += engine.accumulate(arrays, 1 / learnt, last=n == len(inputs))
        engine.update({group.name: RATE for group in groups})
        runtime.synchronize()
        return loss

    about = {**runtime.versions(), "device": runtime.current()[0]}
    return update, about | facts(batches), runtime.peak_memory


def in_order(spec: LlavaSpec, batch: dict[str, np.ndarray], packed: bool) -> list[Any]:
    """The arrays as the loop of training gives them."""
    from unillava.rope import rotary_tables
    from unillava.training.loop import INPUTS

    cos, sin = rotary_tables(spec.text, batch["input_ids"].shape[1])
    given = {**batch, "cos": cos.astype(np.float64), "sin": sin.astype(np.float64)}
    if not packed:
        del given["segment_ids"]
    return [given.get(name) for name in INPUTS]


def trained_groups(spec: LlavaSpec) -> tuple[Any, ...]:
    from backends.contract import Group

    names = [name for name in parameter_table(spec) if not name.startswith("vision_tower")]
    plain = [name for name in names if name.endswith("bias") or "norm" in name]
    decayed = tuple(name for name in names if name not in plain)
    return Group("decayed", decayed, DECAY), Group("plain", tuple(plain))


def network(
    options: argparse.Namespace, checkpoint: Checkpoint, groups: tuple[Any, ...], runtime: Any
) -> Any:
    from unillava.models.llava import LlavaForTraining

    module = runtime.build(lambda: LlavaForTraining(checkpoint.spec))
    runtime.set_trained(module, [name for group in groups for name in group.parameters])
    for name, array, is_bfloat16 in checkpoint.tensors():
        runtime.assign(module, name, array, bfloat16=is_bfloat16)
    if options.recompute:
        for block in module.language_model.model.layers:
            runtime.recompute(block)
    return module


def theirs(options: argparse.Namespace) -> tuple[Update, dict[str, Any], Callable[[], int]]:
    """What a user of transformers would write; mixed precision as its Trainer has it."""
    import torch
    import transformers

    from backends.process import peak_resident_bytes

    # transformers knows none of the other backends' devices.
    device = torch.device(options.device if options.backend == "torch" else "cpu")
    compute = getattr(torch, options.dtype)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        str(options.checkpoint), dtype=torch.float32
    ).to(device)
    model.model.vision_tower.requires_grad_(False)
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    plain = [p for n, p in trained.items() if n.endswith("bias") or "norm" in n]
    ids = {id(p) for p in plain}
    decayed = [p for p in trained.values() if id(p) not in ids]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=RATE, betas=BETAS, eps=EPS, fused=True,
    )  # fmt: skip
    size, spec = size_of(options), open_checkpoint(options.checkpoint).spec
    samples = make_samples(size)
    parts = micro_batches(size, samples, False)
    batches = [for_transformers(spec, [row[0] for row in part]) for part in parts]
    learnt = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)

    def update() -> float:
        total = 0.0
        for arrays in batches:
            batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            with torch.autocast(device.type, compute, enabled=compute != torch.float32):
                loss = model(**batch, num_items_in_batch=learnt).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    def memory() -> int:
        if device.type == "cpu":
            return peak_resident_bytes()
        return torch.cuda.max_memory_allocated(device)

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    cells = sum(batch["input_ids"].size for batch in batches)
    filled = sum(map(len, samples)) / cells
    return update, {**versions, "device": str(device), "filled": filled}, memory


def for_transformers(spec: LlavaSpec, samples: list[Sample]) -> dict[str, np.ndarray]:
    """The batch as transformers' processors and collators give it."""
    width = max(map(len, samples))
    batch = {
        "input_ids": np.zeros((len(samples), width), np.int64),
        "attention_mask": np.zeros((len(samples), width), np.int64),
        "labels": np.full((len(samples), width), -100),
    }
    for n, sample in enumerate(samples):
        place = (n, slice(len(sample)))
        batch["input_ids"][place] = np.where(sample.kind_S == IMAGE, spec.image_token, sample.ids_S)
        batch["attention_mask"][place] = 1
        batch["labels"][place] = np.where(sample.learnt_S, sample.ids_S, -100)
    pixels = [s.pixels_T3HW for s in samples if s.pixels_T3HW is not None]
    return batch | ({"pixel_values": np.concatenate(pixels)} if pixels else {})


def facts(batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """How much of the batches is not padding."""
    cells = sum(batch["input_ids"].size for batch in batches)
    return {"filled": sum(int(batch["lengths"].sum()) for batch in batches) / cells}


class Side:
    """A process that works for this one."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", name]
        for key in ("backend", "device", "dtype", "size", "checkpoint"):
            command += [f"--{key}", str(getattr(options, key))]
        command += [f"--{key}" for key in ("recompute", "compiled") if getattr(options, key)]
        command += ["--samples", str(size_of(options).samples)]
        threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | threads,
        )
        self.name = name  # before the first answer, whose failure names it
        self.about = self._answer()

    def run(self, updates: int) -> dict[str, Any]:
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} has ended: see above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# --- measuring -------------------------------------------------------------------------------

NAMES = ("transformers", "unillava", "packed")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    sides = [Side(name, options) for name in NAMES]
    try:
        # The first update compiles and allocates: not counted, but all sides must have learnt
        # the same.
        first = {side.name: side.run(1)["losses"][0] for side in sides}
        check_same(first, 1e-4 if options.dtype == "float32" else 2e-2)
        rounds: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                rounds[side.name].append(side.run(options.updates))
    finally:
        for side in sides:
            side.close()
    size, spec = size_of(options), open_checkpoint(options.checkpoint).spec
    samples = make_samples(size)
    count = sum(map(len, samples)) * options.updates
    work = operations(spec, samples) * options.updates
    reference = rounds["transformers"]
    return {
        "backend": options.backend,
        "size": options.size,
        "layers": spec.text.num_layers,
        "dtype": options.dtype,
        "device": sides[1].about["device"],
        "recompute": options.recompute,
        "compiled": options.compiled,
        "samples_per_update": size.samples,
        "tokens_per_update": sum(map(len, samples)),
        "threads": options.threads,
        "processor": processor(options.device),
        "versions": {
            key: value
            for side in sides
            for key, value in side.about.items()
            if key not in ("device", "filled")
        },
        "first_losses": first,
        "sides": {
            side.name: summary(rounds[side.name], reference, count, work, options)
            | {"filled": round(side.about["filled"], 3)}
            for side in sides
        },
    }


def check_same(losses: dict[str, float], tolerance: float) -> None:
    expected = losses["transformers"]
    for name, loss in losses.items():
        if abs(loss / expected - 1) > tolerance:
            raise SystemExit(f"the first loss of {name} is {loss}, that of transformers {expected}")


def summary(
    rounds: list[dict[str, Any]],
    reference: list[dict[str, Any]],
    count: int,
    work: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Medians; `against_transformers` is the median over rounds, above 1 faster than it."""
    seconds = [one["seconds"] for one in rounds]
    faster = [r["seconds"] / s for s, r in zip(seconds, reference, strict=True)]
    peak = next((p for name, p in PEAKS.items() if name in processor(options.device)), None)
    usage = None if peak is None else round(work / statistics.median(seconds) / peak, 3)
    return {
        "tokens_per_s": round(count / statistics.median(seconds), 1),
        "tokens_per_s_range": [round(count / max(seconds), 1), round(count / min(seconds), 1)],
        "against_transformers": round(statistics.median(faster), 2),
        "operations_per_s": round(work / statistics.median(seconds)),
        "model_flops_utilisation": usage,
        "peak_memory_mb": round(max(one["memory"] for one in rounds) / 1e6),
    }


def processor(device: str) -> str:
    """The name of the device, as well as the system tells it."""
    if device.startswith("cuda"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return found.splitlines()[0] if found else "unknown GPU"
    return f"{processor_name()}, {os.cpu_count()} logical cores"


# --- tables ----------------------------------------------------------------------------------

HEAD = (
    "| backend | device | model | dtype | side | tokens/s | × | MFU | peak MB | not padding |",
    "|---|---|---|---|---|--:|--:|--:|--:|--:|",
)


def rows_of(result: dict[str, Any]) -> Iterator[str]:
    """The lines of the table about one result, with its head."""
    yield from HEAD
    for name, side in result["sides"].items():
        usage = side["model_flops_utilisation"]
        marks = [mark for mark in ("recompute", "compiled") if result[mark]]
        cells = (
            *(result["backend"], result["device"], f"{result['size']}, {result['layers']} layers"),
            *(", ".join([result["dtype"], *marks]), name, f"{side['tokens_per_s']:,.0f}"),
            *(side["against_transformers"], "" if usage is None else f"{usage:.1%}"),
            *(f"{side['peak_memory_mb']:,}", f"{side['filled']:.0%}"),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def write_table() -> None:
    """train.md from all results that are there."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("train-*.json"))]
    lines = [
        "# A training step against transformers and torch.optim",
        "",
        "Written by `benchmarks/train.py`, which says how it is measured. × above 1: faster than "
        "transformers in the same run. Tokens are those of samples, padding does not count.",
        "",
        *HEAD,
    ]
    for result in results:
        lines += list(rows_of(result))[len(HEAD) :]
    lines += ["", *sorted({f"* {result['processor']}" for result in results}), ""]
    (RESULTS / "train.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()

"""Time to the first token and decoded tokens per second, against transformers' `generate`.

    python benchmarks/generate.py --backend torch
    python benchmarks/generate.py --backend mindspore --size small
    python benchmarks/generate.py --backend torch --device cuda --dtype bfloat16 --size large

One run measures transformers (torch, eager, its default attention), unillava eager and unillava
compiled on the same random weights, the same prompt with one picture, greedy. Each runs in a
process of its own; the three take turns, several rounds, and medians are compared. The first
token's time contains preparing the picture and the prompt, the same code on every side; decoding
is what the further tokens take. Writes benchmarks/results/generate-*.json and generate.md.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.process import processor_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
PHOTO = ROOT / "tests" / "data" / "photo.jpg"

SIZES = {"small": (256, 4, 4), "medium": (512, 6, 8), "large": (1024, 8, 16)}
"""Name -> width, blocks and heads of the language model."""
VOCABULARY, TILE, PATCH = 32000, 336, 14

Run = Callable[[int], tuple[float, list[int]]]
"""Number of new tokens -> seconds, the tokens."""


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.checkpoint = build(Path(scratch) / "checkpoint", options.size)
        result = measure(options)
    RESULTS.mkdir(exist_ok=True)
    name = f"generate-{options.backend}-{result['device'].split(':')[0]}-{options.size}"
    (RESULTS / f"{name}-{options.dtype}.json").write_text(json.dumps(result, indent=2) + "\n")
    write_table()
    print("\n".join(rows(result)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="torch", choices=["torch", "mindspore", "paddle"])
    parser.add_argument("--size", default="medium", choices=SIZES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--worker", choices=["transformers", "eager", "compiled"])
    parser.add_argument("--checkpoint", type=Path)
    return parser.parse_args()


def build(directory: Path, size: str) -> Path:
    """A random LLaVA-1.5 of that size with a real vocabulary's and a real picture's dimensions."""
    from unillava.tiny import build_tiny

    width, blocks, heads = SIZES[size]
    text = {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "vocab_size": VOCABULARY,
    }
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    return build_tiny(
        directory,
        "llava",
        image_size=TILE,
        patch_size=PATCH,
        max_shard_bytes=2**30,
        config={"text_config": text, "vision_config": vision},
    )


# --- the three sides, each in its process ----------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Answer each line of stdin, a number of new tokens, with seconds and tokens as JSON."""
    # Frameworks print to stdout, which belongs to the answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run, about = theirs(options) if options.worker == "transformers" else ours(options)
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        seconds, tokens = run(int(line))
        print(json.dumps([seconds, tokens]), file=answers, flush=True)


def request() -> dict[str, Any]:
    question = "Describe the photo in one sentence. What colour is the coat?"
    picture = {"type": "image", "image": str(PHOTO)}
    return {
        "messages": [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
    }


def ours(options: argparse.Namespace) -> tuple[Run, dict[str, str]]:
    import unillava

    model = unillava.load(
        str(options.checkpoint),
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        compile=options.worker == "compiled",
    )
    model.stop_ids = set()  # every reply has its full length

    def run(new_tokens: int) -> tuple[float, list[int]]:
        started = time.perf_counter()
        reply = model.generate([request()], max_new_tokens=new_tokens)[0]
        return time.perf_counter() - started, reply.tokens

    import backends

    return run, {**backends.runtime.versions(), "device": backends.runtime.current()[0]}


def theirs(options: argparse.Namespace) -> tuple[Run, dict[str, str]]:
    import torch
    import transformers

    from unillava.checkpoint import open_checkpoint
    from unillava.data.collate import TEXT
    from unillava.loading import load_pipeline

    checkpoint = open_checkpoint(options.checkpoint)
    pipeline = load_pipeline(checkpoint)
    # transformers knows none of the other backends' devices.
    device = options.device if options.backend == "torch" else "cpu"
    dtype = getattr(torch, options.dtype)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        str(options.checkpoint), dtype=dtype
    ).to(device)
    model.generation_config.eos_token_id = None

    def run(new_tokens: int) -> tuple[float, list[int]]:
        started = time.perf_counter()
        sample = pipeline.prepare(request())
        ids_S = sample.ids_S.copy()
        ids_S[sample.kind_S != TEXT] = checkpoint.spec.image_token
        ids_BS = torch.from_numpy(ids_S)[None].to(device)
        output_BS = model.generate(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            pixel_values=torch.from_numpy(sample.pixels_T3HW).to(device, dtype),
            do_sample=False,
            max_new_tokens=new_tokens,
        )
        tokens = output_BS[0, len(ids_S) :].tolist()
        pipeline.tokenizer.decode(tokens)
        return time.perf_counter() - started, tokens

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return run, {**versions, "device": device}


class Side:
    """A process that works for this one."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", name]
        for key in ("backend", "device", "dtype", "checkpoint"):
            command += [f"--{key}", str(getattr(options, key))]
        threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if name == "transformers" else None,
            text=True,
            env=os.environ | threads,
        )
        self.name = name  # before the first answer, whose failure names it
        self.about = self._answer()

    def run(self, new_tokens: int) -> tuple[float, list[int]]:
        self.process.stdin.write(f"{new_tokens}\n")
        self.process.stdin.flush()
        seconds, tokens = self._answer()
        if len(tokens) != new_tokens:
            raise SystemExit(f"{self.name} made {len(tokens)} tokens instead of {new_tokens}")
        return seconds, tokens

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} has ended: see above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# --- measuring -------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    names = ["transformers", "eager"] + ([] if options.skip_compiled else ["compiled"])
    sides = [Side(name, options) for name in names]
    try:
        for side in sides:  # compilation and first allocations, not counted
            side.warm_up = round(side.run(1)[0] + side.run(options.new_tokens)[0], 2)
        rounds = {side.name: [] for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                rounds[side.name].append(one_round(side, options.new_tokens))
    finally:
        for side in sides:
            side.close()
    reference = rounds["transformers"]
    return {
        "backend": options.backend,
        "size": options.size,
        "dtype": options.dtype,
        "device": sides[1].about["device"],
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "processor": f"{processor_name()}, {os.cpu_count()} logical cores",
        "versions": {key: value for side in sides for key, value in side.about.items()},
        "sides": {
            side.name: summary(rounds[side.name], reference) | {"warm_up_s": side.warm_up}
            for side in sides
        },
    }


def one_round(side: Side, new_tokens: int) -> dict[str, Any]:
    first, _ = side.run(1)
    total, tokens = side.run(new_tokens)
    return {"first": first, "rate": (new_tokens - 1) / (total - first), "tokens": tokens}


def summary(rounds: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians; `…_against_transformers` is the median over rounds, above 1 faster than it."""
    first, rate = ([one[key] for one in rounds] for key in ("first", "rate"))
    faster = [r["first"] / one["first"] for one, r in zip(rounds, reference, strict=True)]
    more = [one["rate"] / r["rate"] for one, r in zip(rounds, reference, strict=True)]
    return {
        "first_token_s": round(statistics.median(first), 4),
        "first_token_against_transformers": round(statistics.median(faster), 2),
        "tokens_per_s": round(statistics.median(rate), 1),
        "tokens_per_s_range": [round(min(rate), 1), round(max(rate), 1)],
        "tokens_per_s_against_transformers": round(statistics.median(more), 2),
        "same_tokens": all(one["tokens"] == reference[0]["tokens"] for one in rounds),
    }


# --- tables ----------------------------------------------------------------------------------

HEAD = (
    "| backend | device | size | dtype | side | first token, s | × | tokens/s | × | same tokens |",
    "|---|---|---|---|---|--:|--:|--:|--:|---|",
)


def rows(result: dict[str, Any]) -> list[str]:
    """The lines of the table about one result, with its head."""
    lines = list(HEAD)
    for name, side in result["sides"].items():
        cells = (
            *(result[key] for key in ("backend", "device", "size", "dtype")),
            name,
            f"{side['first_token_s']:.3f}",
            side["first_token_against_transformers"],
            side["tokens_per_s"],
            side["tokens_per_s_against_transformers"],
            "yes" if side["same_tokens"] else "no",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def write_table() -> None:
    """generate.md from all results that are there."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("generate-*.json"))]
    lines = [
        "# Generation against transformers",
        "",
        "Written by `benchmarks/generate.py`, which says how it is measured. × above 1: faster "
        "than transformers in the same run.",
        "",
        *HEAD,
    ]
    for result in results:
        lines += rows(result)[len(HEAD) :]
    lines += ["", *sorted({f"* {result['processor']}" for result in results}), ""]
    (RESULTS / "generate.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()

"""Opening a training file: the index against `json.load`, in time and in memory.

    python benchmarks/records.py                     # 66,500 records, 0.1 GB
    python benchmarks/records.py --records 665000    # as large as llava_v1_5_mix665k.json

Makes a file whose records are as long as those of LLaVA's instruction data (`--language ko` for
one that is not ASCII), and opens it in processes of its own: with `json.load`, with unillava for
the first time, and again. Then it reads records in random order, alone and in `--workers`
processes at once. Writes benchmarks/results/records.json and records.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")

WORDS = {
    "en": "the of and to is in what this there image picture cat dog person standing next table",
    "ko": "사진에 무엇이 있나요 고양이가 두 마리 있습니다 하늘은 파랗고 바다는 조용합니다 사람이",
}
TURNS = (1, 1, 2, 3, 5, 8)
"""Questions per record, each as likely as the other."""
ANSWERS = (2, 3, 20, 80, 180)
"""Words per answer."""
READS = 20_000

STEPS = {
    "json.load": """
with open(sys.argv[1], encoding="utf-8") as file:
    data = json.load(file)
count = len(data)
""",
    "unillava": """
data = open_records(sys.argv[1])
lengths = data.modality_lengths
count = len(data)
""",
    "read": """
data = open_records(sys.argv[1])
numbers = random.Random(int(sys.argv[2])).choices(range(len(data)), k=int(sys.argv[3]))
start = time.perf_counter()
for number in numbers:
    data[number]
count = len(numbers)
""",
}
MEASURE = """
import json, random, sys, time
sys.path.insert(0, {root!r})
from backends.process import peak_resident_bytes
from unillava.data.records import open_records
before = peak_resident_bytes()
start = time.perf_counter()
{step}
print(count, time.perf_counter() - start, peak_resident_bytes() - before)
"""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        path = Path(scratch) / "data.json"
        make(path, options.records, options.language)
        result = measure(path, options)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "records.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "records.md").write_text(markdown(result))
    print(markdown(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=66_500)
    parser.add_argument("--language", choices=WORDS, default="en")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--folder", help="where the file is made; default: the system's")
    return parser.parse_args()


def make(path: Path, count: int, language: str) -> None:
    """A JSON array; every sixteenth record has no image."""
    source, words = random.Random(0), WORDS[language].split()

    def say(length: int) -> str:
        return " ".join(source.choices(words, k=length))

    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        for n in range(count):
            turns: list[dict[str, str]] = []
            for turn in range(source.choice(TURNS)):
                marker = "<image>\n" if turn == 0 and n % 16 else ""
                turns.append({"from": "human", "value": marker + say(source.randrange(5, 25))})
                turns.append({"from": "gpt", "value": say(source.choice(ANSWERS))})
            record: dict[str, Any] = {"id": f"{n:012}"}
            record |= {"image": f"coco/train2017/{n:012}.jpg"} if n % 16 else {}
            line = json.dumps(record | {"conversations": turns}, ensure_ascii=False)
            file.write((", " if n else "") + line)
        file.write("]")


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every step once, in turn, with the file in the page cache."""
    path.read_bytes()
    steps = {"json.load": run("json.load", path)}
    steps["first time"] = run("unillava", path)
    steps["second time"] = run("unillava", path)
    steps["random reads"] = run("read", path, 0, READS)
    started = [start("read", path, n, READS) for n in range(options.workers)]
    workers = [finish(process) for process in started]
    index = next(path.parent.glob(".*"))
    return {
        "records": options.records,
        "language": options.language,
        "cpus": os.cpu_count(),
        "bytes": path.stat().st_size,
        "index_bytes": index.stat().st_size,
        "steps": steps,
        "workers": workers,
    }


def run(step: str, path: Path, *arguments: int) -> dict[str, float]:
    """Seconds and bytes of one step in a process of its own."""
    return finish(start(step, path, *arguments))


def start(step: str, path: Path, *arguments: int) -> subprocess.Popen[str]:
    code = MEASURE.format(root=str(ROOT), step=STEPS[step])
    command = [sys.executable, "-c", code, str(path), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a step ended with exit code {process.returncode}")
    count, seconds, peak = out.split()
    return {"count": int(count), "seconds": float(seconds), "peak_bytes": int(peak)}


def markdown(result: dict[str, Any]) -> str:
    steps = result["steps"]
    load, again = steps["json.load"], steps["second time"]
    lines = [
        "# Opening a training file",
        "",
        f"{result['records']:,} records, {result['bytes'] / 1e9:.2f} GB of JSON "
        f"({result['language']}), {result['cpus']} cores; the index has "
        f"{result['index_bytes'] / 1e6:.1f} MB. Imports are not counted, neither their time nor "
        "their memory.",
        "",
        "| | seconds | memory |",
        "|---|---:|---:|",
    ]
    names = {
        "json.load": "`json.load`",
        "first time": "unillava, the first time (makes the index)",
        "second time": "unillava, from then on",
    }
    for step, name in names.items():
        found = steps[step]
        memory = found["peak_bytes"] / 1e6
        lines.append(f"| {name} | {found['seconds']:.3g} | {memory:,.1f} MB |")
    reads = steps["random reads"]
    workers = result["workers"]
    most = max(worker["peak_bytes"] for worker in workers) / 1e6
    rate = sum(w["count"] / w["seconds"] for w in workers)
    lines += [
        "",
        f"Opening is {load['seconds'] / again['seconds']:,.0f} times as fast as `json.load`. "
        f"A record read at random takes {reads['seconds'] / reads['count'] * 1e6:.0f} µs; "
        f"{len(workers)} processes at once read {rate:,.0f} records per second, each in at most "
        f"{most:,.1f} MB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Real runs through `unillava launch`: two processes, two machines, signals, deaths, scripts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cross.conftest import environment
from unillava.training import state

ROOT = Path(__file__).parents[3]
BACKENDS = ("torch", "mindspore", "paddle")
STEPS, LONG = 4, 60
"""Of a run that comes to its end, and of the one that all are compared with."""
PATIENCE = 400
"""Seconds, for a machine that does ten other things."""


@pytest.fixture(scope="module")
def recipe(tiny, photo, tmp_path_factory) -> Path:
    """A recipe whose batch two processes share."""
    folder = tmp_path_factory.mktemp("launch")
    records = []
    for n in range(16):
        turns = [("human", f"<image>\nWhat is number {n}?"), ("gpt", f"A thing, number {n}.")]
        turns = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(n), "image": str(photo), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    content = {
        "model": {"path": str(tiny("llava"))},
        "data": {
            "files": [{"path": str(folder / "data.json")}],
            "max_length": 256, "workers": 0, "pad_to": 128,
        },
        "rates": {"language": 1e-4, "projector": 1e-4},
        "steps": {"batch": 4, "micro_batch": 2, "max_steps": STEPS},
        # So that a run is the beginning of every longer one.
        "optimizer": {"schedule": "constant", "warmup_ratio": 0.0},
        # What is tried here is launching; compiling a graph would take most of the time.
        "running": {"compiled": False, "precision": "float32"},
        "saving": {"every": 1000},
        "output": str(folder / "never"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def launch(recipe: Path, output: Path, backend: str, *options: str, **overrides) -> list[str]:
    """The command of a run whose logs lie beside its output."""
    words = [sys.executable, "-m", "unillava", "launch", "--backend", backend, "--device", "cpu"]
    logs = options if "--logs" in options else (*options, "--logs", str(output) + "-logs")
    changes = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return [*words, *logs, "--", "train", str(recipe), f"output={output}", *changes]


def clean() -> dict[str, str]:
    """The environment without what another launcher may have left; this Python for scripts."""
    kept = {k: v for k, v in environment().items() if k not in ("UNILLAVA_BACKEND", "RECIPE")}
    return kept | {"PYTHON": sys.executable}


def run(command: list[str], code: int = 0, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=clean(), cwd=cwd,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(output: Path) -> list[float]:
    path = output / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry["loss"] for entry in map(json.loads, lines)]


def assert_begins_like(found: Path, steps: int, expected: Path) -> None:
    """The losses are the same but for the order in which things are added."""
    assert len(losses(found)) == steps <= LONG
    pairs = zip(losses(found), losses(expected)[:steps], strict=True)
    assert max(abs(a / b - 1) for a, b in pairs) <= 1e-4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    """The uninterrupted run of one process on torch."""
    output = tmp_path_factory.mktemp("alone") / "out"
    run(launch(recipe, output, "torch", steps__max_steps=LONG))
    return output


class Started:
    """A run that goes on until somebody stops it."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.output = output
        self.text = output.with_name(output.name + ".txt")
        with self.text.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=clean(), cwd=ROOT
            )

    def wait_for_step(self, number: int) -> None:
        end = time.monotonic() + PATIENCE
        while len(losses(self.output)) < number:
            assert self.process.poll() is None and time.monotonic() < end, self.text.read_text()
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        return self.process.wait(PATIENCE), self.text.read_text()

    def workers(self) -> list[tuple[int, dict[str, str]]]:
        """The processes that train, and their environments."""
        return [(pid, e) for pid, e in descendants(self.process.pid) if rank_of(e) is not None]


def descendants(parent: int) -> Iterator[tuple[int, dict[str, str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        pid = int(folder.name)
        known = dict(word.partition("=")[::2] for word in words)
        # `python [-u] -m unillava train …`: neither a launcher nor what shows its log.
        trains = command[command.index("unillava") + 1 :][:1] if "unillava" in command else []
        plain = (
            "torch.distributed.run" not in command and "paddle.distributed.launch" not in command
        )
        yield pid, known if trains == ["train"] and plain else {}
        yield from descendants(pid)


def rank_of(variables: dict[str, str]) -> int | None:
    if variables.get("MS_ROLE") == "MS_SCHED":
        return None
    for name in ("RANK", "PADDLE_TRAINER_ID", "RANK_ID"):
        if name in variables:
            return int(variables[name])
    return None


# --- two processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_run_goes_on_and_equals_that_of_one_process(recipe, alone, tmp_path, backend):
    """SIGTERM to `launch`: both ranks save and leave; launched again, it goes on to the end."""
    output = tmp_path / "out"
    endless = launch(recipe, output, backend, "--nproc", "2", steps__max_steps=100000)
    started = Started(endless, output)
    started.wait_for_step(2)
    assert sorted(rank_of(variables) for _, variables in started.workers()) == [0, 1]
    started.process.send_signal(signal.SIGTERM)
    code, text = started.end()
    assert code == 143 and "stopped by" in text, text
    saved = state.find_latest(output)
    assert saved is not None and saved.step == len(losses(output))
    steps = saved.step + 2
    shown = run(launch(recipe, output, backend, "--nproc", "2", steps__max_steps=steps))
    assert f"going on from {saved.path}" in shown
    assert_begins_like(output, steps, alone)
    assert (output / "final" / "config.json").is_file()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_dies_ends_the_run_and_is_shown(recipe, tmp_path, backend):
    output = tmp_path / "out"
    command = launch(recipe, output, backend, "--nproc", "2", steps__max_steps=100000)
    started = Started(command, output)
    started.wait_for_step(1)
    workers = started.workers()
    (victim,) = (pid for pid, variables in workers if rank_of(variables) == 1)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    code, text = started.end()
    assert code not in (0, 143) and "a worker failed before the others" in text, text
    assert time.monotonic() - began < 60
    logs = Path(f"{output}-logs")
    names = {"torch": "stderr.log", "mindspore": "worker_1.log", "paddle": "workerlog.1"}
    (log,) = (path for path in logs.rglob(names[backend]) if "/0/" not in str(path))
    assert f"the end of its log, {log}" in text
    assert not any(Path(f"/proc/{pid}").exists() for pid, _ in workers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_of_a_rank_is_shown(recipe, tmp_path, backend):
    """A fault that only the workers find stands in the last lines on the screen."""
    command = launch(recipe, tmp_path / "out", backend, "--nproc", "2", model__path="/nowhere")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=clean(), cwd=ROOT,
        check=False,
    )  # fmt: skip
    # 2, unless the launcher was quicker to collect the worker than `launch` to look at it.
    assert done.returncode in (1, 2), done.stdout + done.stderr
    told = done.stderr[done.stderr.index("a worker failed before the others") :]
    assert "/nowhere" in told


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_a_deepspeed_file_chooses_the_strategy(recipe, alone, tmp_path, name):
    """By the recipe's `running.deepspeed` alone, on torchrun; clipping stays the recipe's."""
    output = tmp_path / "out"
    file = ROOT / "configs" / "deepspeed" / f"{name}.json"
    shown = run(launch(recipe, output, "torch", "--nproc", "2", running__deepspeed=file))
    assert_begins_like(output, STEPS, alone)
    assert "final" in shown


# --- two machines ----------------------------------------------------------------------------

CABLE = """
set -eu
ip link set lo up
unshare -n sleep 600 & other=$!
trap 'kill $other ${second:-} 2>/dev/null || true' EXIT
sleep 0.3
ip link add one type veth peer name two netns $other
ip addr add 10.77.0.1/24 dev one
ip link set one up
nsenter -t $other -n sh -c 'ip link set lo up; ip addr add 10.77.0.2/24 dev two; ip link set two up'
[ $# -eq 0 ] && exit
nsenter -t $other -n "$@" --node-rank 1 $AFTER >"$TEXT" 2>&1 & second=$!
"$@" --node-rank 0 $AFTER
wait $second
"""
"""Runs a command in two networks that a cable joins: two machines with addresses of their own."""


def cable(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", CABLE, "bash", *command]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=PATIENCE, env=clean() | variables, cwd=ROOT,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_machines(recipe, alone, tmp_path, backend):
    """Two launches with a network each; MindSpore's cannot share one, since both would begin a
    scheduler."""
    try:
        allowed = cable().returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("this system does not let one make networks")
    output, text = tmp_path / "out", tmp_path / "second.txt"
    both = ("--nproc", "1", "--nnodes", "2", "--master", "10.77.0.1:29517")
    command = launch(recipe, output, backend, *both)
    place = command.index("--")
    done = cable(*command[:place], AFTER=" ".join(command[place:]), TEXT=str(text))
    assert done.returncode == 0, done.stdout + done.stderr + text.read_text()
    assert_begins_like(output, STEPS, alone)


@pytest.mark.parametrize("backend", ["torch", "paddle"])
def test_two_launches_on_one_machine(recipe, alone, tmp_path, backend):
    output, master = tmp_path / "out", f"127.0.0.1:{free_port()}"
    options = ("--nproc", "1", "--nnodes", "2", "--master", master)
    nodes = [
        Started(
            launch(recipe, output, backend, *options, "--node-rank", str(rank), "--logs",
                   str(tmp_path / f"logs-{rank}")),
            tmp_path / f"node-{rank}",
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for node in nodes:
        code, text = node.end()
        assert code == 0, text
    assert_begins_like(output, STEPS, alone)


# --- the scripts of the old systems ----------------------------------------------------------


def script(name: str, *arguments: str) -> list[str]:
    return ["bash", str(ROOT / "scripts" / name), *map(str, arguments)]


def test_the_scripts_of_llava_train_in_two_stages(recipe, tiny, tmp_path):
    """pretrain.sh, then finetune.sh and finetune_lora.sh from its projector: LLaVA's arguments."""
    data = yaml.safe_load(recipe.read_text())["data"]["files"][0]["path"]
    part = str(tiny("llava"))
    common = [
        *("--data_path", data, "--vision_tower", part, "--model_max_length", "256"),
        *("--per_device_train_batch_size", "2", "--max_steps", "2", "--bf16", "False"),
        *("--dataloader_num_workers", "0", "--learning_rate", "1e-3", "--logging_steps", "1"),
        *("--nproc", "1", "--device", "cpu", "data.pad_to=128", f"model.language={part}"),
    ]
    first = tmp_path / "first"
    run(script("pretrain.sh", *common, "--tune_mm_mlp_adapter", "True", "--output_dir", first))
    projector = first / "final" / "mm_projector.bin"
    assert projector.is_file()
    common += ["--pretrain_mm_mlp_adapter", str(projector)]
    run(script("finetune.sh", *common, "--output_dir", tmp_path / "second"))
    assert (tmp_path / "second" / "final" / "config.json").is_file()
    lora = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8"]
    run(script("finetune_lora.sh", *common, *lora, "--output_dir", tmp_path / "third"))
    assert list((tmp_path / "third").rglob("adapter_config.json"))


def test_msrun_launcher_trains_with_the_form_of_six_arguments(recipe, alone, tmp_path):
    output, logs = tmp_path / "out", tmp_path / "logs"
    command = f"train {recipe} output={output} --device cpu"
    shown = run(script("msrun_launcher.sh", command, 2, free_port(), logs, "True", 300))
    assert "msrun" in shown and (logs / "worker_1.log").is_file()
    assert_begins_like(output, STEPS, alone)

"""The recipes of configs/: what the old systems trained with, and that each one can be run.

The table below was typed from the scripts and configuration files of those systems, not from the
recipes. A dry run puts tiny models of the same families and tiny data in the places of the real.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.neutral.test_dialect_moss2 import DYNAMIC, moss2_alone
from unillava.cli.app import build_app
from unillava.cli.train import show
from unillava.errors import ConfigError
from unillava.training.recipe import Recipe, load_recipe
from unillava.training.run import Plan, make_plan, read_deepspeed, strategy_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Row:
    """One run of an old system."""

    base: str
    """Language model, or the whole model."""
    template: str
    aspect: str | None
    per_device: int
    devices: int
    accumulation: int
    rates: tuple[float | None, float | None, float | None]
    """Language model, projector, tower; None: frozen."""
    length: int = 2048
    save: int = 500
    tower: str | None = "openai/clip-vit-large-patch14-336"
    projector: str = "mlp2x_gelu"
    family: str = "llava"
    epochs: float = 1.0
    max_steps: int | None = None
    keep: int = 1
    grouped: bool = False
    lora: tuple[int, int, float] | None = None
    """Rank, alpha, dropout."""
    bits: int = 16
    zero: str | None = None
    clip: float | None = None
    precision: str = "bfloat16"
    seed: int = 42
    mean_of_means: bool = True
    second_stage: bool = False
    """Begins with a projector that was trained before."""


CLIP_224 = "openai/clip-vit-large-patch14"
ONE = {"template": "plain", "aspect": "square"}


def llava_v1_5(base: str) -> dict[str, Row]:
    size = "13b" if "13b" in base else "7b"
    two: dict[str, Any] = {
        "base": base, "template": "vicuna_v1", "aspect": "pad", "per_device": 16, "devices": 8,
        "accumulation": 1, "save": 50000, "grouped": True, "second_stage": True,
    }  # fmt: skip
    return {
        f"pretrain_{size}": Row(
            base, **ONE, per_device=32, devices=8, accumulation=1, rates=(None, 1e-3, None),
            save=24000, zero="zero2",
        ),
        f"finetune_{size}": Row(**two, rates=(2e-5, 2e-5, None), zero="zero3"),
        f"lora_{size}": Row(**two, rates=(2e-4, 2e-5, None), zero="zero3", lora=(128, 256, 0.05)),
        f"qlora_{size}": Row(**two, rates=(2e-5, 2e-5, None), lora=(64, 16, 0.05), bits=4),
    }  # fmt: skip


def open_llava_next(name: str, base: str, template: str, length: int, save: tuple[int, int]):
    both: dict[str, Any] = {
        "base": base, "aspect": "anyres", "family": "llava_next", "devices": 32,
        "accumulation": 1, "length": length, "zero": "zero2",
    }  # fmt: skip
    return {
        f"pretrain_{name}": Row(
            **both, template="plain", per_device=8, rates=(None, 1e-3, None), save=save[0]
        ),
        f"finetune_{name}": Row(
            **both, template=template, per_device=4, rates=(2e-5, 2e-5, 2e-6), save=save[1],
            grouped=True, second_stage=True,
        ),
    }  # fmt: skip


def mindformers(stage: int) -> Row:
    base = "llava-hf/LLaVA-NeXT-Video-7B-hf"
    return Row(
        base if stage == 2 else "checkpoints/llava-next-video-7b-stage2/final", "vicuna_v1", None,
        1, 8, 1, (2e-6, 2e-6, 2e-6), length=4096, save=8000, keep=3, tower=None, clip=1.0, seed=0,
        mean_of_means=False,
    )  # fmt: skip


def paddlemix() -> dict[str, Row]:
    all_three: dict[str, Any] = {
        "per_device": 1, "devices": 8, "accumulation": 1, "save": 100, "clip": 1.0,
        "precision": "float32",
    }  # fmt: skip
    rows = {
        "pretrain_v1_5": Row("lmsys/vicuna-13b-v1.5", **ONE, **all_three, rates=(None, 1e-3, None))
    }
    models = {"v1_5": "liuhaotian/llava-v1.5-7b", "v1_6": "liuhaotian/llava-v1.6-vicuna-7b"}
    for version, base in models.items():
        whole = {"base": base, "template": "vicuna_v1", "aspect": None, "tower": None, **all_three}
        rows[f"sft_{version}"] = Row(**whole, rates=(2e-5, 2e-5, None))
        rows[f"lora_{version}"] = Row(**whole, rates=(2e-4, 2e-5, None), lora=(128, 256, 0.0))
    return rows


MOSS2 = {"base": "fnlp/moss2-2_5b-chat", "devices": 8, "accumulation": 2, "keep": 5}
KO_VICUNA = {"base": "junelee/ko_vicuna_7b", "tower": CLIP_224, "projector": "linear"}
KO_LLAMA2 = {"base": "kfkas/Llama-2-ko-7b-Chat", "tower": CLIP_224, "projector": "linear"}
SYNATRA = {"base": "maywell/Synatra-7B-v0.3-dpo", "devices": 8, "accumulation": 1}
KO_MISTRAL = {
    "template": "kollava_mistral_training", "aspect": "pad", "per_device": 16, "grouped": True,
    "zero": "zero3", "save": 50000, "second_stage": True,
}  # fmt: skip
LIGHTNING = {
    "base": "lmsys/vicuna-7b-v1.1", "template": "vicuna_v1", "aspect": "square",
    "tower": CLIP_224, "projector": "linear", "per_device": 16, "devices": 8, "accumulation": 1,
    "clip": 1.0,
}  # fmt: skip
FOUR_BITS = {"lora": (64, 16, 0.05), "bits": 4}
TABLE: dict[str, dict[str, Row]] = {
    "llava_v1_5": llava_v1_5("lmsys/vicuna-7b-v1.5") | llava_v1_5("lmsys/vicuna-13b-v1.5"),
    "open_llava_next": {
        **open_llava_next("vicuna_7b", "lmsys/vicuna-7b-v1.5", "vicuna_v1", 4096, (24000, 50000)),
        **open_llava_next(
            "llama3_8b", "meta-llama/Meta-Llama-3-8B-Instruct", "llava_llama_3", 6144, (7975, 7975)
        ),
    },
    "llava_next_video": {"stage2_7b": mindformers(2), "stage3_7b": mindformers(3)},
    "paddlemix": paddlemix(),
    "llava_moss2": {
        "pretrain": Row(
            **MOSS2, **ONE, per_device=16, rates=(None, 2e-3, None), zero="zero2", save=1000,
            max_steps=5000,
        ),
        "finetune": Row(
            **MOSS2, template="llava_llama_2", aspect="square", per_device=4, zero="zero2",
            rates=(2e-5, 2e-5, None), save=2000, max_steps=10000, second_stage=True,
        ),
    },
    "kollava": {
        "v0_pretrain_7b": Row(
            **KO_VICUNA, template="v0_training", aspect="square", per_device=32, devices=4,
            accumulation=1, rates=(None, 2e-3, None), save=2400, clip=1.0,
        ),
        "v0_finetune_7b": Row(
            **KO_VICUNA, template="v0_training", aspect="square", per_device=16, devices=4,
            accumulation=1, rates=(2e-5, 2e-5, None), save=1500, clip=1.0, second_stage=True,
        ),
        "llama2_pretrain_7b": Row(
            **KO_LLAMA2, **ONE, per_device=16, devices=4, accumulation=2, clip=1.0, save=2400,
            rates=(None, 2e-3, None), zero="zero3_offload",
        ),
        "llama2_qlora_7b": Row(
            **KO_LLAMA2, **FOUR_BITS, template="llava_llama_2", aspect="square", per_device=16,
            devices=4, accumulation=2, rates=(2e-4, None, None), save=1500, second_stage=True,
        ),
        "v1_5_pretrain_7b": Row(
            **SYNATRA, **ONE, per_device=32, rates=(None, 1e-3, None), save=24000, zero="zero2"
        ),
        "v1_5_finetune_7b": Row(**SYNATRA, **KO_MISTRAL, rates=(2e-5, 2e-5, None)),
        "v1_5_lora_7b": Row(
            **SYNATRA, **KO_MISTRAL, rates=(2e-4, 2e-5, None), lora=(128, 256, 0.05)
        ),
    },
    "llava_lightning": {
        "pretrain_7b": Row(**LIGHTNING, rates=(None, 2e-3, None), save=2400),
        "finetune_7b": Row(**LIGHTNING, rates=(2e-5, 2e-5, None), save=1500, second_stage=True),
    },
}  # fmt: skip
ROWS = {f"{system}/{name}": row for system, rows in TABLE.items() for name, row in rows.items()}
WARM_UP, COSINE, BETAS, EPS, DECAY = 0.03, "cosine", (0.9, 0.999), 1e-8, 0.0
"""The same in all of them."""


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(CONFIGS / f"{name}.yaml", overrides)


def test_every_recipe_is_in_the_table():
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.yaml")}
    found -= {"quickstart/pretrain", "quickstart/finetune"}  # scripts/quickstart.sh runs these
    assert found == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_hyper_parameters_are_those_of_the_old_system(name):
    row, recipe = ROWS[name], recipe_of(name)
    model, steps, optimizer = recipe.model, recipe.steps, recipe.optimizer
    running, lora = recipe.running, recipe.lora
    assert row.base == (model.language if row.tower else model.path)
    assert row.tower == model.vision
    assert model.template == row.template and model.image_mode == row.aspect
    assert model.projector == row.projector and model.family == row.family
    assert bool(model.pretrain_mm_mlp_adapter) == row.second_stage
    rates = (recipe.rates.language, recipe.rates.projector, recipe.rates.vision)
    assert rates == row.rates
    assert steps.batch == row.per_device * row.devices * row.accumulation
    assert steps.micro_batch == row.per_device
    assert (steps.epochs, steps.max_steps) == (row.epochs, row.max_steps)
    assert recipe.data.max_length == row.length
    assert (recipe.data.group_by == "modality_length") == row.grouped
    assert (optimizer.schedule, optimizer.warmup_ratio) == (COSINE, WARM_UP)
    assert (optimizer.beta1, optimizer.beta2) == BETAS and optimizer.warmup_steps is None
    assert (optimizer.eps, optimizer.weight_decay, optimizer.floor) == (EPS, DECAY, 0.0)
    assert optimizer.clip_norm == row.clip
    assert (optimizer.normalise == "micro_batch") == row.mean_of_means
    assert (lora and (lora.rank, lora.alpha, lora.dropout)) == row.lora
    assert (lora.base if lora else "full") == ("nf4" if row.bits == 4 else "full")
    assert running.deepspeed == (row.zero and f"configs/deepspeed/{row.zero}.json")
    assert (running.precision, running.recompute, running.seed) == (row.precision, True, row.seed)
    assert (recipe.saving.every, recipe.saving.keep) == (row.save, row.keep)


def test_what_only_some_systems_say():
    """MindFormers recomputes 16 layers and keeps the order of the file; the rounding of anyres."""
    for stage in (2, 3):
        recipe = recipe_of(f"llava_next_video/stage{stage}_7b")
        assert recipe.running.recompute_layers == 16 and recipe.data.num_frames == 16
        assert not recipe.data.shuffle and recipe.data.workers == 8
    for name, row in ROWS.items():
        recipe = recipe_of(name)
        assert recipe.model.anyres_variant == ("llava" if row.aspect == "anyres" else None)
        if "next_video" not in name:
            assert recipe.data.shuffle and recipe.data.workers == 4
            assert recipe.running.recompute_layers is None


# --- the header ------------------------------------------------------------------------------


def header_of(name: str) -> str:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("#")]
    return "\n".join(line.removeprefix("#").strip() for line in lines)


@pytest.mark.parametrize("name", ROWS)
def test_the_header_says_what_it_takes_and_how_it_is_run(name, monkeypatch, capsys):
    header, row = header_of(name), ROWS[name]
    for fact in ("models", "data", "devices", "memory"):
        assert re.search(rf"^{fact} +\S", header, re.M), fact
    found = re.search(r"^command +unillava (launch .*)$", header, re.M)
    assert found, header
    words = shlex.split(found[1].replace("rank K", "rank 0").replace("HOST:", "127.0.0.1:"))
    assert words[-1] == f"configs/{name}.yaml"
    nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    assert nodes * int(words[words.index("--nproc") + 1]) == row.devices
    monkeypatch.chdir(ROOT)
    for variable in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    build_app()(["launch", "--print", *words[1:]], standalone_mode=False)
    assert f"configs/{name}.yaml" in capsys.readouterr().out


# --- dry runs --------------------------------------------------------------------------------


Stand = Callable[[str], dict[str, str]]


@pytest.fixture(scope="session")
def stand(tiny, photo, tmp_path_factory) -> Stand:
    """Overrides that put tiny things of the same kind in the places of the real ones."""
    from unillava.tiny import build_tiny
    from weight_convert.convert import convert

    folder = tmp_path_factory.mktemp("stand")
    build_tiny(folder / "moss", "llava", "llama", config={"text_config": DYNAMIC})
    moss2_alone(folder / "moss2", folder / "moss")
    pairs = [[["<image>\nWhat?", "A ship."]], [["Say one.", "One."]]]
    turns = [[("human", q), ("gpt", a)] for [[q, a]] in pairs]
    likes = [[{"from": who, "value": text} for who, text in turn] for turn in turns]
    files = {"pairs": pairs, "turns": likes}
    for name, conversations in files.items():
        records = [
            {"id": str(n), "conversations": conversations[n % 2]}
            | ({"image": str(photo)} if n % 2 == 0 else {})
            for n in range(12)
        ]
        (folder / f"{name}.json").write_text(json.dumps(records))

    def language(base: str) -> Path:
        if "moss2" in base:
            return folder / "moss2"
        kinds = {"Llama-3": "llama3", "Synatra": "mistral"}
        return tiny("llava", next((t for name, t in kinds.items() if name in base), "llama"))

    def projector(source: Path, kind: str) -> Path:
        target = folder / f"{source.name}-{kind}.bin"
        if not target.exists():
            if kind == "linear":
                config = {"unillava": {"projector": "linear"}}
                source = build_tiny(folder / target.stem, "llava", "llama", config=config)
            convert(source, target, "projector")
        return target

    def overrides(name: str) -> dict[str, str]:
        recipe = recipe_of(name)
        model = recipe.model
        changes = {"output": str(folder / "never")}
        if model.path:
            family = "llava_next_video" if "video" in name else "llava"
            family = "llava_next" if "v1_6" in name else family
            changes["model.path"] = str(tiny(family))
        else:
            text = language(model.language)
            changes["model.language"], changes["model.vision"] = str(text), str(tiny("llava"))
            if model.pretrain_mm_mlp_adapter:
                source = folder / "moss" if text.name == "moss2" else text
                adapter = projector(source, model.projector)
                changes["model.pretrain_mm_mlp_adapter"] = str(adapter)
        records = "pairs" if name.startswith("paddlemix") else "turns"
        changes["data.files"] = json.dumps([{"path": str(folder / f"{records}.json")}])
        return changes

    return overrides


def plan_of(name: str, stand: Stand) -> Plan:
    changes = [f"{key}={value}" for key, value in stand(name).items()]
    return make_plan(recipe_of(name, *changes))


@pytest.mark.parametrize("name", ROWS)
def test_a_dry_run_with_tiny_stand_ins(name, stand, capsys):
    row, plan = ROWS[name], plan_of(name, stand)
    parts = ("language", "projector", "vision")
    wanted = {part: rate for part, rate in zip(parts, row.rates, strict=True) if rate is not None}
    assert plan.rates == wanted
    spec = plan.checkpoint.spec
    assert spec.template == row.template
    if row.aspect is not None:
        assert spec.image_mode == row.aspect and spec.family == row.family
    assert spec.projector.depth == (1 if row.projector == "linear" else 2)
    assert len(plan.records) == 12
    show(plan)
    shown = capsys.readouterr().out
    for part, rate in wanted.items():
        assert part in shown and re.search(rf"\b{rate:g}\b", shown), shown
    assert not Path(plan.recipe.output).exists()


def test_open_llava_next_has_the_tiles_and_the_rounding_of_the_original(stand):
    """Grids of 1x2, 2x1, 2x2, 3x1 and 1x3 tiles, unpadded, a newline at the end of each row."""
    spec = plan_of("open_llava_next/finetune_vicuna_7b", stand).checkpoint.spec
    side = spec.vision.image_size
    tiles = {(height // side, width // side) for height, width in spec.grid_pinpoints}
    assert tiles == {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)}
    assert spec.unpad and spec.has_newline and spec.anyres_variant == "llava"


def test_moss2_is_not_cut_short_by_its_epochs(stand):
    """`max_steps` rules: 5000 and 10000 updates, however many the data would give."""
    assert plan_of("llava_moss2/pretrain", stand).schedule.total_steps == 5000
    assert plan_of("llava_moss2/finetune", stand).schedule.total_steps == 10000


# --- DeepSpeed -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_deepspeed_files_have_none_of_the_old_faults(name):
    """The old ones left clipping out, brought a schedule of their own, and misspelt a key."""
    content = json.loads((CONFIGS / "deepspeed" / f"{name}.json").read_text())
    zero = content["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert content["gradient_clipping"] == "auto"
    assert "scheduler" not in content and "optimizer" not in content
    assert "gather_16bit_weights_on_model_save" not in zero
    assert ("stage3_gather_16bit_weights_on_model_save" in zero) == name.startswith("zero3")
    offloaded = [zero.get(f"offload_{part}", {}).get("device") for part in ("optimizer", "param")]
    assert offloaded == (["cpu", "cpu"] if name.endswith("offload") else [None, None])


@pytest.mark.parametrize(
    ("backend", "world", "expected"),
    [
        ("torch", 8, "zero3"),
        ("mindspore", 8, "zero1"),
        ("paddle", 8, "zero1"),
        ("torch", 1, "single"),
    ],
)
def test_one_recipe_is_shared_out_on_every_backend(monkeypatch, backend, world, expected):
    """`auto`: the stage of the DeepSpeed file, or the nearest to it that a backend has."""
    import backends

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(backends, "NAME", backend, raising=False)
    recipe = recipe_of("llava_v1_5/finetune_7b")
    assert strategy_of(recipe, world) == expected
    assert strategy_of(recipe_of("llava_v1_5/finetune_7b", "running.strategy=fsdp"), 8) == "fsdp"
    plain = recipe_of("llava_v1_5/finetune_7b", "running.deepspeed=null")
    assert strategy_of(plain, world) == ("single" if world == 1 else "ddp")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("{}", "zero_optimization"),
        ('{"zero_optimization": {"stage": 1}}', "stage 1"),
    ],
)
def test_a_deepspeed_file_that_is_none(tmp_path, content, told):
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(str(path))
    assert told in str(caught.value) and "running.deepspeed" in str(caught.value)


RECOMPUTED = """
import sys
import backends
runtime = backends.select("torch", device="cpu", dtype="float32")
from unillava.checkpoint import open_checkpoint
from unillava.training.recipe import load_recipe
from unillava.training.run import build_network
found = []
runtime.recompute = found.append
for overrides in ([], ["running.recompute_layers=1"], ["running.recompute=false"]):
    found.clear()
    recipe = load_recipe(sys.argv[1], overrides)
    network = build_network(open_checkpoint(sys.argv[2]), [], recipe)
    layers = list(network.language_model.model.layers)
    print([layers.index(block) for block in found], len(layers))
"""


def test_the_first_layers_alone_are_recomputed(tiny):
    """MindFormers' `recompute: [16]`."""
    path = str(CONFIGS / "llava_v1_5" / "finetune_7b.yaml")
    done = subprocess.run(
        [sys.executable, "-c", RECOMPUTED, path, str(tiny("llava"))],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    count = int(lines[0].split()[-1])
    assert lines == [f"{list(range(count))} {count}", f"[0] {count}", f"[] {count}"]

"""The arguments of LLaVA's training scripts, as changes of a recipe.

    --model_name_or_path lmsys/vicuna-7b-v1.5 --per_device_train_batch_size 16 …

What is not said stays as the recipe has it. An argument that changes what is computed and has no
place in a recipe is an error; one that only changed how the old program ran is named and left out.

Source: haotian-liu/LLaVA llava/train/train.py and scripts/; Open-LLaVA-NeXT; LLaVA-NeXT.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unillava.errors import RequestError
from unillava.training.recipe import Recipe

Values = Mapping[str, str]
SHIPPED = Path(__file__).parents[2] / "configs" / "deepspeed"
"""Where the old scripts' DeepSpeed files are, by the same names and without their faults."""

DIRECT = {
    "output_dir": "output",
    "vision_tower": "model.vision",
    "pretrain_mm_mlp_adapter": "model.pretrain_mm_mlp_adapter",
    "mm_projector_type": "model.projector",
    "image_aspect_ratio": "model.image_mode",
    "version": "model.template",
    "model_max_length": "data.max_length",
    "dataloader_num_workers": "data.workers",
    "frames_upbound": "data.num_frames",
    "num_train_epochs": "steps.epochs",
    "max_steps": "steps.max_steps",
    "per_device_train_batch_size": "steps.micro_batch",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip_norm",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_ratio": "optimizer.warmup_ratio",
    "warmup_steps": "optimizer.warmup_steps",
    "gradient_checkpointing": "running.recompute",
    "seed": "running.seed",
    "save_steps": "saving.every",
    "save_total_limit": "saving.keep",
    "logging_steps": "logging.every",
    "run_name": "logging.name",
}
"""Argument -> key of the recipe with the same meaning and values."""
ONLY = {
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "bits": ("16", "8", "4"),
    "quant_type": ("nf4",),
    "mm_vision_select_layer": ("-2",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": ("false",),
    "mm_use_im_patch_token": ("false",),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "lora_bias": ("none",),
    "lora_weight_path": ("",),
    "lora_qv_proj_only": ("true", "false"),
    "is_multimodal": ("true",),
}
"""Argument -> the values that there is a way to follow."""
ELSEWHERE = (
    *("data_path", "image_folder", "video_folder", "model_name_or_path", "learning_rate"),
    *("gradient_accumulation_steps", "mm_projector_lr", "mm_vision_tower_lr", "deepspeed", "fsdp"),
    *("unfreeze_mm_vision_tower", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"),
    *("freeze_backbone", "bf16", "fp16", "group_by_modality_length", "report_to"),
    *("mm_tunable_parts",),
    *("lora_enable", "lora_r", "lora_alpha", "lora_dropout"),
)
"""Arguments that `translate` has functions for."""
WITHOUT_EFFECT = (
    *("lazy_preprocess", "evaluation_strategy", "eval_strategy", "per_device_eval_batch_size"),
    *("save_strategy", "tf32", "remove_unused_columns", "local_rank", "cache_dir", "do_train"),
    *("fsdp_transformer_layer_cls_to_wrap", "attn_implementation", "mpt_attn_impl", "logging_dir"),
    *("ddp_find_unused_parameters", "dataloader_drop_last", "overwrite_output_dir"),
    *("dataloader_pin_memory", "verbose_logging", "double_quant"),
)
"""They said how the old program ran, or what is always so here."""
NOTHING = ("none", "")
"""How the old scripts say that something is not there."""
ROUTES = ("bf16", "fp16")
TUNABLE = {
    "mm_language_model": "language",
    "mm_mlp_adapter": "projector",
    "mm_vision_tower": "vision",
}
"""Name in --mm_tunable_parts -> part."""
BASES = {"16": "full", "8": "int8", "4": "nf4"}
"""--bits -> how the frozen matrices are stored."""


@dataclass(frozen=True)
class Translation:
    """What the arguments come to."""

    overrides: tuple[str, ...]
    """KEY=VALUE, as `unillava train` takes them."""
    left_out: tuple[str, ...]
    """Arguments without an effect here."""


def translate(
    arguments: Sequence[str], recipe: Recipe, *, backend: str = "torch", processes: int = 1
) -> Translation:
    """LLaVA's arguments as overrides of a recipe.

    Args:
        arguments: `--name value` or `--name=value`; `key.inner=value` is passed on as it stands.
        recipe: what they are put over: a part that it freezes stays so unless an argument says
            that it is trained.
        backend: torch alone has DeepSpeed.
        processes: of all machines together, for the global batch.

    Raises:
        RequestError: an argument that is unknown, incomplete or cannot be followed.
    """
    values, passed = read_arguments(arguments)
    _check(values)
    changes: dict[str, Any] = {
        key: _plain(values[name]) for name, key in DIRECT.items() if name in values
    }
    if changes.get("steps.max_steps") == -1:
        changes["steps.max_steps"] = None
    changes |= _model(values, recipe) | _rates(values, recipe)
    changes |= _data(values) | _lora(values) | _running(values, backend) | _logging(values)
    changes |= _steps(values, processes)
    left_out = tuple(name for name in values if name in WITHOUT_EFFECT)
    return Translation((*_overrides(changes), *passed), left_out)


def _check(values: Values) -> None:
    for name, allowed in ONLY.items():
        if name in values and values[name].lower() not in allowed:
            raise RequestError(
                f"--{name} {values[name]} cannot be followed",
                expected=" or ".join(allowed) or "nothing",
                fix="see docs/training.md for what a recipe can say",
            )
    tiled = values.get("image_aspect_ratio") == "anyres"
    if tiled and values.get("mm_patch_merge_type") == "flat":
        raise RequestError(
            "--mm_patch_merge_type flat with tiled pictures cannot be followed",
            expected="spatial_unpad",
        )


def _steps(values: Values, processes: int) -> dict[str, Any]:
    if "per_device_train_batch_size" in values:
        accumulation = _number(values, "gradient_accumulation_steps", 1)
        each = _number(values, "per_device_train_batch_size", 1)
        return {"steps.batch": each * accumulation * processes}
    if "gradient_accumulation_steps" in values:
        raise RequestError(
            "--gradient_accumulation_steps without --per_device_train_batch_size",
            fix="give both: their product with the number of processes is the batch",
        )
    return {}


def read_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(argument -> value, overrides that stood among them).

    Raises:
        RequestError: unknown, or without a value.
    """
    values: dict[str, str] = {}
    passed: list[str] = []
    words = list(arguments)
    known = {*DIRECT, *ONLY, *ELSEWHERE, *WITHOUT_EFFECT}
    while words:
        word = words.pop(0)
        if re.match(r"[a-z][\w.]*=", word):
            passed.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise RequestError(
                f"{word} is not known",
                expected="--name value of LLaVA's scripts, or key=value of a recipe",
                fix=f"did you mean --{near[0]}?" if near else None,
            )
        if not equals:
            # transformers reads a bare `--flag` as true; values may begin with a single minus.
            value = words.pop(0) if words and not words[0].startswith("--") else "True"
        values[name] = value
    return values, passed


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    """JSON is YAML, so every value survives; -0.5 and 1e-05 read as they are."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def _plain(text: str) -> Any:
    """A value as transformers' parser understands it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in NOTHING:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(values: Values, name: str, otherwise: int) -> int:
    text = values.get(name, str(otherwise))
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"--{name} cannot be used", given=text, expected="a number above 0")
    return int(text)


def _rate(values: Values, name: str) -> float | None:
    value = _plain(values.get(name, "none"))
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise RequestError(f"--{name} cannot be used", given=values[name], expected="a number")


def _is_on(values: Values, name: str) -> bool:
    return values.get(name, "False").lower() == "true"


# --- parts -----------------------------------------------------------------------------------


def _model(values: Values, recipe: Recipe) -> dict[str, Any]:
    """A whole LLaVA, or the language model of one that is composed."""
    name = values.get("model_name_or_path")
    changes: dict[str, Any] = {}
    if values.get("image_aspect_ratio") == "anyres":
        changes = {"model.family": "llava_next", "model.anyres_variant": "llava"}
    if name is None:
        return changes
    if not is_whole(name, values, recipe):
        return {**changes, "model.language": name, "model.path": None}
    changes |= {"model.path": name, "model.language": None}
    changes |= {} if "vision_tower" in values else {"model.vision": None}
    changes |= {} if "pretrain_mm_mlp_adapter" in values else {_ADAPTER: None}
    return changes


_ADAPTER = "model.pretrain_mm_mlp_adapter"


def is_whole(name: str, values: Values, recipe: Recipe) -> bool:
    """Whether a model has a tower and a projector already.

    A folder says so in its config.json. Of a hub id nothing is known before it is downloaded: it
    is a language model in stage 1 and where a projector is given, and a whole model otherwise, as
    in LLaVA's scripts.
    """
    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        return "mm_hidden_size" in content or "vision_config" in content
    first_stage = recipe.rates.language is None or _is_on(values, "tune_mm_mlp_adapter")
    return not first_stage and "pretrain_mm_mlp_adapter" not in values


def _data(values: Values) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    folder = values.get("image_folder", values.get("video_folder"))
    if "data_path" in values:
        changes["data.files"] = [{"path": values["data_path"], "images": folder}]
    elif folder is not None:
        raise RequestError("a folder of pictures without --data_path", given=folder)
    if "group_by_modality_length" in values:
        grouped = _is_on(values, "group_by_modality_length")
        changes["data.group_by"] = "modality_length" if grouped else "none"
    return changes


def _rates(values: Values, recipe: Recipe) -> dict[str, Any]:
    """--learning_rate is for all parts that are trained; projector and tower may have their own."""
    base = _rate(values, "learning_rate")
    own = {
        "language": base,
        "projector": _rate(values, "mm_projector_lr") or base,
        "vision": _rate(values, "mm_vision_tower_lr") or base,
    }
    changes: dict[str, Any] = {}
    for part, trained in _trained(values, recipe).items():
        present = getattr(recipe.rates, part)
        if trained and own[part] is None and present is None:
            raise RequestError(f"the {part} part is trained, and at no rate", fix=_RATE_FIX)
        rate = (own[part] or present) if trained else None
        if rate != present:
            changes[f"rates.{part}"] = rate
    return changes


_RATE_FIX = "give --learning_rate, or --mm_vision_tower_lr for the tower"


def _trained(values: Values, recipe: Recipe) -> dict[str, bool]:
    """Part -> whether it is trained: as the recipe has it, unless an argument says."""
    if values.get("mm_tunable_parts"):
        wanted = values["mm_tunable_parts"].split(",")
        unknown = [name for name in wanted if name not in TUNABLE]
        if unknown:
            raise RequestError(
                "--mm_tunable_parts cannot be followed",
                given=", ".join(unknown),
                expected=", ".join(TUNABLE),
            )
        return {part: name in wanted for name, part in TUNABLE.items()}
    rates = recipe.rates
    trained = {part: getattr(rates, part) is not None for part in TUNABLE.values()}
    for name, part in _SWITCHES.items():
        if name in values:
            trained[part] = _is_on(values, name) == (part == "vision")
    return trained


_SWITCHES = {
    "tune_mm_mlp_adapter": "language",
    "freeze_backbone": "language",
    "freeze_mm_mlp_adapter": "projector",
    "unfreeze_mm_vision_tower": "vision",
}
"""Argument -> the part that it freezes; the last one sets it free."""


def _lora(values: Values) -> dict[str, Any]:
    if "lora_enable" not in values:
        return {}
    if not _is_on(values, "lora_enable"):
        return {"lora": None}
    changes: dict[str, Any] = {"lora.rank": _number(values, "lora_r", 64)}
    changes["lora.alpha"] = _plain(values.get("lora_alpha", "16"))
    changes["lora.dropout"] = _plain(values.get("lora_dropout", "0.05"))
    changes["lora.base"] = BASES[values.get("bits", "16")]
    if _is_on(values, "lora_qv_proj_only"):
        changes["lora.targets"] = ["*.self_attn.q_proj", "*.self_attn.v_proj"]
    return changes


def _running(values: Values, backend: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if any(name in values for name in ROUTES):
        chosen = {"bf16": "bfloat16", "fp16": "float16"}
        on = [chosen[name] for name in ROUTES if _is_on(values, name)]
        changes["running.precision"] = on[0] if on else "float32"
    if "deepspeed" in values:
        path, stage = _deepspeed(values["deepspeed"])
        changes["running.deepspeed"] = str(path)
        # Elsewhere the nearest to it is chosen.
        changes["running.strategy"] = f"zero{stage}" if backend == "torch" else "auto"
    elif values.get("fsdp"):
        changes["running.strategy"] = "fsdp"
    return changes


def _deepspeed(given: str) -> tuple[Path, int]:
    """(a DeepSpeed configuration, its stage): the file, else ours of that name."""
    path = Path(given)
    if not path.is_file():
        path = SHIPPED / path.name
    try:
        stage = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (OSError, ValueError, LookupError, TypeError):
        stage = None
    if stage not in (2, 3):
        raise RequestError(
            f"--deepspeed {given} cannot be followed",
            given=f"stage {stage}" if stage else "no such file, or none of DeepSpeed",
            expected="a configuration of stage 2 or 3: "
            + ", ".join(sorted(file.name for file in SHIPPED.glob("*.json"))),
        )
    return path, stage


def _logging(values: Values) -> dict[str, Any]:
    if "report_to" not in values:
        return {}
    wanted = values["report_to"]
    return {f"logging.{name}": name in wanted or wanted == "all" for name in _REPORTS}


_REPORTS = ("wandb", "tensorboard")

"""From a recipe to a run: model, groups, data and engine; and from a run to its result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import backends
from unillava.checkpoint import Checkpoint, as_checkpoint, locate
from unillava.data.compat import get_compat
from unillava.data.feed import Feed
from unillava.data.lengths import Ranks, refusal, sample_lengths
from unillava.data.mixture import Entry, choose, parse_strategy, read_mixture
from unillava.data.order import Order
from unillava.data.pipeline import Pipeline
from unillava.data.records import Records
from unillava.errors import CheckpointError, ConfigError, DataError
from unillava.loading import load_pipeline
from unillava.progress import no_bar, progress_bar
from unillava.spec import parameter_table
from unillava.training import state
from unillava.training.groups import PartGroup, rate_by_part, trained_groups, trained_names
from unillava.training.loop import Run
from unillava.training.lora import (
    adapter_source,
    adapter_spec,
    adapter_table,
    first_values,
    in_few_bits,
    spelling_of,
)
from unillava.training.recipe import DataFile, ModelSettings, Recipe
from unillava.training.schedule import Schedule, warmup_steps
from weight_convert.canonical import PROJECTOR, Config
from weight_convert.cast import CODES, cast
from weight_convert.compose import compose
from weight_convert.convert import carry_out, plan
from weight_convert.opening import open_source
from weight_convert.source import Options, Source


@dataclass(frozen=True)
class Plan:
    """A run that was checked and not begun; no framework was needed for it but a tokenizer."""

    recipe: Recipe
    source: Source
    checkpoint: Checkpoint
    groups: list[PartGroup]
    records: Records
    pipeline: Pipeline
    order: Order
    schedule: Schedule

    @property
    def rates(self) -> dict[str, float]:
        """Group -> full learning rate."""
        by_part = rate_by_part(self.recipe.rates)
        return {group.name: by_part[group.part] for group in self.groups}

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Trained parameter -> shape."""
        spec, lora = self.checkpoint.spec, self.recipe.lora
        table = parameter_table(spec) | (adapter_table(spec, lora) if lora else {})
        return {name: table[name] for name in trained_names(self.groups)}


# --- planning --------------------------------------------------------------------------------


def make_plan(recipe: Recipe) -> Plan:
    """Open everything that a recipe names, and work out the run.

    Raises:
        UnillavaError: whatever is absent, damaged or contradictory.
    """
    source = open_model(recipe.model, recipe.running.seed)
    checkpoint = as_checkpoint(source)
    checkpoint.check()
    groups = trained_groups(checkpoint.spec, recipe)
    records = read_records(recipe)
    pipeline = make_pipeline(recipe, checkpoint)
    order = make_order(recipe, records, pipeline)
    steps = recipe.steps.max_steps or order.updates(recipe.steps.epochs)
    optimizer = recipe.optimizer
    warmup = optimizer.warmup_steps
    warmup = warmup_steps(optimizer.warmup_ratio, steps) if warmup is None else warmup
    schedule = Schedule(optimizer.schedule, steps, warmup, optimizer.floor)
    return Plan(recipe, source, checkpoint, groups, records, pipeline, order, schedule)


def open_model(model: ModelSettings, seed: int) -> Source:
    """The model that a run begins with.

    Raises:
        UnillavaError: it cannot be opened or composed.
    """
    vision = locate(model.vision) if model.vision else None
    if model.path is not None:
        options = Options(base=locate(model.base) if model.base else None, vision=vision)
        source = open_source(locate(model.path), options)
    else:
        projector = model.pretrain_mm_mlp_adapter or model.projector
        source = compose(
            vision=vision,
            language=locate(model.language),
            projector=projector,
            family=model.family,
            image_mode=model.image_mode,
            template=model.template,
            seed=seed,
        )
    if model.path is not None and model.pretrain_mm_mlp_adapter:
        source = with_projector(source, Path(model.pretrain_mm_mlp_adapter))
    return replace(source, config=_with_own(source.config, model))


def with_projector(source: Source, path: Path) -> Source:
    """The model with another projector (and newline, if the file has one).

    Raises:
        CheckpointError: it has other tensors or shapes than the model's.
    """
    given = open_source(path, Options(base=source.path))
    chosen = {n: t for n, t in given.tensors.items() if n.startswith((PROJECTOR, "image_newline"))}
    for name, tensor in chosen.items():
        held = source.tensors.get(name)
        if held is None or held.shape != tensor.shape:
            raise CheckpointError(
                f"the projector of {path} does not fit the model",
                given=f"{name} {list(tensor.shape)}",
                expected=f"{list(held.shape)}" if held else "a projector without it",
            )
    return replace(source, tensors={**source.tensors, **chosen})


def _with_own(config: Config, model: ModelSettings) -> Config:
    own = dict(config.get("unillava") or {})
    own |= {"image_mode": model.image_mode} if model.image_mode and model.path else {}
    own |= {"template": model.template} if model.template else {}
    own |= {"anyres_variant": model.anyres_variant} if model.anyres_variant else {}
    return {**config, "unillava": own} if own else config


def read_records(recipe: Recipe) -> Records:
    """The records of all files of a recipe, as sampled.

    Raises:
        DataError: a file cannot be used.
    """
    entries = [entry for file in recipe.data.files for entry in _entries(file)]
    return choose(entries, recipe.running.seed)


def _entries(file: DataFile) -> list[Entry]:
    """A file of records, or what a YAML mixture lists."""
    if file.images is not None and not Path(file.images).is_dir():
        raise DataError(
            "the folder of pictures does not exist", given=file.images, fix="mend data.files.images"
        )
    if not file.path.endswith((".yaml", ".yml")):
        return [Entry(file.path, parse_strategy(file.sample), file.images)]
    if file.sample != "all" or file.images is not None:
        raise ConfigError(
            "a mixture says itself what is taken from which folder",
            given=f"{file.path} with sample {file.sample}, images {file.images}",
            expected="path alone",
        )
    return read_mixture(file.path)


def make_pipeline(recipe: Recipe, checkpoint: Checkpoint) -> Pipeline:
    """What prepares a recipe's samples.

    Raises:
        UnillavaError: no such template or compatibility mode, or a tokenizer that cannot be read.
    """
    pipeline = load_pipeline(
        checkpoint, template=recipe.model.template, num_frames=recipe.data.num_frames
    )
    return get_compat(recipe.data.compat).apply(pipeline)


def make_order(recipe: Recipe, records: Records, pipeline: Pipeline) -> Order:
    """The order in which a recipe's records are learnt. With packing all ranks take part.

    Raises:
        ConfigError: settings that contradict one another.
        DataError: with on_bad `stop`, a record that cannot be used.
    """
    data = recipe.data
    lengths = None
    if data.packing:
        lengths = packed_lengths(recipe, records, pipeline)
    elif data.group_by == "modality_length":
        lengths = records.modality_lengths
    return Order(
        count=len(records),
        batch=recipe.steps.batch,
        seed=recipe.running.seed,
        shuffle=data.shuffle,
        max_length=(data.row_length or data.max_length) if data.packing else 0,
        lengths=lengths,
    )


def packed_lengths(recipe: Recipe, records: Records, pipeline: Pipeline) -> np.ndarray:
    """int64 [records]: positions that each takes in a row; 0 if it cannot be used."""
    data, ranks = recipe.data, _ranks()
    if data.group_by != "none" or (data.row_length or data.max_length) < data.max_length:
        raise ConfigError(
            "data.packing contradicts other settings",
            given=f"group_by {data.group_by}, row_length {data.row_length}",
            expected=f"group_by none; row_length none, or at least max_length {data.max_length}",
        )
    found = sample_lengths(
        records,
        pipeline,
        get_compat(data.compat).placement,
        workers=data.workers,
        ranks=ranks,
        progress=partial(progress_bar, "counting tokens") if ranks.rank == 0 else no_bar,
    )
    usable = (found["length"] > 0) & (found["needed"] <= data.max_length)
    if data.on_bad == "stop" and not usable.all():
        number = int(np.argmin(usable))
        raise refusal(records, pipeline, get_compat(data.compat).placement, number)
    return np.where(usable, np.minimum(found["length"], data.max_length), 0).astype(np.int64)


def _ranks() -> Ranks:
    """Of this process; a plan that is only shown needs no backend."""
    if backends.NAME is None:
        return Ranks()
    return Ranks(*backends.parallel.world(), backends.parallel.sum_over_ranks)


# --- running ---------------------------------------------------------------------------------


def build_run(
    chosen: Plan,
    *,
    report: Callable[[Any], None],
    warn: Callable[[str], None],
    resume: bool = True,
) -> tuple[Run, int]:
    """The run on the backend of this process, and the step that it goes on from.

    `backends.select` has been called, and `backends.parallel.start`.

    Raises:
        UnillavaError: a checkpoint that belongs to another run, or cannot be read.
    """
    recipe, checkpoint = chosen.recipe, chosen.checkpoint
    output = Path(recipe.output)
    rank, world = backends.parallel.world()
    network = build_network(checkpoint, trained_names(chosen.groups), recipe)
    engine = build_engine(network, chosen, world)
    feed = Feed(
        records=chosen.records,
        pipeline=chosen.pipeline,
        order=chosen.order,
        micro_batch=recipe.steps.micro_batch,
        max_length=recipe.data.max_length,
        rank=rank,
        world=world,
        workers=recipe.data.workers,
        pad_to=recipe.data.pad_to,
        on_bad=recipe.data.on_bad,
        placement=get_compat(recipe.data.compat).placement,
    )
    from backends.contract import LossScale

    start = 0
    saved = state.find_latest(output) if resume else None
    if saved is not None:
        saved.check(chosen.trained_shapes)
        scale = saved.facts.get("loss_scale")
        scale = LossScale(**scale) if scale else None
        engine.restore(int(saved.facts["engine_steps"]), saved.read, scale)
        start = saved.step
        warn(f"going on from {saved.path} (written by {saved.facts.get('backend')})")
        changed = changed_settings(saved.facts.get("recipe") or {}, recipe)
        if changed:
            warn(f"the recipe is not the one it began with: {', '.join(changed)} changed")
    run = Run(
        recipe=recipe,
        spec=checkpoint.spec,
        engine=engine,
        feed=feed,
        groups=chosen.groups,
        rates=chosen.rates,
        schedule=chosen.schedule,
        parallel=backends.parallel,
        output=output,
        facts=facts_of(chosen),
        report=report,
        warn=warn,
    )
    return run, start


HARMLESS = ("output", "running", "saving", "logging", "data.workers", "data.on_bad")
"""Settings that change nothing but rounding, speed and what is kept."""


def changed_settings(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Dotted keys in which a recipe differs from an earlier one, but for HARMLESS ones.

    Args:
        before: `Recipe.as_dict()` as state.json gives it.
        recipe: the present one.
    """
    old, new = _flat(before), _flat(json.loads(json.dumps(recipe.as_dict())))
    changed = [key for key in {**old, **new} if key in old and old[key] != new.get(key)]
    seed = "running.seed"
    return [
        key
        for key in changed
        if key == seed or not any(key == h or key.startswith(f"{h}.") for h in HARMLESS)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        inner = isinstance(item, Mapping)
        flat |= _flat(item, f"{prefix}{key}.") if inner else {f"{prefix}{key}": item}
    return flat


def facts_of(chosen: Plan) -> dict[str, Any]:
    """What state.json says beside the steps."""
    return {
        "backend": backends.NAME,
        "recipe": chosen.recipe.as_dict(),
        "groups": [dataclasses.asdict(group) for group in chosen.groups],
        "total_steps": chosen.schedule.total_steps,
        "samples": len(chosen.records),
    }


def build_network(checkpoint: Checkpoint, trained: list[str], recipe: Recipe) -> Any:
    """The native training module, its trained parameters in float32, with the weights read in.

    Adapters get their first values. What is stored in few bits is brought to them tensor by
    tensor, so the model is never held in full.
    """
    from unillava.models.llava import LlavaForTraining

    runtime, running, lora = backends.runtime, recipe.running, recipe.lora
    adapters = adapter_spec(checkpoint.spec, lora) if lora else None
    network = runtime.build(lambda: LlavaForTraining(checkpoint.spec, adapters))
    runtime.set_trained(network, trained)
    for name, array, is_bfloat16 in in_few_bits(
        checkpoint.tensors(), adapters.base if adapters else "full"
    ):
        runtime.assign(network, name, array, bfloat16=is_bfloat16)
    if lora:
        for name, array in first_values(adapter_table(checkpoint.spec, lora), running.seed):
            runtime.assign(network, name, array)
    if running.recompute:
        for block in list(network.language_model.model.layers)[: running.recompute_layers]:
            runtime.recompute(block)
    return network


def build_engine(network: Any, chosen: Plan, world: int) -> Any:
    """The backend's engine for the recipe's groups."""
    from backends.contract import AdamW, Group

    recipe = chosen.recipe
    optimizer, running = recipe.optimizer, recipe.running
    settings = AdamW(optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.clip_norm)
    groups = [Group(g.name, g.parameters, g.weight_decay) for g in chosen.groups]
    strategy = strategy_of(recipe, world)
    training = backends.training
    compiled = training.PREFERS_COMPILED if running.compiled is None else running.compiled
    takes_file = running.deepspeed is not None and strategy in ("zero2", "zero3")
    return training.Engine(
        network,
        groups,
        settings,
        strategy=strategy,
        compiled=compiled,
        options=read_deepspeed(running.deepspeed) if takes_file else None,
    )


def strategy_of(recipe: Recipe, world: int) -> str:
    """`running.strategy`, with auto decided by the number of processes and what the backend has.

    Raises:
        ConfigError: `running.deepspeed` cannot be read.
    """
    running = recipe.running
    if running.strategy != "auto":
        return running.strategy
    if world == 1 or running.deepspeed is None:
        return "single" if world == 1 else "ddp"
    stage = read_deepspeed(running.deepspeed)["zero_optimization"]["stage"]
    return f"zero{stage if backends.NAME == 'torch' else 1}"


def read_deepspeed(path: str) -> dict[str, Any]:
    """A DeepSpeed configuration with its stage.

    Raises:
        ConfigError: it cannot be read, or names no stage that there is an engine for.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        stage = content["zero_optimization"]["stage"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path} (running.deepspeed) cannot be read",
            given=error,
            expected='JSON with {"zero_optimization": {"stage": 2 or 3}}',
        ) from None
    if stage not in (2, 3):
        raise ConfigError(f"{path} (running.deepspeed)", given=f"stage {stage}", expected="2 or 3")
    return content


# --- the result ------------------------------------------------------------------------------


def trained_source(source: Source, saved: state.Saved, dtype: str) -> Source:
    """The model with the trained parameters of a checkpoint, cast to the dtype of the result.

    Args:
        source: what the run began with.
        saved: a portable checkpoint of it.
        dtype: float32, float16 or bfloat16.
    """
    trained = {
        name.removeprefix("parameter/"): cast(tensor, CODES[dtype])
        for name, tensor in saved.tensors.items()
        if name.startswith("parameter/")
    }
    return replace(source, tensors={**source.tensors, **trained})


def export(chosen: Plan, saved: state.Saved, destination: Path) -> Mapping[str, Any]:
    """Write the trained model as a Hugging Face directory, and the projector beside it.

    `destination` gets the directory; `mm_projector.bin` (original LLaVA's names) lies in it where
    the projector was trained. A run with adapters leaves a PEFT directory instead. Returns the
    manifest.
    """
    if chosen.recipe.lora is not None:
        adapter = adapter_source(chosen.source, chosen.recipe, saved)
        options = Options(spelling=spelling_of(chosen.source, chosen.recipe))
        return carry_out(plan(adapter, "peft", destination, options), overwrite=True)
    dtype = chosen.checkpoint.spec.dtype
    source = trained_source(chosen.source, saved, dtype)
    manifest = carry_out(plan(source, "hf", destination, Options()), overwrite=True)
    if any(group.part == "projector" for group in chosen.groups):
        projector = plan(source, "projector", destination / "mm_projector.bin", Options())
        carry_out(projector, overwrite=True)
    return manifest

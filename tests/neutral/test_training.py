"""Recipes, schedules, groups and portable state, without a framework."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.real_configs import REAL_CONFIGS
from unillava.config import read_spec
from unillava.errors import CheckpointError, ConfigError
from unillava.spec import parameter_table
from unillava.training import state
from unillava.training.groups import trained_groups, trained_names
from unillava.training.recipe import Recipe, load_recipe, read_recipe
from unillava.training.schedule import Schedule, warmup_steps

PLAIN = {
    "output": "out",
    "model": {"path": "model"},
    "data": {"files": [{"path": "train.json"}]},
    "rates": {"projector": "1e-3"},
    "steps": {"batch": 8},
}


def changed(**parts: object) -> dict:
    return {**PLAIN, **parts}


# --- recipes -------------------------------------------------------------------------------------


def test_a_recipe_survives_its_own_form() -> None:
    recipe = read_recipe(PLAIN)
    assert recipe.rates.projector == 1e-3 and recipe.rates.language is None
    lists = recipe.as_dict()
    lists["data"] = {**lists["data"], "files": list(lists["data"]["files"])}
    assert read_recipe(lists) == recipe


def test_overrides_are_put_over_the_file(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    recipe = load_recipe(path, ["steps.batch=64", "rates.language=2e-5", "saving.keep=5"])
    assert (recipe.steps.batch, recipe.rates.language, recipe.saving.keep) == (64, 2e-5, 5)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed(step={"batch": 1}), "did you mean steps?"),
        (changed(steps={"batch": 8, "microbatch": 2}), "did you mean steps.micro_batch?"),
        (changed(steps={"batch": "many"}), "a whole number"),
        (changed(steps={}), "steps.batch is missing"),
        (changed(steps={"batch": 8, "micro_batch": 3}), "a multiple"),
        (changed(steps={"batch": 0}), "above 0"),
        (changed(rates={}), "nothing is trained"),
        (changed(rates={"projector": "fast"}), "a number"),
        (changed(model={}), "either path"),
        (changed(model={"language": "l"}), "model.vision is missing"),
        (changed(data={"files": []}), "data.files is empty"),
        (changed(data={"files": "train.json"}), "a list"),
        (changed(optimizer={"schedule": "cosin"}), "one of cosine"),
        ([], "keys and values"),
    ],
)
def test_a_wrong_recipe_says_where(content: object, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(content)
    assert told in str(caught.value)


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(kind: str) -> None:
    """Against the formulas of transformers.optimization, written out."""
    total, warm = 100, 7
    schedule = Schedule(kind, total, warm)
    for step in range(total):
        done = (step - warm) / (total - warm)
        shape = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1.0,
        }[kind]
        expected = step / warm if step < warm else shape
        assert schedule.factor(step) == pytest.approx(expected, abs=1e-15)


def test_warm_up_is_rounded_up() -> None:
    assert warmup_steps(0.03, 5198) == 156 and warmup_steps(0.03, 10) == 1
    assert warmup_steps(0.0, 10) == 0 and Schedule("cosine", 10, 0).factor(0) == 1.0


# --- groups --------------------------------------------------------------------------------------


def recipe_with(**rates: float) -> Recipe:
    return read_recipe(changed(rates=rates))


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_every_parameter_is_in_at_most_one_group(name: str) -> None:
    spec = read_spec(REAL_CONFIGS[name])
    recipe = read_recipe(
        changed(
            rates={"language": 1.0, "projector": 2.0, "vision": 3.0},
            optimizer={"weight_decay": 0.1},
        )
    )
    groups = trained_groups(spec, recipe)
    names = trained_names(groups)
    assert len(names) == len(set(names)) and set(names) <= set(parameter_table(spec))
    left = set(parameter_table(spec)) - set(names)
    deep = f"encoder.layers.{spec.vision.num_layers - 1}."
    allowed = ("post_layernorm", ".head.", deep, "image_newline")
    assert all(any(word in one for word in allowed) for one in left), left
    for group in groups:
        if group.weight_decay:
            assert not any(n.endswith(".bias") or "norm" in n for n in group.parameters)


def test_parts_without_a_rate_are_frozen() -> None:
    spec = read_spec(REAL_CONFIGS[next(iter(REAL_CONFIGS))])
    names = trained_names(trained_groups(spec, recipe_with(projector=1e-3)))
    assert names and all(n.startswith(("multi_modal_projector.", "image_newline")) for n in names)


# --- portable state ------------------------------------------------------------------------------

SHAPES = {"a.weight": (3, 2), "b": (4,)}


def tensors(seed: int, owner: int = 0, rank: int = 0):
    random = np.random.default_rng(seed)
    for n, (name, shape) in enumerate(SHAPES.items()):
        for kind in state.KINDS:
            array = random.standard_normal(shape).astype(np.float32)
            yield name, kind, array if (n + owner) % 2 == rank or owner < 0 else None


def save(output: Path, step: int, keep: int = 2) -> Path:
    return state.save(
        output, step, tensors(step, owner=-1), {"engine_steps": step}, rank=0, world=1,
        barrier=lambda: None, keep=keep,
    )  # fmt: skip


def test_what_is_saved_is_read_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(state.saved_steps(tmp_path)) == [10, 15]
    saved = state.find_latest(tmp_path)
    assert saved is not None and saved.step == 15
    saved.check(SHAPES)
    for name, kind, array in tensors(15, owner=-1):
        assert np.array_equal(saved.read(name, kind), array)


def test_two_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    """Rank 1 writes first here, as it may: nothing has its final name before both are done."""
    folder = tmp_path / ".checkpoint-3.partial"
    folder.mkdir(parents=True)
    state._write_parts(folder, tensors(3, owner=0, rank=1), 1, 2)
    assert state.find_latest(tmp_path) is None
    other = list(folder.iterdir())
    assert len(other) == 1
    kept = other[0].read_bytes()

    def restore_other() -> None:
        (folder / other[0].name).write_bytes(kept) if folder.is_dir() else None

    state.save(
        tmp_path, 3, tensors(3, owner=0, rank=0), {"engine_steps": 3}, rank=0, world=2,
        barrier=restore_other, keep=1,
    )  # fmt: skip
    saved = state.find_latest(tmp_path)
    saved.check(SHAPES)
    for name, kind, array in tensors(3, owner=-1):
        assert np.array_equal(saved.read(name, kind), array)


def test_an_interrupted_save_is_not_found_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def broken():
        yield from list(tensors(6, owner=-1))[:2]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        state.save(tmp_path, 6, broken(), {"engine_steps": 6}, rank=0, world=1,
                   barrier=lambda: None, keep=2)  # fmt: skip
    assert state.find_latest(tmp_path).step == 5
    save(tmp_path, 7)
    assert not list(tmp_path.glob(".*partial"))


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    saved = state.open_saved(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match="another run") as caught:
        saved.check({"a.weight": (3, 2), "c": (1,)})
    assert "parameter/c" in str(caught.value) and "parameter/b" in str(caught.value)
    with pytest.raises(CheckpointError, match="another run"):
        saved.check({"a.weight": (2, 3), "b": (4,)})

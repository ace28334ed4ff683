"""Memory of training, against hand counts; what processes really take is in tests/torch."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from backends.process import available_bytes
from tests.real_configs import REAL_CONFIGS
from unillava.config import read_spec
from unillava.errors import ConfigError
from unillava.spec import parameter_table
from unillava.training.estimate import SHARDS, Setting, check_fits, estimate, gib
from weight_convert.canonical import part_of

GIB = 2**30
LLAVA_7B = read_spec(REAL_CONFIGS["LLaVA-1.5-7B"])
TABLE = parameter_table(LLAVA_7B)
TRAINED = {name: shape for name, shape in TABLE.items() if part_of(name) != "vision"}
COUNT = 7_063_427_072
TOWER = sum(prod(s) for n, s in TABLE.items() if n not in TRAINED)
STAGE_2 = Setting(TRAINED, rows=16, length=2048, recompute=True)
STAGE_1 = Setting(
    {name: shape for name, shape in TABLE.items() if part_of(name) == "projector"},
    rows=32, length=2048, recompute=True,
)  # fmt: skip


def test_what_is_kept_is_exact() -> None:
    """Stage 2 trains everything but the tower: 16 bytes each, and 2 for what is frozen."""
    need = estimate(LLAVA_7B, STAGE_2)
    assert need.kept == 16 * (COUNT - TOWER) + 2 * TOWER
    assert need.masters == need.gradients == need.moments // 2 == 4 * (COUNT - TOWER)
    assert need.total > need.kept


@pytest.mark.parametrize("strategy", SHARDS)
def test_strategies_share_out_what_they_promise(strategy: str) -> None:
    one = estimate(LLAVA_7B, replace(STAGE_2, strategy=strategy, world=1))
    eight = estimate(LLAVA_7B, replace(STAGE_2, strategy=strategy, world=8))
    for name in ("weights", "masters", "gradients", "moments"):
        share = 8 if name in SHARDS[strategy] else 1
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / share, abs=1), name
    assert eight.activations == one.activations


def test_recomputation_keeps_one_tensor_per_block() -> None:
    plain = estimate(LLAVA_7B, replace(STAGE_1, recompute=False)).activations
    less = estimate(LLAVA_7B, STAGE_1).activations
    residual = 32 * 32 * 2048 * 4096 * 2
    assert residual < less < residual + plain / 20


def test_a_frozen_language_model_keeps_less() -> None:
    """No inputs of matrices whose weights get no gradient: 4 D + F of 10 D + 4 F in float32."""
    setting = replace(STAGE_1, precision="float32", recompute=False)
    both = {n: s for n, s in TABLE.items() if part_of(n) in ("projector", "language")}
    frozen = estimate(LLAVA_7B, setting).activations
    trained = estimate(LLAVA_7B, replace(setting, trained=both)).activations
    assert trained - frozen == 32 * 32 * 2048 * (4 * 4096 + 11008) * 4


def test_quantised_weights() -> None:
    bits = {name: 4.5 for name in TABLE if name.endswith("_proj.weight") and "language" in name}
    plain, small = estimate(LLAVA_7B, STAGE_1), estimate(LLAVA_7B, replace(STAGE_1, bits=bits))
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plain.weights - small.weights == blocks * (16 - 4.5) / 8


def test_known_recipes_fit_where_people_run_them() -> None:
    """LLaVA-1.5-7B on eight cards of 80 and 40 GB: both stages, with recomputation, ZeRO-2 and
    ZeRO-3 as in the published scripts; full training does not fit on one such card."""
    pretrain = replace(STAGE_1, strategy="zero2", world=8)
    assert check_fits(LLAVA_7B, pretrain, 80 * GIB, "A100") is None
    finetune = replace(STAGE_2, strategy="zero3", world=8)
    assert check_fits(LLAVA_7B, finetune, 40 * GIB, "A100-40GB") is None
    with pytest.raises(ConfigError, match="cannot fit") as caught:
        check_fits(LLAVA_7B, replace(STAGE_2, recompute=False), 80 * GIB, "the A100")
    text = str(caught.value)
    assert "the A100 has 80.0 GiB" in text and "running.recompute=true" in text
    assert "lora" in text and gib(estimate(LLAVA_7B, STAGE_2).total) in text


def test_a_near_miss_is_a_warning() -> None:
    need = estimate(LLAVA_7B, STAGE_1).total
    assert check_fits(LLAVA_7B, STAGE_1, need, "x") is None
    assert "may not fit" in check_fits(LLAVA_7B, STAGE_1, int(need / 1.1), "x")
    with pytest.raises(ConfigError, match="cannot fit"):
        check_fits(LLAVA_7B, STAGE_1, int(need / 1.3), "x")


def test_an_unknown_strategy() -> None:
    with pytest.raises(ConfigError, match="magic"):
        estimate(LLAVA_7B, replace(STAGE_1, strategy="magic"))


# --- what a machine has --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "100", 4096 * 1024), ("1000000", "400000", 600000), ("1000", "4000", 0)],
)
def test_a_container_has_what_it_is_allowed(tmp_path, limit, used, expected) -> None:
    groups = tmp_path / "sys" / "fs" / "cgroup"
    groups.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8192 kB\nMemAvailable:    4096 kB\n")
    (groups / "memory.max").write_text(limit + "\n")
    (groups / "memory.current").write_text(used + "\n")
    assert available_bytes(str(tmp_path)) == expected


def test_an_unknown_system_has_no_figure(tmp_path) -> None:
    assert available_bytes(str(tmp_path)) is None

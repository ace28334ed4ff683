"""Parity without a framework: metrics, where two runs part, bars, the batch, the report."""

from __future__ import annotations

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from unillava.checkpoint import open_checkpoint
from unillava.data.collate import IMAGE, NEWLINE, TEXT, VIDEO, Sample
from unillava.errors import RequestError, UnillavaError
from unillava.parity import Settings, batch, compare, job, plots, report, run, run_parity
from unillava.parity.compare import Difference, Facts, Run, difference
from unillava.spec import parameter_table
from unillava.tiny import TEXTS

SHAPES = arrays.array_shapes(max_dims=3, max_side=6)
FLOATS = st.floats(-1e6, 1e6, width=32)


def made(name: str, relative: float, **changes) -> Difference:
    """A difference of that relative size."""
    fields = dict(
        name=name, shape=(2, 3), max_abs=relative * 4, mean_abs=relative, cosine=1 - relative**2,
        scale=4.0, worst=(1, 2),
    )  # fmt: skip
    return Difference(**(fields | changes))


# --- one tensor ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 9))
def test_difference_is_what_numpy_says(data, chunk):
    shape = data.draw(SHAPES)
    a, b = (data.draw(arrays.arrays(np.float32, shape, elements=FLOATS)) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "CHUNK", chunk)
        found = difference("x", a, b)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    gap = np.abs(wide_a - wide_b)
    assert found.max_abs == gap.max() and gap[found.worst] == gap.max()
    assert found.scale == np.abs(wide_a).max()
    assert math.isclose(found.mean_abs, gap.mean(), rel_tol=1e-12)
    lengths = np.linalg.norm(wide_a) * np.linalg.norm(wide_b)
    if lengths > 1e-100:
        cosine = (wide_a * wide_b).sum() / lengths
        assert math.isclose(found.cosine, cosine, rel_tol=1e-9, abs_tol=1e-9)
    assert found.finite and found.shape == shape


def test_zero_tensors():
    zero, one = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    both = difference("x", zero, zero)
    assert (both.relative, both.cosine, both.max_abs) == (0.0, 1.0, 0.0)
    only_reference = difference("x", zero, one)
    assert only_reference.relative == math.inf and only_reference.cosine == 0.0
    assert difference("x", one, zero).relative == 1.0
    assert difference("x", np.zeros(0), np.zeros(0)).relative == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_fails_every_bar(bad, side):
    tensors = [np.ones((3, 4), np.float32) for _ in range(2)]
    tensors[side][2, 1] = bad
    found = difference("x", *tensors)
    assert not found.finite and found.worst == (2, 1)
    assert not found.relative <= 1e30
    again = Difference.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found


def test_another_scale():
    found = difference("x", np.full(3, 1e-9), np.full(3, 2e-9), scale=1.0)
    assert math.isclose(found.relative, 1e-9)
    assert difference("x", np.ones(3), np.zeros(3), scale=math.nan).relative == 1.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        difference("x", np.zeros((2, 3)), np.zeros((3, 2)))


def test_a_mapped_file_is_compared(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert difference("x", mapped, np.asarray(mapped) + 1).max_abs == 1.0


# --- where they part -------------------------------------------------------------------------

BLOCK = "language_model.model.layers.1"
EMBEDDINGS = "vision_tower.vision_model.embeddings"
CHAIN = [
    "multi_modal_projector", "merge", "language_model.model.layers.0",
    f"{BLOCK}.input_layernorm", f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.k_proj",
    f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.self_attn", BLOCK, "language_model.model.norm",
    "logits",
]  # fmt: skip


def chain(*relatives: float) -> list[Difference]:
    return [made(name, r) for name, r in zip(CHAIN, relatives, strict=False)]


def test_nothing_diverges():
    assert compare.first_divergence(chain(*[9e-6] * 11), 1e-5) is None


def test_a_sudden_difference_is_named_with_its_layer_and_step():
    found = compare.first_divergence(chain(3e-7, 3e-7, 5e-7, 5e-7, 6e-7, 2e-2, 1e-2, 1e-2), 1e-5)
    assert found.name == f"{BLOCK}.self_attn.k_proj" and found.layer == BLOCK
    assert found.step == "linear" and found.before == f"{BLOCK}.self_attn.q_proj"
    assert found.jump == found.name
    assert math.isclose(found.jump_factor, 2e-2 / 6e-6)


def test_a_jump_below_the_bar_is_found_too():
    found = compare.first_divergence(chain(1e-8, 1e-8, 8e-6, 8e-6, 2e-5), 1e-5)
    assert found.name == f"{BLOCK}.self_attn.q_proj"
    assert found.jump == "language_model.model.layers.0"


def test_steady_growth_has_no_jump():
    found = compare.first_divergence(chain(*[1e-6 * 1.5**n for n in range(11)]), 1e-5)
    assert found.name == f"{BLOCK}.self_attn.o_proj" and found.jump is None
    assert found.step == "rotary embedding and attention, then linear"


def test_the_references_noise_explains_a_jump():
    outputs = chain(3e-7, 3e-7, 2e-5)
    name = outputs[-1].name
    assert compare.first_divergence(outputs, 1e-5).jump == name
    assert compare.first_divergence(outputs, 1e-5, noise={name: 4e-6}).jump is None


def test_nan_is_a_divergence():
    outputs = [*chain(1e-7, 1e-7), made(CHAIN[2], 1.0, max_abs=math.inf)]
    assert compare.first_divergence(outputs, 1e-5).name == CHAIN[2]


def test_the_very_first_tensor():
    assert compare.first_divergence(chain(1.0), 1e-5).before is None


def specs():
    yield from (("clip", text) for text in TEXTS)
    yield ("siglip", "llama")


@pytest.mark.parametrize(("vision", "text"), list(specs()))
def test_every_module_has_a_part_a_layer_and_a_step(tiny, vision, text):
    spec = open_checkpoint(str(tiny("llava_next_video", text, vision))).spec
    names = job.module_names(spec)
    assert len(set(names)) == len(names)
    for name in [*names, "merge", "logits", f"{names[3]}@video"]:
        assert compare.part_of_tensor(name) in compare.PARTS
        assert compare.step_of(name)
        assert name.startswith(compare.layer_of(name).partition("@")[0])
    for parameter in parameter_table(spec):
        assert compare.part_of_tensor(parameter) in compare.PARTS
    assert compare.layer_of(f"{BLOCK}.mlp.up_proj") == BLOCK
    assert compare.layer_of("vision_tower.vision_model.encoder.layers.11.mlp@video") == (
        "vision_tower.vision_model.encoder.layers.11@video"
    )


def test_only_modules_that_run_are_watched(tiny):
    spec = open_checkpoint(str(tiny("llava"))).spec  # 3 vision layers, the last but one is used
    names = job.module_names(spec)
    vision = "vision_tower.vision_model"
    assert f"{vision}.encoder.layers.1.mlp.fc2" in names
    assert not [n for n in names if n.startswith(f"{vision}.encoder.layers.2")]
    assert f"{vision}.post_layernorm" not in names
    assert f"{vision}.embeddings.position_embedding" not in names
    assert "language_model.lm_head" not in names and "language_model.model" not in names
    last = job.module_names(replace(spec, feature_layers=(-1, 1)))
    assert f"{vision}.encoder.layers.2.mlp.fc2" in last
    first = job.module_names(replace(spec, feature_layers=(0,)))
    assert not [n for n in first if "encoder" in n]


def test_blocks_and_what_is_inside_them(tiny):
    spec = open_checkpoint(str(tiny("llava"))).spec
    blocks = job.block_names(spec)
    assert set(blocks) < set(job.module_names(spec))
    assert BLOCK in blocks and f"{BLOCK}.mlp" not in blocks and "vision_tower" in blocks
    assert job.names_inside(spec, "multi_modal_projector") == [
        "multi_modal_projector.linear_1", "multi_modal_projector.linear_2",
    ]  # fmt: skip
    inside = job.names_inside(spec, BLOCK)
    assert f"{BLOCK}.self_attn.q_proj" in inside and f"{BLOCK}.mlp" in inside
    assert BLOCK not in inside and not [n for n in inside if ".layers.0." in n]
    assert job.names_inside(spec, "vision_tower") == job.names_inside(spec, "merge") == []


def test_output_bytes(tiny):
    spec = open_checkpoint(str(tiny("llava"))).spec
    names = [f"{BLOCK}.mlp.gate_proj", BLOCK, "multi_modal_projector.linear_1"]
    expected = 4 * 7 * (spec.text.intermediate_size + spec.text.hidden_size)
    expected += 4 * 5 * spec.text.hidden_size
    assert job.output_bytes(spec, names, 5, 7) == expected


def test_parameters_are_put_in_the_order_of_execution():
    outputs = [
        f"{EMBEDDINGS}.patch_embedding", EMBEDDINGS,
        "merge", f"{BLOCK}.input_layernorm", f"{BLOCK}.self_attn.k_proj", "logits",
    ]  # fmt: skip
    parameters = [
        "language_model.lm_head.weight", f"{BLOCK}.self_attn.k_proj.weight",
        f"{BLOCK}.input_layernorm.weight", "image_newline",
        f"{EMBEDDINGS}.class_embedding", f"{EMBEDDINGS}.position_embedding.weight",
        f"{EMBEDDINGS}.patch_embedding.weight",
        "vision_tower.vision_model.post_layernorm.weight",
    ]  # fmt: skip
    ordered = compare.execution_order(parameters, outputs)
    assert ordered == [parameters[n] for n in (6, 4, 5, 3, 2, 1, 0, 7)]
    differences = compare.in_order([made(name, 0) for name in parameters], ordered)
    assert [d.name for d in differences] == ordered


def test_the_key_bias_is_compared_on_the_scale_of_its_weight():
    bias = "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias"
    assert compare.gradient_scale_name(bias) == bias.replace("bias", "weight")
    for name in (bias.replace("k_proj", "q_proj"), f"{BLOCK}.self_attn.k_proj.bias"):
        assert compare.gradient_scale_name(name) == name


def test_the_key_bias_has_no_gradient():
    """Why: softmax does not see a number that all scores of a query share."""
    rng = np.random.default_rng(0)
    q, k, v, upstream = (rng.standard_normal((5, 4)) for _ in range(4))

    def loss(bias):
        scores = q @ (k + bias).T
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return ((weights / weights.sum(-1, keepdims=True)) @ v * upstream).sum()

    for n in range(4):
        step = np.eye(4)[n] * 1e-4
        assert abs(loss(step) - loss(-step)) < 1e-12


def test_worst_by_part_and_noise_band():
    outputs = chain(1e-7, 2e-7, 3e-7, 9e-7, 5e-7)
    assert {k: d.relative for k, d in compare.worst_by_part(outputs).items()} == pytest.approx(
        {"projector": 1e-7, "merge": 2e-7, "decoder": 9e-7}
    )
    assert compare.worst([]) is None
    runs = [Run("auto", 1.0, tuple(chain(a, b)), (made("image_newline", a),)) for a, b in
            ((1e-7, 5e-7), (3e-7, 2e-7))]  # fmt: skip
    outputs_band, gradients_band = compare.noise_band(runs)
    assert outputs_band == pytest.approx({CHAIN[0]: 3e-7, CHAIN[1]: 5e-7})
    assert gradients_band == pytest.approx({"image_newline": 3e-7})


def test_first_mismatch():
    gaps = [[0.5, 0.25], [0.125, 0.0625]]
    assert compare.first_mismatch([[1, 2], [3, 4]], [[1, 2], [3, 4]], gaps) is None
    found = compare.first_mismatch([[1, 2], [3, 4]], [[1, 2], [3, 5]], gaps)
    assert (found.row, found.step, found.reference, found.found, found.gap) == (1, 1, 4, 5, 0.0625)


# --- bars ------------------------------------------------------------------------------------

PERFECT = Facts(
    loss_abs=0.0, loss_relative=0.0, norm_relative=0.0, logits_mean_abs=0.0, outputs_relative=0.0,
    outputs_max_abs=0.0, outputs_cosine=1.0, gradients_relative=0.0, gradients_mean_abs=0.0,
    tokens_equal=True,
)  # fmt: skip


def failed(**changes) -> set[tuple[str, str]]:
    judged = compare.judge(replace(PERFECT, **changes), None, 1e-5)
    return {(j.rule.guide, j.rule.criterion) for j in judged if j.passed is False}


def test_equal_runs_pass_every_bar():
    assert failed() == set()


@pytest.mark.parametrize(
    ("guide", "criterion", "inside", "outside"),
    [
        ("unillava", "every output", {"outputs_relative": 1e-5}, {"outputs_relative": 1.01e-5}),
        ("unillava", "loss", {"loss_relative": 1e-5}, {"loss_relative": 1.01e-5}),
        ("unillava", "every gradient", {"gradients_relative": 1e-5},
         {"gradients_relative": math.inf}),
        ("unillava", "greedy tokens", {"tokens_equal": True}, {"tokens_equal": False}),
        ("MindSpore", "first loss", {"loss_abs": 9.0, "loss_relative": 0.0049},
         {"loss_abs": 0.005, "loss_relative": 0.005}),
        ("MindSpore", "first loss", {"loss_abs": 0.0049, "loss_relative": 0.9},
         {"loss_abs": math.nan, "loss_relative": math.nan}),
        ("MindSpore", "mean loss", {"loss_abs": 0.0099, "loss_relative": 0.9},
         {"loss_abs": 0.01, "loss_relative": 0.01}),
        ("MindSpore", "global gradient norm, mean relative", {"norm_relative": 0.1},
         {"norm_relative": 0.101}),
        ("Paddle", "forward, mean absolute", {"logits_mean_abs": 1e-6},
         {"logits_mean_abs": 1.1e-6}),
        ("Paddle", "forward, mean absolute (newer text)", {"logits_mean_abs": 1e-5},
         {"logits_mean_abs": 1.1e-5}),
        ("Paddle", "loss log", {"loss_abs": 1e-6}, {"loss_abs": 1.1e-6}),
        ("Paddle", "backward log", {"gradients_mean_abs": 1e-6}, {"gradients_mean_abs": 1.1e-6}),
        ("Ascend compare", "cosine of every output", {"outputs_cosine": 0.991},
         {"outputs_cosine": 0.99}),
        ("Ascend compare", "largest absolute error of every output", {"outputs_max_abs": 0.0009},
         {"outputs_max_abs": 0.001}),
        ("Ascend compare", "not an outright error: cosine", {"outputs_cosine": 0.9},
         {"outputs_cosine": 0.899}),
        ("Ascend compare", "not an outright error: largest absolute", {"outputs_max_abs": 1.0},
         {"outputs_max_abs": 1.01}),
    ],
)  # fmt: skip
def test_each_bar_stands_where_its_guide_puts_it(guide, criterion, inside, outside):
    assert (guide, criterion) not in failed(**inside)
    assert (guide, criterion) in failed(**outside)


def test_only_our_own_bars_decide():
    judged = compare.judge(replace(PERFECT, logits_mean_abs=1.0, outputs_cosine=0.5), None, 1e-5)
    assert compare.passes(judged)
    assert not compare.passes(compare.judge(replace(PERFECT, tokens_equal=False), None, 1e-5))
    assert {j.rule.guide for j in judged} == set(compare.GUIDES)


def test_what_was_not_measured_does_not_fail():
    facts = replace(PERFECT, gradients_relative=None, gradients_mean_abs=None, norm_relative=None,
                    tokens_equal=None)  # fmt: skip
    judged = compare.judge(facts, None, 1e-5)
    assert compare.passes(judged)
    assert {j.rule.fact for j in judged if j.passed is None} == {
        "gradients_relative", "gradients_mean_abs", "norm_relative", "tokens_equal",
    }  # fmt: skip


def test_facts_of_runs():
    reference = Run("auto", 2.0, (), (), 10.0)
    outputs = (*chain(1e-7, 3e-6), made("logits", 2e-6, cosine=0.75))
    found = compare.facts_of(
        Run("auto", 2.5, outputs, (made("image_newline", 4e-6),), 9.0), reference, True
    )
    assert (found.loss_abs, found.loss_relative, found.norm_relative) == (0.5, 0.25, 0.1)
    assert found.outputs_relative == pytest.approx(3e-6)
    assert found.logits_mean_abs == 2e-6 and found.outputs_cosine == 0.75
    assert found.gradients_relative == pytest.approx(4e-6)
    none = compare.facts_of(Run("auto", 2.0, outputs), Run("auto", 2.0), None)
    assert none.gradients_relative is None and none.norm_relative is None
    merged = compare.worst_facts([found, none, replace(found, tokens_equal=False)])
    assert merged.loss_abs == 0.5 and merged.tokens_equal is False
    assert merged.gradients_relative == found.gradients_relative
    assert compare.worst_facts([]) is None


def test_a_run_survives_json():
    outputs = (*chain(1e-7), made("merge", 1.0, max_abs=math.inf, mean_abs=math.inf))
    made_run = Run("portable", math.nan, outputs, (), math.inf)
    again = Run.from_json(json.loads(json.dumps(made_run.to_json(), allow_nan=False)))
    assert again.outputs == made_run.outputs and math.isnan(again.loss)
    assert again.gradient_norm is not None
    assert Run.from_json(Run("auto", 1.5).to_json()) == Run("auto", 1.5)


# --- the batch -------------------------------------------------------------------------------


def test_the_drawn_picture_is_always_the_same():
    first, second = batch.landscape(), batch.landscape()
    assert first.size == (640, 480) and first.tobytes() == second.tobytes()
    pixels = np.asarray(first)
    assert pixels.std() > 20 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000
    assert batch.landscape(64, 48).size == (64, 48)


def sample(kinds, ids, tiles=0, frames=0, side=2) -> Sample:
    n = len(kinds)
    return Sample(
        np.array(ids), np.array(kinds, np.int8), np.zeros(n, np.int64), np.zeros(n, bool),
        np.ones((tiles, 3, side, side), np.float32) * np.arange(1, tiles + 1)[:, None, None, None]
        if tiles else None,
        np.ones((frames, 3, side, side), np.float32) if frames else None,
    )  # fmt: skip


def test_arrays_as_transformers_takes_them(tiny, photo):
    from PIL import Image

    from unillava.data.layout import num_tiles

    spec = open_checkpoint(str(tiny("llava_next_video"))).spec
    pictures = [Image.new("RGB", (90, 30)), Image.new("RGB", (10, 10))]
    counts = [num_tiles(spec, (p.height, p.width)) for p in pictures]
    rows = [batch.Row(str(n), "", "", images=(p,)) for n, p in enumerate(pictures)]
    samples = [
        sample([TEXT, IMAGE, NEWLINE, TEXT], [5, 0, 0, 6], tiles=counts[0]),
        sample([IMAGE, TEXT], [0, 7], tiles=counts[1]),
        sample([TEXT, VIDEO], [8, 0], frames=4),
    ]
    found = batch.transformers_arrays(spec, samples, [*rows, batch.Row("video", "", "")])
    image, video = spec.image_token, spec.video_token
    np.testing.assert_array_equal(
        found["input_ids"], [[5, image, image, 6], [image, 7, 0, 0], [8, video, 0, 0]]
    )
    np.testing.assert_array_equal(
        found["attention_mask"], [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    )
    np.testing.assert_array_equal(found["image_sizes"], [[30, 90], [10, 10]])
    assert found["pixel_values"].shape == (2, max(counts), 3, 2, 2)
    for n, count in enumerate(counts):
        assert [tile.max() for tile in found["pixel_values"][n]] == [
            *range(1, count + 1), *[0] * (max(counts) - count),
        ]  # fmt: skip
    assert found["pixel_values_videos"].shape == (1, 4, 3, 2, 2)


def test_what_transformers_cannot_express(tiny):
    spec = open_checkpoint(str(tiny("llava_next_video"))).spec
    assert batch.why_not_transformers(spec) is None
    assert batch.why_not_transformers(open_checkpoint(str(tiny("llava"))).spec) is None
    for changes in (
        {"projector": replace(spec.projector, depth=1)},
        {"unpad": False},
        {"anyres_variant": "llava"},
        {"family": "llava"},
        {"video": replace(spec.video, newline="grid")},
        {"video": replace(spec.video, pool_mode="bilinear")},
    ):
        assert batch.why_not_transformers(replace(spec, **changes))


def test_arrays_survive_the_disk(tmp_path):
    wanted = {"a": np.arange(6).reshape(2, 3), "b": np.zeros((0, 3), np.float32)}
    job.write_arrays(tmp_path / "x", wanted)
    found = job.read_arrays(tmp_path / "x")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


# --- who is compared with whom ---------------------------------------------------------------


def planned(directory, **options):
    return run._plan(Settings(str(directory), **options), open_checkpoint(str(directory)))


def test_participants(tiny, monkeypatch):
    directory = tiny("llava")
    monkeypatch.setattr("backends.installed", lambda: ["torch", "mindspore", "paddle"])
    plan = planned(directory, devices={"": "cpu", "paddle": "npu:1"})
    assert plan.reference.label == "torch" and plan.reference.engine == "native"
    assert [(p.label, p.device) for p in plan.candidates] == [
        ("mindspore", "cpu"), ("paddle", "npu:1"),
    ]  # fmt: skip
    plan = planned(directory, reference="transformers", backends=("paddle", "torch"))
    assert (plan.reference.engine, plan.reference.backend) == ("transformers", "torch")
    assert [p.label for p in plan.candidates] == ["paddle", "torch"]
    plan = planned(directory, reference="torch@cpu", backends=("torch@cuda:0",))
    assert (plan.reference.device, plan.candidates[0].device) == ("cpu", "cuda:0")
    assert plan.candidates[0].backend == "torch"
    other = tiny("llava", seed=1)
    plan = planned(directory, backends=("torch",), overrides={"torch": str(other)})
    assert plan.reference.checkpoint == directory
    assert [(p.label, p.checkpoint) for p in plan.candidates] == [("torch (override)", other)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backends": ("torch", "jax")}, "unknown backend 'jax'"),
        ({"reference": "keras"}, "unknown backend 'keras'"),
        ({"overrides": {"tf": "x"}}, "unknown backend 'tf'"),
        ({"devices": {"tf": "x"}}, "unknown backend 'tf'"),
        ({"backends": ("torch",)}, "nothing to compare"),
        ({"backends": ("torch",), "overrides": {"torch": "/nowhere"}}, "/nowhere"),
        ({"repeats": 0}, "--repeats"),
        ({"tolerance": 0.0}, "--tolerance"),
        ({"new_tokens": -1}, "--max-new-tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(tiny, options, told):
    with pytest.raises(UnillavaError, match=re.escape(told)):
        run_parity(Settings(str(tiny("llava")), **options))


def test_an_override_must_be_the_same_model(tiny):
    with pytest.raises(UnillavaError, match="names and shapes"):
        planned(tiny("llava"), backends=("torch",), overrides={"torch": str(tiny("llava_next"))})


def test_transformers_cannot_be_the_reference_of_everything(tiny):
    checkpoint = open_checkpoint(str(tiny("llava")))
    spec = replace(checkpoint.spec, projector=replace(checkpoint.spec.projector, depth=1))
    with pytest.raises(UnillavaError, match="1 linear layers"):
        run._plan(
            Settings("x", backends=("torch",), reference="transformers"),
            replace(checkpoint, spec=spec),
        )


def test_videos_need_a_model_that_takes_them(tiny):
    with pytest.raises(RequestError, match="does not take videos"):
        run_parity(Settings(str(tiny("llava")), backends=("torch", "paddle"), videos=("a.mp4",)))


def test_too_little_room_is_told_before_anything_runs(tiny, monkeypatch):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(UnillavaError, match="room on the disk"):
        run_parity(Settings(str(tiny("llava")), backends=("torch", "paddle")))


# --- the report ------------------------------------------------------------------------------


def result(tokens, **changes) -> job.Result:
    fields = dict(
        versions={"torch": "9.9"}, device="cpu", threads="1", order=tuple(CHAIN), runs=(),
        tokens=tokens, gaps=tuple(tuple(0.1 for _ in row) for row in tokens),
        peak_memory=123_456_789, stored=1000, seconds=1.5,
    )  # fmt: skip
    return job.Result(**(fields | changes))


def candidate(label, relatives, tokens, noise_facts) -> run.Candidate:
    outputs = tuple(chain(*relatives))
    unused = made(f"{BLOCK}.mlp.up_proj.weight", 0, scale=0.0)
    gradients = (made("image_newline", relatives[1]), unused)
    this, reference = Run("auto", 2.00001, outputs, gradients, 3.0), Run("auto", 2.0, (), (), 3.0)
    wanted = ((1, 2, 3),)
    mismatch = compare.first_mismatch(wanted, tokens, ((0.1, 0.2, 0.3),))
    facts = compare.facts_of(this, reference, mismatch is None)
    return run.Candidate(
        label, "/checkpoint", result(tokens), this, compare.first_divergence(outputs, 1e-5),
        mismatch, compare.judge(facts, noise_facts, 1e-5),
    )  # fmt: skip


@pytest.fixture(params=["full", "bare"])
def findings(request) -> run.Report:
    """A made-up report: with noise, a failure and a picture, or with nothing optional."""
    full = request.param == "full"
    noise_runs = (("2 threads", Run("auto", 2.0, tuple(chain(*[2e-7] * 11)))),) if full else ()
    noise_facts = compare.facts_of(noise_runs[0][1], Run("auto", 2.0), True) if full else None
    good = candidate("paddle", [4e-7] * 11, ((1, 2, 3),), noise_facts)
    bad_relatives = [1e-7, 0.0, 3e-7, 3e-7, 3e-7, 0.02, 0.01, math.inf, 0.3, 0.2, 0.1]
    bad = candidate("torch <b>&", bad_relatives, ((1, 9, 3),), noise_facts)
    replies = {"torch": ("A", " <i>", "사"), "paddle": ("A", " <i>", "사")}
    replies |= {"torch <b>&": ("A", "", "x")} if full else {}
    picture = batch.landscape(64, 48) if full else None
    return run.Report(
        settings=Settings("/checkpoint"),
        checkpoint="/checkpoint",
        model="a <model>",
        tolerance=1e-5,
        reference="torch",
        reference_result=result(((1, 2, 3),), runs=(Run("auto", 2.0, (), (), 3.0),)),
        noise_runs=noise_runs,
        noise_facts=noise_facts,
        output_noise=compare.noise_band(r for _, r in noise_runs)[0],
        gradient_noise={},
        candidates=(good, bad) if full else (good,),
        rows=(run.RowText("image", "사진 <?>", picture, replies),),
        batch={"input_ids": (1, 11)},
        everything=full,
        disk_bytes=2_500_000,
        machine="somewhere",
    )


VOID = {"meta", "img", "br", "wbr", "link", "input"}


class Outline(html.parser.HTMLParser):
    """Checks that elements are closed in order and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_is_valid_and_needs_nothing_beside_it(findings):
    page = report.to_html(findings)
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == [] and page.startswith("<!doctype html>")
    assert all(reference.startswith("data:image/") for reference in outline.references)
    assert not {"script", "link", "iframe", "object"} & set(outline.tags)
    assert not re.search(r"url\(|@import|https?://", page)
    assert outline.headings[0] == "Verdict"
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    assert "<b>&" not in page and "<model>" not in page and "a &lt;model&gt;" in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len([p for p in pictures if "role=" in p]) == 4
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_the_page_says_what_was_found(findings):
    page = report.to_html(findings)
    if len(findings.candidates) == 1:
        assert ">PASS<" in page and ">FAIL<" not in page
        assert "torch itself" not in page and 'class="noise"' not in page
        return
    assert not findings.passed and ">FAIL<" in page
    plain = re.sub(r"<[^>]+>", "", page)
    assert "parts from torch at language_model.model.layers.1.self_attn.k_proj" in plain
    assert "Greedy tokens part in row “image” at token 2: &#39;&#39; instead of" in plain
    assert page.count('class="token first"') == 1 and page.count('class="token after"') == 1
    assert 'class="ring"' in page and 'class="noise"' in page
    assert "not finite" in page
    for guide in compare.GUIDES:
        assert guide in page


def test_the_terminal_says_it_too(findings):
    import io

    from rich.console import Console

    stream = io.StringIO()
    report.print_report(findings, Console(file=stream, width=200))
    told = stream.getvalue()
    assert "PASS paddle computes what torch computes" in told
    assert ("FAIL torch <b>& parts from torch" in told) == (not findings.passed)
    assert "bars of MindSpore met: paddle 3 of 3" in told


def test_a_difference_like_the_noise_is_said_to_be_one(findings):
    """A bar finer than rounding: the reference itself does not meet it."""
    if not findings.noise_runs:
        return
    noise = replace(findings.noise_facts, outputs_relative=1.5e-5)
    tight = candidate("paddle", [1.5e-6 * 1.3**n for n in range(11)], ((1, 2, 3),), noise)
    told = " ".join(report.findings(tight, findings))
    assert "grows steadily" in told and "1.4 times what the reference differs" in told
    far = candidate("paddle", [1e-7, 0.1, *[0.1] * 9], ((1, 2, 3),), noise)
    assert "looks like rounding" not in " ".join(report.findings(far, findings))


def test_json_is_json(findings):
    text = json.dumps(report.to_json(findings), allow_nan=False)
    found = json.loads(text)
    assert found["passed"] is findings.passed
    names = [d["name"] for d in found["candidates"][0]["outputs"]]
    assert names == CHAIN
    assert found["candidates"][0]["thresholds"][0]["passed"] is True
    if not findings.passed:
        bad = found["candidates"][1]
        assert bad["first_divergence"]["name"] == f"{BLOCK}.self_attn.k_proj"
        assert bad["first_mismatch"]["step"] == 1
        assert bad["outputs"][7]["max_abs"] is None


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    report.write_whole(path, "first 사")
    with pytest.raises(UnicodeEncodeError):
        report.write_whole(path, "second \ud800")
    assert path.read_text(encoding="utf-8") == "first 사"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (True, "equal"), (0.0, "0"), (1.26e-6, "1.3e-6"), (0.0123, "0.012"),
     (9.8765, "9.877"), (123456.0, "1.2e5"), (math.inf, "not finite"), (math.nan, "NaN")],
)  # fmt: skip
def test_numbers_read_well(value, text):
    assert report.number(value) == text


def test_bytes_read_well():
    assert [report.size(n) for n in (5, 1234, 5_600_000, 7_890_000_000_000)] == [
        "5 B", "1.23 kB", "5.6 MB", "7.89e+03 GB",
    ]  # fmt: skip


def test_merged_names_agree_with_every_list():
    lists = [["a", "b", "d"], ["b", "c", "d", "e"], ["z", "a"]]
    merged = report.merged_names(lists)
    assert sorted(merged) == list("abcdez")
    for names in lists[:2]:
        places = [merged.index(name) for name in names]
        assert places == sorted(places)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.one_of(st.floats(0, 1e3), st.just(math.inf)), max_size=30),
    width=st.integers(200, 1200),
)
def test_every_plot_is_well_formed_and_keeps_inside_its_frame(values, width):
    names = [f"{BLOCK}.n{n}" for n in range(len(values))]
    plot = plots.Plot(
        names, compare.part_of_tensor, [plots.Series("a<b", dict(zip(names, values, strict=True)))],
        {}, 1e-5,
    )  # fmt: skip
    svg = ElementTree.fromstring(plots.draw(plot, width, 300))
    for line in svg.iter("line"):
        assert 0 <= float(line.get("y1")) <= 300
    marks = [path for path in svg.iter("path") if path.get("class", "").startswith("s0")]
    assert len(marks) == len(values)
    for shape in marks:
        x, y = map(float, re.match(r"M(-?[\d.]+),(-?[\d.]+)", shape.get("d")).groups())
        assert 0 <= x <= width and 0 <= y <= 300


# --- pieces of replies -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama", "llama3"])
def test_pieces_join_to_the_reply(tiny, text):
    tokenizer = open_checkpoint(str(tiny("llava", text))).tokenizer()
    sentence = "What is it? 안녕하세요, 你好 ☃!"
    tokens = tokenizer(sentence, add_special_tokens=False).input_ids
    pieces = run._pieces(tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_another_number_of_threads(monkeypatch):
    for now, wanted in (("1", 2), ("8", 1), ("", 1 if (run.os.cpu_count() or 1) > 1 else 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", now)
        assert run._another_number_of_threads() == wanted


def test_jobs_survive_the_disk(tmp_path):
    wanted = job.Job(
        "a", "native", "torch", None, "float32", "/c", "/b", None, "/i", "/s", True, ("auto",),
        ("x", "y"), True, 4,
    )  # fmt: skip
    wanted.write(tmp_path / "job")
    assert job.Job.read(tmp_path / "job") == wanted
    assert wanted.steps == 1 + 2 + 1
    answer = result(((1, 2),), runs=(Run("auto", 1.0),), gaps=((math.nan, 0.5),))
    again = job.Result.from_json(json.loads(json.dumps(answer.to_json(), allow_nan=False)))
    assert again == replace(answer, gaps=((None, 0.5),))

"""The whole model on this backend: names, merge, cache, gradients. Framework-free references."""

from __future__ import annotations

import numpy as np
import pytest

from unillava.data.collate import IMAGE, NEWLINE, Sample, collate
from unillava.inference.engine import Engine, greedy
from unillava.models.llava import Llava
from unillava.rope import rotary_tables
from unillava.spec import (
    LlavaSpec,
    ProjectorSpec,
    RopeSpec,
    TextSpec,
    VideoSpec,
    VisionSpec,
    parameter_table,
)

V, D = 71, 32


def text_spec(**changes) -> TextSpec:
    fields = dict(
        kind="llama", vocab_size=V, hidden_size=D, intermediate_size=48, num_layers=3,
        num_heads=4, num_kv_heads=2, head_dim=8, hidden_act="silu", rms_norm_eps=1e-5,
        max_position=256,
    )  # fmt: skip
    return TextSpec(**(fields | changes))


def vision_spec(kind="clip", **changes) -> VisionSpec:
    fields = dict(
        kind=kind, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=3,
        image_size=12, patch_size=4, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    return VisionSpec(**(fields | changes))


def spec_of(text=None, vision=None, depth=2, **changes) -> LlavaSpec:
    vision, text = vision or vision_spec(), text or text_spec()
    layers = len(changes.get("feature_layers", (-2,)))
    return LlavaSpec(
        family="llava_next",
        vision=vision,
        text=text,
        projector=ProjectorSpec(depth, vision.hidden_size * layers, text.hidden_size),
        has_newline=changes.pop("has_newline", True),
        **changes,
    )


SPECS = {
    "llama": spec_of(),
    "linear": spec_of(depth=1, has_newline=False),
    "identity": spec_of(text=text_spec(hidden_size=24, num_heads=3, num_kv_heads=3), depth=0),
    "deep": spec_of(depth=3, feature_layers=(-2, 1, -1), keep_class_token=True),
    "siglip": spec_of(
        vision=vision_spec("siglip", hidden_act="gelu_pytorch_tanh", has_head=True),
        feature_layers=(-1,),
    ),
    "qwen2": spec_of(text=text_spec(kind="qwen2", qkv_bias=True, tie_embeddings=True)),
    "biased": spec_of(text=text_spec(qkv_bias=True, output_bias=True, mlp_bias=True)),
    "llama3": spec_of(
        text=text_spec(rope=RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, original_max_position=16))
    ),
    "dynamic": spec_of(
        text=text_spec(rope=RopeSpec(1e4, "dynamic", 2.0, original_max_position=16))
    ),
    "window": spec_of(text=text_spec(kind="mistral", sliding_window=5)),
}


def filled(runtime, spec, seed=0):
    network = runtime.build(lambda: Llava(spec))
    rng = np.random.default_rng(seed)
    for name, shape in runtime.parameter_shapes(network).items():
        scale = 0.3 if len(shape) == 1 else 1.2 / np.sqrt(np.prod(shape[1:]))
        value = rng.standard_normal(shape).astype(np.float32) * scale
        runtime.assign(network, name, value + ("norm" in name and name.endswith("weight")))
    return network


def sample(spec, rng, before=3, tiles=1, after=4, frames=0) -> Sample:
    """Text, every row of some tiles in a scrambled order, newlines, text."""
    side = spec.vision.image_size
    n = tiles * spec.rows_per_tile
    rows = [np.zeros(before, np.int64), rng.permutation(n), np.zeros(after, np.int64)]
    kinds = [np.zeros(before), np.full(n, IMAGE), np.zeros(after)]
    if spec.has_newline and tiles:
        kinds[1][::4] = NEWLINE
        rows[1][::4] = 0
    kind, row = np.concatenate(kinds).astype(np.int8), np.concatenate(rows).astype(np.int64)
    ids = np.where(kind == 0, rng.integers(0, spec.text.vocab_size, len(kind)), 0)
    learnt = (kind == 0) & (np.arange(len(kind)) > before + n)
    pixels = rng.standard_normal((tiles, 3, side, side)).astype(np.float32) if tiles else None
    return Sample(ids, kind, row, learnt, pixels, None, n, 0)


@pytest.fixture(params=SPECS, scope="module")
def case(request, runtime):
    spec = SPECS[request.param]
    return spec, filled(runtime, spec)


def test_parameters_are_the_table(case, runtime):
    spec, network = case
    assert runtime.parameter_shapes(network) == parameter_table(spec)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "dynamic"])
def test_decode_continues_as_the_whole_sequence(name, runtime):
    """Prefill and each decode step give the logits that the whole sequence gives at once.

    Not so with dynamic NTK, whose base moves while keys stay: see the test below.
    """
    spec = SPECS[name]
    network = filled(runtime, spec)
    rng, engine = np.random.default_rng(1), Engine(network, spec)
    samples = [sample(spec, rng, 3, 1, 4), sample(spec, rng, 2, 0, 5), sample(spec, rng, 6, 2, 1)]
    state, logits_BV = engine.start(collate(samples), 8)
    grown = samples
    for _ in range(4):
        tokens_B = greedy(logits_BV)
        logits_BV = engine.step(state, tokens_B)
        grown = [append(s, t) for s, t in zip(grown, tokens_B, strict=True)]
    batch = collate(grown)
    whole_BSV = engine.logits(batch)
    last = whole_BSV[np.arange(3), batch["lengths"] - 1]
    np.testing.assert_allclose(
        runtime.numpy(logits_BV), last, rtol=0, atol=1e-5 * np.abs(last).max()
    )


def append(s: Sample, token: int) -> Sample:
    return Sample(
        np.append(s.ids_S, token), np.append(s.kind_S, 0).astype(np.int8), np.append(s.row_S, 0),
        np.append(s.learnt_S, True), s.pixels_T3HW, None, s.image_rows, 0,
    )  # fmt: skip


def test_rows_do_not_depend_on_the_batch(case, runtime):
    spec, network = case
    rng, engine = np.random.default_rng(2), Engine(network, spec)
    samples = [sample(spec, rng, 3, 1, 9), sample(spec, rng, 2, 0, 5), sample(spec, rng, 6, 2, 1)]
    together_BSV = engine.logits(collate(samples))
    for b, one in enumerate(samples):
        alone_1SV = engine.logits(collate([one]))
        np.testing.assert_allclose(
            together_BSV[b, : len(one)], alone_1SV[0], rtol=0, atol=1e-5 * np.abs(alone_1SV).max()
        )


def test_compiled_gives_the_same_tokens(runtime):
    spec = SPECS["llama"]
    network, found = filled(runtime, spec), []
    for compiled in (False, True):
        rng, engine = np.random.default_rng(3), Engine(network, spec, compiled=compiled)
        samples = [sample(spec, rng, 3, 1, 4), sample(spec, rng, 6, 2, 1)]
        state, logits_BV = engine.start(collate(samples, pad_to=engine.pad_to), 8)
        tokens = [greedy(logits_BV)]
        for _ in range(6):
            tokens.append(greedy(engine.step(state, tokens[-1])))
        found.append(np.stack(tokens))
    np.testing.assert_array_equal(found[0], found[1])


def test_dynamic_base_moves_with_the_length(runtime):
    """Cached keys keep the base they were made with, as in transformers' generation."""
    spec = SPECS["dynamic"]
    cos, _ = rotary_tables(spec.text, 24, prompt_length=20)
    fixed, _ = rotary_tables(spec.text, 20)
    np.testing.assert_array_equal(cos[:20], fixed)
    for p in range(20, 24):
        np.testing.assert_array_equal(cos[p], rotary_tables(spec.text, p + 1)[0][p])
    below, _ = rotary_tables(spec.text, 12, prompt_length=5)
    plain, _ = rotary_tables(text_spec(), 12)
    np.testing.assert_array_equal(below, plain)


def loss_function(network, batch, runtime):
    tensors = {k: runtime.tensor(v) for k, v in batch.items()}

    def loss(cos, sin):
        hidden = network(
            tensors["input_ids"], tensors["merge_index"], tensors["position_ids"], cos, sin,
            tensors["segment_ids"], tensors.get("pixel_values"),
            tensors.get("pixel_values_videos"),
        )  # fmt: skip
        return network.loss(hidden, tensors["target_index"], tensors["targets"])

    return loss


@pytest.mark.parametrize("name", ["llama", "qwen2", "siglip"])
def test_gradient_is_the_slope(name, runtime):
    """Central differences of the loss along a random direction of all parameters together."""
    spec = SPECS[name]
    network, rng = filled(runtime, spec), np.random.default_rng(4)
    batch = collate([sample(spec, rng, 3, 1, 6), sample(spec, rng, 2, 1, 8)])
    length = batch["input_ids"].shape[1]
    tables = [runtime.tensor32(t) for t in rotary_tables(spec.text, length)]
    run = runtime.value_and_grad(loss_function(network, batch, runtime), network)
    value, gradients = run(*tables)
    assert np.isfinite(value) and set(gradients) == set(parameter_table(spec))
    values = {n: runtime.fetch(network, n) for n in gradients}
    direction = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in values.items()}
    step, ends = 3e-4, []
    for sign in (1, -1):
        for n, v in values.items():
            runtime.assign(network, n, v + np.float32(sign * step) * direction[n])
        ends.append(run(*tables)[0])
    slope = sum(float((gradients[n].astype(np.float64) * direction[n]).sum()) for n in gradients)
    # float32 losses and a finite step: two digits are what this can show.
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) <= 0.02 * abs(slope) + 0.05


@pytest.mark.parametrize("position", ["before_projector", "after_projector"])
@pytest.mark.parametrize("mode", ["average", "max", "bilinear", "none"])
def test_video_pooling(position, mode, runtime):
    vision = vision_spec(image_size=20)  # 5 x 5 patches: an odd side
    spec = spec_of(vision=vision, video=VideoSpec(mode, 2, position), video_token=5)
    network = filled(runtime, spec)
    frames = np.random.default_rng(5).standard_normal((3, 3, 20, 20)).astype(np.float32)
    with runtime.no_grad():
        features = runtime.numpy(network.vision_tower(runtime.tensor(frames)))
        project = lambda x: runtime.numpy(network.multi_modal_projector(runtime.tensor(x)))  # noqa: E731
        if position == "before_projector":
            expected = project(pooled(features, mode))
        else:
            expected = pooled(project(features), mode)
        found = runtime.numpy(network.video_rows(runtime.tensor(frames)))
    expected = expected.reshape(-1, D)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def pooled(x_FPC: np.ndarray, mode: str) -> np.ndarray:
    """Reference: plain loops over output cells."""
    F, P, C = x_FPC.shape
    side = int(P**0.5)
    x = x_FPC.reshape(F, side, side, C)
    if mode == "none":
        return x_FPC
    if mode == "bilinear":
        out = -(-side // 2)
        centres = np.clip((np.arange(out) + 0.5) * side / out - 0.5, 0, side - 1)
        low = centres.astype(int)
        high, share = np.minimum(low + 1, side - 1), (centres - low).astype(np.float32)
        share = share[None, :, None, None]
        x = x[:, low] * (1 - share) + x[:, high] * share
        share = share.reshape(1, 1, -1, 1)
        x = x[:, :, low] * (1 - share) + x[:, :, high] * share
        return x.reshape(F, -1, C)
    reduce = {"average": np.mean, "max": np.max}[mode]
    cells = [
        reduce(x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2], axis=(1, 2))
        for i in range(side // 2)
        for j in range(side // 2)
    ]
    return np.stack(cells, 1)


def test_packed_rows_are_separate_conversations(runtime):
    """Two conversations in one row, told apart by segment ids, give what two rows give."""
    spec, rng = SPECS["llama"], np.random.default_rng(6)
    network = filled(runtime, spec)
    ids = [rng.integers(0, V, n) for n in (5, 8)]
    apart = [
        collate([Sample(i, np.zeros(len(i), np.int8), 0 * i, i >= 0)])["input_ids"] for i in ids
    ]
    joined = {
        "input_ids": np.concatenate([*apart, np.zeros((1, 3), np.int64)], 1),
        "position_ids": np.concatenate([np.arange(5), np.arange(8), np.arange(3)])[None],
        "segment_ids": np.repeat([1, 2, 0], [5, 8, 3])[None],
    }
    tables = [runtime.tensor32(t) for t in rotary_tables(spec.text, 16)]

    def hidden(input_ids, position_ids, segment_ids=None):
        index = np.arange(input_ids.size).reshape(input_ids.shape)
        embeds = network.merge(runtime.tensor(input_ids), runtime.tensor(index))
        segments = None if segment_ids is None else runtime.tensor(segment_ids)
        states = network.hidden(embeds, runtime.tensor(position_ids), *tables, segments)
        return runtime.numpy(states)[0]

    with runtime.no_grad():
        packed = hidden(**joined)
        separate = np.concatenate([hidden(i, np.arange(i.size)[None]) for i in apart])
    assert np.abs(packed[:13] - separate).max() <= 1e-5 * np.abs(separate).max()


def test_recomputed_blocks_give_the_same_gradients(runtime):
    spec = SPECS["llama"]
    rng = np.random.default_rng(7)
    batch = collate([sample(spec, rng, 3, 1, 6), sample(spec, rng, 2, 1, 8)])
    tables = [runtime.tensor32(t) for t in rotary_tables(spec.text, batch["input_ids"].shape[1])]
    results = []
    for recompute in (False, True):
        network = filled(runtime, spec)
        if recompute:
            blocks = [*network.language_model.model.layers]
            for block in [*blocks, *network.vision_tower.vision_model.encoder.layers]:
                runtime.recompute(block)
        run = runtime.value_and_grad(loss_function(network, batch, runtime), network)
        results.append(run(*tables))
    (value, gradients), (again, regradients) = results
    assert abs(value - again) <= 1e-6 * abs(value)
    for name, gradient in gradients.items():
        bar = 1e-6 * max(np.abs(gradient).max(), 1e-12)
        assert np.abs(gradient - regradients[name]).max() <= bar, name

"""Delta weights: made and applied as LLaVA does, with whatever grew or is new kept as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from weight_convert import blocks
from weight_convert.convert import convert
from weight_convert.dialects import delta, registry
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options
from weight_convert.storage.tensor import Place, Tensor
from weight_convert.verify import verify

WORDS, WIDTH, INNER, LAYERS = 96, 64, 128, 2
ADDED = {"v0": 4, "v1-1": 3}
"""[PAD], <im_patch>, <im_start>, <im_end>; later without [PAD]."""
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "vocab_size": WORDS, "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
    "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
IMAGES = {
    "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 32,
    "mm_vision_select_layer": -2, "mm_use_im_start_end": True, "use_mm_proj": True,
}  # fmt: skip
LEAVES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
}  # fmt: skip


def language(rows: int) -> dict[str, tuple[int, ...]]:
    layers = {
        f"model.layers.{n}.{leaf}.weight": shape
        for n in range(LAYERS)
        for leaf, shape in LEAVES.items()
    }
    ends = {"model.embed_tokens.weight": (rows, WIDTH), "lm_head.weight": (rows, WIDTH)}
    return {**layers, **ends, "model.norm.weight": (WIDTH,)}


def projector(kind: str) -> dict[str, tuple[int, ...]]:
    if kind == "linear":
        return {"model.mm_projector.weight": (WIDTH, 32), "model.mm_projector.bias": (WIDTH,)}
    layers = {0: (WIDTH, 32), 2: (WIDTH, WIDTH)}
    return {
        f"model.mm_projector.{n}.{k}": shape if k == "weight" else shape[:1]
        for n, shape in layers.items()
        for k in ("weight", "bias")
    }


def random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    return {n: numbers.normal(0, 0.05, shape).astype(np.float16) for n, shape in shapes.items()}


def save(path: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def clip(tiny, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("parts") / "clip"
    convert(tiny("llava"), target, "clip")
    return target


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    llama = {**CONFIG, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return save(tmp_path_factory.mktemp("base") / "llama", llama, random(language(WORDS), 0))


def tuned(kind: str, rows: int) -> dict[str, np.ndarray]:
    """A model near the base, with more rows and a projector."""
    tensors = random({**language(rows), **projector(kind)}, 1)
    for name, array in random(language(WORDS), 0).items():
        corner = tuple(slice(size) for size in array.shape)
        tensors[name][corner] = array + tensors[name][corner] / 16
    return tensors


def differences(
    target: dict[str, np.ndarray], base: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What LLaVA's make_delta does, in NumPy."""
    result = {name: array.copy() for name, array in target.items()}
    for name, array in base.items():
        result[name][tuple(slice(size) for size in array.shape)] -= array
    return result


def sums(made: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = {name: array.copy() for name, array in made.items()}
    for name, array in base.items():
        result[name][tuple(slice(size) for size in array.shape)] += array
    return result


def stored(directory: Path) -> dict[str, np.ndarray]:
    return {n: a for path in directory.glob("*.safetensors") for n, a in load_file(path).items()}


def canonical(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    places = {"weight": "linear_1.weight", "bias": "linear_1.bias"}
    places |= {f"{2 * k}.{p}": f"linear_{k + 1}.{p}" for k in range(2) for p in ("weight", "bias")}
    named = {}
    for name, array in tensors.items():
        tail = name.removeprefix("model.mm_projector.")
        named[
            f"multi_modal_projector.{places[tail]}" if tail != name else f"language_model.{name}"
        ] = array
    return named


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        array.dtype == expected[name].dtype and array.tobytes() == expected[name].tobytes()
        for name, array in found.items()
    )


VARIANTS = [("linear", ADDED["v0"]), ("linear", ADDED["v1-1"]), ("mlp2x_gelu", 0)]


@pytest.mark.parametrize(("kind", "added"), VARIANTS)
def test_making(tmp_path, base, clip, kind, added):
    target = tuned(kind, WORDS + added)
    config = {**CONFIG, **IMAGES, "mm_projector_type": kind, "vocab_size": WORDS + added}
    directory = save(tmp_path / "target", config, target)
    (directory / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    options = Options(base=base, vision=clip)
    convert(directory, tmp_path / "delta", "delta", options)
    assert equal(stored(tmp_path / "delta"), differences(target, stored(base)))
    assert json.loads((tmp_path / "delta/config.json").read_text())["vocab_size"] == WORDS + added
    assert (tmp_path / "delta/special_tokens_map.json").exists()


@pytest.mark.parametrize(("kind", "added"), VARIANTS)
def test_applying(tmp_path, base, clip, kind, added):
    """A delta that this program did not make; nothing in it tells what it is."""
    made = differences(tuned(kind, WORDS + added), stored(base))
    config = {**CONFIG, **IMAGES, "mm_projector_type": kind, "vocab_size": WORDS + added}
    directory = save(tmp_path / "delta", config, made)
    options = Options(base=base, vision=clip)
    assert open_source(directory, options).dialect == "original"
    source = open_source(directory, options, "delta")
    assert "21 tensors" in source.notes[-1]
    expected = canonical(sums(made, stored(base)))
    found = {name: tensor.read() for name, tensor in source.tensors.items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        found[name] = found[name][: WORDS + added]
    found = {name: array for name, array in found.items() if not name.startswith("vision")}
    assert equal(found, expected)
    convert(directory, tmp_path / "whole", "original", options, dialect="delta")
    assert equal(stored(tmp_path / "whole"), sums(made, stored(base)))
    convert(directory, tmp_path / "hf", "hf", options, dialect="delta")
    again = open_source(tmp_path / "hf")
    assert {n: t.read().tobytes() for n, t in again.tensors.items()} == {
        n: t.read().tobytes() for n, t in source.tensors.items()
    }


def test_there_and_back(tmp_path, base, clip):
    """In float16 nearly, as LLaVA's; made in float32, exactly."""
    target = tuned("linear", WORDS + 3)
    config = {**CONFIG, **IMAGES, "vocab_size": WORDS + 3}
    directory = save(tmp_path / "target", config, target)
    options = Options(base=base, vision=clip)
    convert(directory, tmp_path / "half", "delta", options)
    convert(tmp_path / "half", tmp_path / "again", "original", options)
    found = stored(tmp_path / "again")
    assert equal(found, sums(differences(target, stored(base)), stored(base)))
    off = {n: np.abs(found[n].astype(float) - target[n].astype(float)) for n in target}
    assert max(array.max() for array in off.values()) < 2**-14
    assert 0 < np.mean([(array > 0).mean() for array in off.values()]) < 0.1
    double = Options(base=base, vision=clip, dtype="float32")
    convert(directory, tmp_path / "single", "delta", double)
    assert verify(tmp_path / "single", options).equal
    single = Options(base=base, vision=clip, dtype="float16")
    convert(tmp_path / "single", tmp_path / "exact", "original", single)
    assert equal(stored(tmp_path / "exact"), target)


def test_the_base_may_be_of_any_layout(tmp_path, base, clip):
    target = tuned("linear", WORDS)
    directory = save(tmp_path / "target", {**CONFIG, **IMAGES}, target)
    convert(base, tmp_path / "paddle", "paddlenlp")
    options = Options(base=tmp_path / "paddle", vision=clip)
    convert(directory, tmp_path / "delta", "delta", options)
    assert equal(stored(tmp_path / "delta"), differences(target, stored(base)))
    convert(tmp_path / "delta", tmp_path / "again", "original", Options(base=base, vision=clip))
    assert equal(stored(tmp_path / "again"), sums(stored(tmp_path / "delta"), stored(base)))


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path, base, clip) -> Path:
    directory = save(tmp_path / "target", {**CONFIG, **IMAGES}, tuned("linear", WORDS))
    convert(directory, tmp_path / "delta", "delta", Options(base=base, vision=clip))
    return tmp_path / "delta"


def test_it_is_recognised_if_it_was_made_here(made, base, clip):
    found = [d.name for d in registry.dialects().values() if d.evidence(look(made))]
    assert found == ["delta"]
    assert open_source(made, Options(base=base, vision=clip)).dialect == "delta"


def look(path: Path):
    from weight_convert.contents import look

    return look(path)


def test_a_base_is_needed(made, clip, tmp_path):
    with pytest.raises(CheckpointError, match="--base"):
        open_source(made, Options(vision=clip))
    with pytest.raises(CheckpointError, match="--base"):
        convert(tmp_path / "target", tmp_path / "x", "delta", Options(vision=clip))
    with pytest.raises(CheckpointError, match="no language model"):
        open_source(made, Options(base=clip, vision=clip))


def test_a_wrong_base_is_noticed(made, base, clip, tmp_path):
    llama = json.loads((base / "config.json").read_text())
    other = save(tmp_path / "other", llama, random(language(WORDS), 9))
    with pytest.raises(CheckpointError, match="not the base that the delta was made with"):
        open_source(made, Options(base=other, vision=clip))


def test_a_damaged_record_of_the_base(made, base, clip):
    (made / delta.BASE_FILE).write_text('{"base": [1]}')
    with pytest.raises(CheckpointError, match="damaged"):
        open_source(made, Options(base=base, vision=clip))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.0.mlp.up_proj.weight": (INNER + 1, WIDTH)}, "does not fit the base"),
        ({"model.norm.weight": (WIDTH - 1,)}, "does not fit the base"),
        ({"lm_head.weight": (WORDS - 1, WIDTH)}, "does not fit the base"),
        ({"lm_head.weight": None}, "lacks: lm_head.weight"),
    ],
)
def test_shapes_that_cannot_be(tmp_path, base, clip, changes, message):
    shapes = {**language(WORDS), **projector("linear"), **changes}
    tensors = random({n: shape for n, shape in shapes.items() if shape}, 1)
    directory = save(tmp_path / "delta", {**CONFIG, **IMAGES}, tensors)
    with pytest.raises(CheckpointError, match=message):
        open_source(directory, Options(base=base, vision=clip), "delta")


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)
)
def test_any_shapes_and_blocks(rows, columns, more_rows, more_columns, block):
    numbers = np.random.default_rng(rows)
    base = numbers.normal(size=(rows, columns)).astype(np.float16)
    target = numbers.normal(size=(rows + more_rows - 1, columns + more_columns - 1))
    target = target.astype(np.float16)
    before, blocks.VALUES = blocks.VALUES, block
    try:
        found = delta.subtracted(in_memory(target), in_memory(base)).read()
    finally:
        blocks.VALUES = before
    expected = target.copy()
    expected[:rows, :columns] -= base
    assert found.tobytes() == expected.tobytes()


def in_memory(array: np.ndarray) -> Tensor:
    return Tensor("F16", array.shape, lambda: array, (Place(Path("memory"), 0, "x"),))

"""Ranks of a tensor-parallel checkpoint, put together, against a splitter of the test's own.

The judge is scripts/paddlenlp_judge.py, where PaddleNLP itself splits.
"""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_convert.errors import CheckpointError
from weight_convert.storage.pdparams import open_file
from weight_convert.storage.tensor_parallel import merge_ranks, open_tensor_parallel

HEAD = 4
INNER = 24
TOWER = "llama.vision_tower.vision_tower.vision_model.transformer.layers.0.self_attn.q_proj"

Arrays = dict[str, np.ndarray]


def make_config(heads: int = 4, kv_heads: int = 2, words: int = 24, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": heads * HEAD,
        "intermediate_size": INNER,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        **more,
    }


def make_whole(
    config: Mapping[str, Any], *, fused: bool = False, prefix: str = "llama.", seed: int = 0
) -> Arrays:
    """A LLaMA of two layers with biases, adapters, a vision tower and a projector. bf16 bits."""
    hidden, words = config["hidden_size"], config["vocab_size"]
    kv_heads = config["num_key_value_heads"] or config["num_attention_heads"]
    keys = kv_heads * HEAD
    attention = {"q_proj": hidden, "k_proj": keys, "v_proj": keys}
    mlp = {"gate_proj": INNER, "up_proj": INNER}
    if fused:
        attention, mlp = {"qkv_proj": hidden + 2 * keys}, {"gate_up_fused_proj": 2 * INNER}
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (words, hidden),
        f"{prefix}norm.weight": (hidden,),
        "llama.mm_projector.0.weight": (6, hidden),
        "llama.image_newline": (hidden,),
        f"{TOWER}.weight": (hidden, hidden),
        f"{TOWER}.bias": (hidden,),
        "lm_head.weight": (words, hidden) if config.get("tie_word_embeddings") else (hidden, words),
    }
    for layer in range(2):
        start = f"{prefix}layers.{layer}."
        for group, columns in (("self_attn", attention), ("mlp", mlp)):
            for name, size in columns.items():
                shapes[f"{start}{group}.{name}.weight"] = (hidden, size)
                shapes[f"{start}{group}.{name}.bias"] = (size,)
                shapes[f"{start}{group}.{name}.lora_A"] = (hidden, 3)
                shapes[f"{start}{group}.{name}.lora_B"] = (3, size)
        for name, size in (("self_attn.o_proj", hidden), ("mlp.down_proj", INNER)):
            shapes[f"{start}{name}.weight"] = (size, hidden)
            shapes[f"{start}{name}.bias"] = (hidden,)
            shapes[f"{start}{name}.lora_A"] = (size, 3)
            shapes[f"{start}{name}.lora_B"] = (3, hidden)
        shapes[f"{start}input_layernorm.weight"] = (hidden,)
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2**16, shape, np.uint16) for name, shape in shapes.items()}


def split(whole: Arrays, config: Mapping[str, Any], ranks: int) -> list[Arrays]:
    """What each rank has, written down layer by layer as in PaddleNLP's classes."""
    kv_heads = config["num_key_value_heads"] or config["num_attention_heads"]
    columns = ["q_proj", "qkv_proj", "gate_proj", "up_proj"]
    columns += ["k_proj", "v_proj"] if kv_heads % ranks == 0 else []
    shared_words = config["vocab_size"] % ranks == 0
    result: list[Arrays] = [{} for _ in range(ranks)]
    for name, array in whole.items():
        parts = [array] * ranks
        *_, module, leaf = name.split(".")
        if TOWER in name:
            pass
        elif module == "gate_up_fused_proj" and leaf != "lora_A":
            gate, up = np.split(array, 2, -1)
            parts = [
                np.concatenate(pair, -1)
                for pair in zip(np.split(gate, ranks, -1), np.split(up, ranks, -1), strict=True)
            ]
        elif module in columns and leaf != "lora_A":
            parts = np.split(array, ranks, -1)
        elif module in ("o_proj", "down_proj") and leaf in ("weight", "lora_A"):
            parts = np.split(array, ranks, 0)
        elif module in ("embed_tokens", "lm_head") and shared_words:
            by_rows = module == "embed_tokens" or config.get("tie_word_embeddings")
            parts = np.split(array, ranks, 0 if by_rows else -1)
        for rank, part in zip(result, parts, strict=True):
            rank[name] = np.ascontiguousarray(part)
    return result


def save(
    directory: Path,
    ranks: list[Arrays],
    config: Mapping[str, Any] | None,
    stem: str = "model_state",
) -> Path:
    directory.mkdir(exist_ok=True)
    for number, arrays in enumerate(ranks):
        (directory / f"{stem}.tp{number:02d}.pdparams").write_bytes(pickle.dumps(arrays, 4))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def check_equal(read: Any, whole: Arrays) -> None:
    assert list(read) == list(whole)
    for name, array in whole.items():
        assert (read[name].dtype, read[name].shape) == ("BF16", array.shape), name
        got = read[name].read()
        assert got.dtype == np.uint16 and got.flags.c_contiguous
        np.testing.assert_array_equal(got, array, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whole_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6]), "ranks")
    heads = data.draw(st.sampled_from([h for h in (4, 6, 12) if h % ranks == 0]), "heads")
    kv_heads = data.draw(st.sampled_from([k for k in (1, 2, 3, 4) if heads % k == 0]), "keys")
    fused = data.draw(st.booleans(), "fused") and kv_heads % ranks == 0
    config = make_config(
        heads,
        data.draw(st.sampled_from([kv_heads, None])) if kv_heads == heads else kv_heads,
        data.draw(st.sampled_from([24, 25, 32]), "words"),
        tie_word_embeddings=data.draw(st.booleans(), "tied"),
        tensor_parallel_degree=data.draw(st.sampled_from([ranks, 1, -1])),
    )
    whole = make_whole(
        config, fused=fused, prefix=data.draw(st.sampled_from(["llama.", "", "qwen2."]))
    )
    directory = save(tmp_path_factory.mktemp("tp") / "a", split(whole, config, ranks), config)
    check_equal(open_tensor_parallel(directory), whole)


def test_files_and_pieces_and_adapters(tmp_path: Path) -> None:
    config = make_config()
    whole = make_whole(config)
    ranks = split(whole, config, 2)
    directory = save(tmp_path / "a", ranks, config, "lora_model_state")
    check_equal(open_tensor_parallel(directory, stem="lora_model_state"), whole)
    files = sorted(directory.glob("*.pdparams"))
    check_equal(open_tensor_parallel(files, config), whole)
    with pytest.raises(CheckpointError, match="without their configuration"):
        open_tensor_parallel(files)

    for rank, arrays in enumerate(ranks):
        items = list(arrays.items())
        for number, piece in enumerate((items[:5], items[5:]), 1):
            name = f"model_state.tp{rank:02d}-{number:05d}-of-00002.pdparams"
            (directory / name).write_bytes(pickle.dumps(dict(piece), 4))
    read = open_tensor_parallel(directory)
    check_equal(read, whole)
    name = "llama.layers.0.mlp.down_proj.weight"
    assert [place.path.name for place in read[name].places] == [
        f"model_state.tp{rank:02d}-00002-of-00002.pdparams" for rank in range(2)
    ]
    assert read[name].how == ("join 2 ranks on axis 0",)
    (directory / "model_state.tp01-00001-of-00002.pdparams").unlink()
    with pytest.raises(CheckpointError, match="one complete set"):
        open_tensor_parallel(directory)


def test_a_part_at_a_time_is_in_memory(tmp_path: Path) -> None:
    ranks, size = 8, 2**20
    config = make_config(heads=8, kv_heads=8, words=size // 16)
    name = "llama.embed_tokens.weight"
    whole = {name: np.arange(size * 2, dtype=np.uint16).reshape(-1, 32)}
    parts = [{name: part} for part in np.split(whole[name], ranks)]
    directory = save(tmp_path / "a", parts, {**config, "vocab_size": len(whole[name])})
    tracemalloc.start()
    try:
        tensor = open_tensor_parallel(directory)[name]
        assert tracemalloc.get_traced_memory()[1] < tensor.nbytes / 8
        array = tensor.read()
        assert tracemalloc.get_traced_memory()[1] < tensor.nbytes * 1.4
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(array, whole[name])


# --- contradictions --------------------------------------------------------------------------


def check_refused(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        for tensor in open_tensor_parallel(directory).values():
            tensor.read()
    for word in words:
        assert word in str(caught.value)


def drop_a_tensor(ranks: list[Arrays]) -> None:
    del ranks[1]["llama.norm.weight"]


def change_a_norm(ranks: list[Arrays]) -> None:
    ranks[1]["llama.norm.weight"] = ranks[1]["llama.norm.weight"] ^ 1


def change_the_tower(ranks: list[Arrays]) -> None:
    ranks[1][f"{TOWER}.weight"] = ranks[1][f"{TOWER}.weight"] ^ 1


def change_a_dtype(ranks: list[Arrays]) -> None:
    name = "llama.layers.0.mlp.up_proj.weight"
    ranks[1][name] = ranks[1][name].view("<f2")


def cut_a_matrix(ranks: list[Arrays]) -> None:
    name = "llama.layers.1.self_attn.o_proj.weight"
    ranks[0][name] = ranks[0][name][:-1]


def cut_it_on_all_ranks(ranks: list[Arrays]) -> None:
    name = "llama.layers.1.self_attn.o_proj.weight"
    for rank in ranks:
        rank[name] = rank[name][:-1]


def make_a_number_of_it(ranks: list[Arrays]) -> None:
    for rank in ranks:
        rank["lm_head.weight"] = np.array(3, np.uint16)


def add_a_split_tensor_of_another_kind(ranks: list[Arrays]) -> None:
    for number, rank in enumerate(ranks):
        rank["llama.layers.0.mlp.experts.0.up_proj.weight"] = np.full(3, number, np.uint16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_a_tensor, "only one of rank 0 and rank 1 has llama.norm.weight"),
        (change_a_norm, "'llama.norm.weight' is not"),
        (change_the_tower, f"{TOWER}.weight"),
        (change_a_dtype, "F16 (16, 12)"),
        (cut_a_matrix, "BF16 (7, 16), BF16 (8, 16)"),
        (cut_it_on_all_ranks, "expected: 16 on axis 0"),
        (make_a_number_of_it, "expected: 24 on axis -1"),
        (add_a_split_tensor_of_another_kind, "for PaddleNLP does not split it"),
    ],
)
def test_ranks_that_contradict_each_other(
    tmp_path: Path, change: Callable[[list[Arrays]], None], words: str
) -> None:
    config = make_config()
    ranks = split(make_whole(config), config, 2)
    change(ranks)
    check_refused(save(tmp_path / "a", ranks, config), words)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"num_key_value_heads": 1}, "k_proj"),
        ({"num_key_value_heads": None}, "k_proj"),
        ({"vocab_size": 12}, "embed_tokens"),
        ({"vocab_size": 23}, "embed_tokens"),
        ({"hidden_size": 32}, "q_proj"),
        ({"intermediate_size": 12}, "gate_proj"),
        ({"tie_word_embeddings": True}, "lm_head"),
        ({"tensor_parallel_degree": 4}, "expected: 4, as config.json says"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": "24"}, "vocab_size"),
        ({"intermediate_size": True}, "intermediate_size"),
    ],
)
def test_a_configuration_of_something_else(
    tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    config = make_config()
    ranks = split(make_whole(config), config, 2)
    check_refused(save(tmp_path / "a", ranks, {**config, **wrong}), words)


def test_files_that_are_not_all_there(tmp_path: Path) -> None:
    config = make_config(heads=12, kv_heads=12)
    directory = save(tmp_path / "a", split(make_whole(config), config, 4), config)
    last = directory / "model_state.tp03.pdparams"
    content = last.read_bytes()
    last.unlink()
    check_refused(directory, "embed_tokens", "3 ranks with (6, 48)", "expected: 24")
    last.write_bytes(content[:-1])
    check_refused(directory, "model_state.tp03.pdparams is damaged")
    last.write_bytes(content)
    (directory / "model_state.tp01.pdparams").unlink()
    check_refused(directory, "ranks are missing", "without a gap")
    last.rename(directory / "model_state.tp01_pp00.pdparams")
    check_refused(directory, "more ways than tensors", "model_state.tp01_pp00.pdparams")
    check_refused(save(tmp_path / "empty", [], config), "no model_state.tpNN.pdparams")
    check_refused(tmp_path / "absent", "cannot be read")
    check_refused(
        save(tmp_path / "bare", split(make_whole(config), config, 2), None), "config.json"
    )
    with pytest.raises(CheckpointError, match="without ranks"):
        merge_ranks([], config)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\x00"])
def test_damaged_configurations(tmp_path: Path, text: str) -> None:
    config = make_config()
    directory = save(tmp_path / "a", split(make_whole(config), config, 2), config)
    (directory / "config.json").write_text(text)
    check_refused(directory, "config.json")


def test_a_tensor_in_two_pieces(tmp_path: Path) -> None:
    config = make_config()
    directory = save(tmp_path / "a", [], config)
    for number in (1, 2):
        content = pickle.dumps({"llama.norm.weight": np.zeros(16, np.uint16)}, 4)
        (directory / f"model_state.tp00-{number:05d}-of-00002.pdparams").write_bytes(content)
    check_refused(directory, "another piece has", "llama.norm.weight")
    one = directory / "model_state.tp00-00001-of-00002.pdparams"
    assert list(open_file(one)) == ["llama.norm.weight"]

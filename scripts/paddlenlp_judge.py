"""PaddleNLP judges our Paddle files: it reads what we write, and we read what it writes.

    bash scripts/paddlenlp_environment.sh DIRECTORY
    DIRECTORY/bin/python scripts/paddlenlp_judge.py

Prints a line for each check and exits with 1 if one fails. Everything is tiny and random, on CPU,
in a temporary directory. The tensor-parallel checkpoints come from PaddleNLP itself: split by its
own functions for 2 and 4 ranks, and saved by two processes that it runs in parallel.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddlenlp_logits import compute_logits, load_strictly  # (first: it quietens Paddle)

import paddle  # isort: skip
from paddle.distributed import fleet
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PretrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weight_convert.storage import safetensors
from weight_convert.storage.index import open_shards
from weight_convert.storage.pdparams import open_file, read_parameter_names, write_file
from weight_convert.storage.tensor import Tensor
from weight_convert.storage.tensor_parallel import merge_ranks, open_tensor_parallel

TOKENS = np.array([[1, 5, 9, 33, 2, 47], [1, 2, 3, 4, 5, 6]])
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SMALL = {
    "vocab_size": 52,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[type[PretrainedConfig], type[PretrainedModel], dict[str, object]]] = {
    "Llama": (LlamaConfig, LlamaForCausalLM, {}),
    "Llama, a head of keys for each": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "Llama, one head of keys": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "Llama, odd vocabulary": (LlamaConfig, LlamaForCausalLM, {"vocab_size": 51}),
    "Llama, tied head": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "Llama, fused": (
        LlamaConfig,
        LlamaForCausalLM,
        {"fuse_attention_qkv": True, "fuse_attention_ffn": True, "num_key_value_heads": 4},
    ),
    "Qwen2, with biases": (Qwen2Config, Qwen2ForCausalLM, {}),
}
LORA_TARGETS = [
    f".*{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up_fused")
]

Arrays = dict[str, np.ndarray]
"""bfloat16 as uint16, as in Paddle's own arrays."""


class Failure(Exception):
    """A check did not hold."""


def configure(name: str) -> PretrainedConfig:
    """The configuration of the model of that name."""
    config_class, _, changes = MODELS[name]
    config = config_class(**{**SMALL, **changes})
    for key, value in changes.items():
        setattr(config, key, value)  # its constructors pass over what says how to run a model
    return config


def build(name: str, dtype: str = "float32") -> PretrainedModel:
    """The model of that name, with the same random values (also biases) every time."""
    paddle.seed(20)
    model = MODELS[name][1](configure(name))
    for parameter in model.parameters():
        parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    model.to(dtype=dtype)
    model.eval()
    return model


def arrays_of(model: paddle.nn.Layer) -> Arrays:
    """The parameters of a model, as arrays."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def need_equal(read: Mapping[str, Tensor], expected: Arrays, dtype: str = "float32") -> str:
    """Names, dtypes, shapes and bits; returns how many."""
    if set(read) != set(expected):
        raise Failure(f"other names: {sorted(set(read) ^ set(expected))[:4]}")
    for name, array in expected.items():
        if (read[name].dtype, read[name].shape) != (CODES[dtype], array.shape):
            raise Failure(f"{name}: {read[name].dtype} {read[name].shape}, not {array.shape}")
        if read[name].read().tobytes() != array.tobytes():
            raise Failure(f"{name}: other bits")
    return f"{len(expected)} tensors, bits equal"


def need_same_model(model: PretrainedModel, other: PretrainedModel) -> str:
    """Parameters, and logits where Paddle can compute them."""
    ours, theirs = arrays_of(model), arrays_of(other)
    if any(ours[name].tobytes() != theirs[name].tobytes() for name in ours | theirs):
        raise Failure("parameters differ")
    if model.llama.norm.weight.dtype != paddle.float32:
        return f"{len(ours)} parameters, bits equal"
    if compute_logits(model, TOKENS).tobytes() != compute_logits(other, TOKENS).tobytes():
        raise Failure("logits differ")
    return f"{len(ours)} parameters and the logits, bits equal"


def write_pdparams(path: Path, arrays: Arrays, dtype: str, **options: object) -> None:
    """With our writer."""
    path.parent.mkdir(exist_ok=True)
    table = {name: (CODES[dtype], array.shape) for name, array in arrays.items()}
    write_file(path, table, iter(arrays.items()), **options)


# --- files of one process --------------------------------------------------------------------


def check_single_files(root: Path, dtype: str) -> Iterator[tuple[str, str]]:
    """pdparams and safetensors, both ways."""
    model = build("Llama", dtype)
    arrays = arrays_of(model)
    theirs, ours = root / f"theirs-{dtype}", root / f"ours-{dtype}"
    model.save_pretrained(str(theirs))
    stored = theirs / "model_state.pdparams"
    yield "we read its pdparams", need_equal(open_file(stored), arrays, dtype)

    model.config.save_pretrained(str(ours))
    names = read_parameter_names(stored)
    again = ours / "again.pdparams"
    write_pdparams(again, arrays, dtype, parameter_names=names)
    if again.read_bytes() != stored.read_bytes():
        raise Failure("our file is another")
    yield "our pdparams is its own file", f"{stored.stat().st_size} bytes equal"
    again.unlink()

    for protocol in (2, 3, 4):
        write_pdparams(ours / "model_state.pdparams", arrays, dtype, protocol=protocol)
        loaded = load_strictly(ours, dtype=dtype)
        yield f"it loads our pdparams, protocol {protocol}", need_same_model(loaded, model)
    (ours / "model_state.pdparams").unlink()

    model.save_pretrained(str(theirs), max_shard_size="20KB")
    shards = open_shards(theirs / "model_state.pdparams.index.json", open_file)
    yield "we read its shards", need_equal(shards, arrays, dtype)

    model.save_pretrained(str(theirs), safe_serialization=True)
    tensors = safetensors.open_file(theirs / "model.safetensors").tensors()
    codes = {tensor.dtype for tensor in tensors.values()}
    if dtype == "bfloat16":  # it goes through NumPy, and names the bits uint16
        tensors = {n: Tensor("BF16", t.shape, t.read, t.places) for n, t in tensors.items()}
    equal = need_equal(tensors, arrays, dtype)
    yield f"we read its safetensors, tag {' '.join(codes)}", equal

    for metadata in ({"format": "np"}, {}):
        table = {name: (CODES[dtype], array.shape) for name, array in arrays.items()}
        table = {name: table[name] for name in safetensors.layout_order(table)}
        stream = ((name, arrays[name]) for name in table)
        safetensors.write_file(ours / "model.safetensors", table, stream, metadata=metadata)
        loaded = load_strictly(ours, dtype=dtype)
        what = f"it loads our safetensors, tag {CODES[dtype]}, metadata {metadata}"
        yield what, need_same_model(loaded, model)


# --- tensor-parallel files -------------------------------------------------------------------


def split_by_paddlenlp(model: PretrainedModel, whole: Arrays, ranks: int) -> list[Arrays]:
    """The parts of every rank, by PaddleNLP's functions."""
    parts = []
    for rank in range(ranks):
        model.config.tensor_parallel_degree, model.config.tensor_parallel_rank = ranks, rank
        actions = model.get_tensor_parallel_convert_actions(model.config, whole.keys())
        parts.append({n: actions[n](a) if n in actions else a for n, a in whole.items()})
    return parts


def check_split_functions(root: Path, name: str, ranks: int, dtype: str) -> str:
    """Files split by PaddleNLP's functions and written by us, merged by us."""
    model = build(name, dtype)
    whole = arrays_of(model)
    parts = split_by_paddlenlp(model, whole, ranks)
    directory = root / f"{name}-{ranks}-{dtype}"
    for rank, arrays in enumerate(parts):
        write_pdparams(directory / f"model_state.tp{rank:02d}.pdparams", arrays, dtype)
    model.config.save_pretrained(str(directory))
    split = sum(parts[0][n].shape != a.shape for n, a in whole.items())
    return f"{need_equal(open_tensor_parallel(directory), whole, dtype)}, {split} were split"


def run_in_parallel(root: Path) -> None:
    """Two processes of this script, which save the models of `save_in_parallel`."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node=2"]
    command += ["--backend", "gloo", "--log_dir", str(root / "log"), __file__, str(root)]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise Failure(f"the parallel processes failed:\n{result.stdout[-3000:]}")


def save_in_parallel(root: Path) -> None:
    """One of the two processes: load whole models in parallel, save them rank by rank."""
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 2, "pp_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    rank = fleet.get_hybrid_communicate_group().get_model_parallel_rank()
    ranks = {"tensor_parallel_degree": 2, "tensor_parallel_rank": rank}
    for name, (_, model_class, changes) in MODELS.items():
        fused = {key: value for key, value in changes.items() if key.startswith("fuse")}
        model = load_strictly(root / "whole" / name, model_class, **ranks, **fused)
        model.save_pretrained(str(root / "ranks" / name))
        config = LoRAConfig(
            target_modules=LORA_TARGETS, r=4, tensor_parallel_degree=2, dtype="float32"
        )
        adapted = LoRAModel(model, config)
        paddle.seed(7)
        for key, value in adapted.state_dict().items():
            if "lora" in key:  # what is on both ranks must be the same, what is split must not
                noise, own = paddle.randn(value.shape), key.removeprefix("model.")
                value.set_value(noise + rank if own in adapted.lora_split_mapping else noise)
        adapted.save_pretrained(str(root / "lora-ranks" / name))
        adapted.save_pretrained(str(root / "lora-whole" / name), merge_tensor_parallel=True)


def check_parallel_processes(root: Path) -> Iterator[tuple[str, str]]:
    """Checkpoints that two processes saved, merged by us."""
    wholes = {}
    for name in MODELS:
        model = build(name)
        model.save_pretrained(str(root / "whole" / name))
        wholes[name] = arrays_of(model)
    run_in_parallel(root)
    for name, whole in wholes.items():
        yield f"{name}: weights", need_equal(open_tensor_parallel(root / "ranks" / name), whole)
    for name in MODELS:
        merged = open_file(root / "lora-whole" / name / "lora_model_state.pdparams")
        files = sorted((root / "lora-ranks" / name).glob("lora_model_state.tp*.pdparams"))
        ours = merge_ranks([open_file(path) for path in files], configure(name).to_dict())
        expected = {key: tensor.read() for key, tensor in merged.items()}
        # It joins the adapter of gate and up as if it were one matrix: not what its weights mean.
        skipped = {key for key in expected if key.endswith("gate_up_fused_proj.lora_B")}
        ours, expected = (
            {key: value for key, value in table.items() if key not in skipped}
            for table in (ours, expected)
        )
        note = f" ({len(skipped)} of fused gate and up left out)" if skipped else ""
        yield f"{name}: LoRA", need_equal(ours, expected) + note


def run_checks(root: Path) -> Iterator[tuple[str, str]]:
    """(what was checked, what was found), one after the other."""
    for dtype in CODES:
        for what, found in check_single_files(root, dtype):
            yield f"{dtype}: {what}", found
    for name, ranks, dtype in itertools.product(MODELS, (2, 4), ("float32", "bfloat16")):
        found = check_split_functions(root, name, ranks, dtype)
        yield f"{name}, {dtype}: {ranks} ranks by its split functions", found
    for what, found in check_parallel_processes(root):
        yield f"two processes, {what}", found


def main() -> int:
    """Run every check; the parallel processes come here too."""
    if "PADDLE_TRAINER_ID" in os.environ and len(sys.argv) == 2:
        save_in_parallel(Path(sys.argv[1]))
        return 0
    passed = 0
    with tempfile.TemporaryDirectory() as root:
        try:
            for what, found in run_checks(Path(root)):
                print(f"PASS  {what}: {found}", flush=True)
                passed += 1
        except Failure as failure:
            print(f"FAIL  after {passed} checks that passed: {failure}")
            return 1
    print(f"PaddleNLP agrees: {passed} checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Launching: commands, environments, checks, the arguments of the old scripts, and the watch."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from unillava.errors import RequestError
from unillava.launch import Request, build, check_recipe, slurm_script
from unillava.launch.__main__ import read_options
from unillava.launch.command import CLUSTER_TIMEOUT, STRATEGIES, parse_master
from unillava.launch.llava_arguments import translate
from unillava.launch.msrun_arguments import build_form, read_form
from unillava.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TRAIN = ("train", "recipe.yaml", "steps.batch=16")
PYTHON = sys.executable


def request(backend: str, processes: int = 2, **more) -> Request:
    return Request(backend=backend, processes=processes, arguments=TRAIN, **more)


# --- commands --------------------------------------------------------------------------------


def words(launch) -> str:
    """The command, with programs by their names alone."""
    return " ".join(
        Path(w).name if os.path.isabs(w) and Path(w).exists() else w for w in launch.command
    )


WORKER = "-m unillava train recipe.yaml steps.batch=16"
PY = Path(PYTHON).name


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (request("torch", 1), f"{PY} {WORKER}"),
        (
            request("torch"),
            f"{PY} -m torch.distributed.run --nproc-per-node 2 --standalone "
            f"--monitor-interval 1 --log-dir output/logs/torchrun --tee 3 {WORKER}",
        ),
        (
            request("torch", 8, nodes=4, node_rank=3, master=("10.0.0.1", 29500), strategy="zero3"),
            f"{PY} -m torch.distributed.run --nproc-per-node 8 --nnodes 4 --node-rank 3 "
            "--master-addr 10.0.0.1 --master-port 29500 --monitor-interval 1 "
            "--log-dir output/logs/torchrun --tee 3 "
            f"{WORKER} running.strategy=zero3",
        ),
        (
            request("mindspore", device="cpu"),
            "msrun --worker_num 2 --local_worker_num 2 --master_addr 127.0.0.1 --master_port 8118 "
            "--log_dir output/logs/msrun --join True --cluster_time_out 7200 "
            f"python {WORKER} --device cpu",
        ),
        (
            request("mindspore", 8, nodes=2, node_rank=1, master=("10.0.0.1", 8118), logs="l"),
            "msrun --worker_num 16 --local_worker_num 8 --master_addr 10.0.0.1 --master_port 8118 "
            f"--node_rank 1 --log_dir l/msrun --join True --cluster_time_out 7200 python {WORKER}",
        ),
        (
            request("paddle", device="ascend910b"),
            f"{PY} -m paddle.distributed.launch --nproc_per_node 2 --log_dir output/logs/paddle "
            f"{PY} -u {WORKER} --device npu:0",
        ),
        (
            request("paddle", nodes=2, node_rank=1, master=("fe80::1", 99)),
            f"{PY} -m paddle.distributed.launch --nproc_per_node 2 --log_dir output/logs/paddle "
            f"--nnodes 2 --rank 1 --master [fe80::1]:99 {PY} -u {WORKER}",
        ),
    ],
)
def test_each_launcher_gets_its_own_command(asked, expected):
    assert words(build(asked, {})) == expected


NPU_FLAGS = {
    "FLAGS_use_stride_kernel": "0",
    "FLAGS_npu_storage_format": "0",
    "FLAGS_npu_jit_compile": "0",
    "FLAGS_npu_scale_aclnn": "True",
    "FLAGS_npu_split_aclnn": "True",
    "FLAGS_allocator_strategy": "auto_growth",
    "CUSTOM_DEVICE_BLACK_LIST": "set_value,set_value_with_tensor",
    "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3",
}
"""PaddleMIX' guide for Ascend; its two versions disagree on FLAGS_npu_jit_compile."""


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("paddle", "ascend910b", NPU_FLAGS),
        ("paddle", "a100", {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}),
        ("torch", "a100", {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "OMP_NUM_THREADS": "1"}),
        ("torch", "ascend910b", {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}),
        ("mindspore", "ascend910b", {"ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3"}),
        ("paddle", "cpu", {"PADDLE_DISTRI_BACKEND": "gloo"}),
    ],
)
def test_a_device_sets_its_environment(backend, device, expected):
    environment = build(request(backend, 4, device=device), {}).environment
    assert expected.items() <= environment.items()
    assert environment["UNILLAVA_BACKEND"] == backend


def test_the_users_own_environment_goes_first_and_that_of_another_run_goes_away():
    given = {"FLAGS_npu_jit_compile": "1", "OMP_NUM_THREADS": "7", "RANK": "3", "HOME": "/home"}
    launch = build(request("paddle", device="ascend910b"), given)
    after = launch.applied(given)
    assert after["FLAGS_npu_jit_compile"] == "1" and after["OMP_NUM_THREADS"] == "7"
    assert "RANK" not in after and after["HOME"] == "/home"
    assert shlex.split(launch.shell())[:3] == ["env", "-u", "RANK"]


def test_processes_share_the_cores_of_a_cpu():
    threads = build(request("torch", 2, device="cpu"), {}).environment["OMP_NUM_THREADS"]
    assert int(threads) == max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.parametrize("backend", STRATEGIES)
def test_the_strategies_are_those_of_the_backends(backend):
    source = (ROOT / "backends" / backend / "parallel.py").read_text()
    tree = ast.parse(source)
    values = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "STRATEGIES"
    ]
    assert values == [STRATEGIES[backend]]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (request("jax"), "torch, mindspore, paddle"),
        (request("mindspore", device="a100"), "ascend910b, cpu"),
        (request("paddle", strategy="zero3"), "single, ddp"),
        (request("torch", strategy="single"), "ddp, fsdp"),
        (request("torch", 0), "at least one process"),
        (request("torch", nodes=2), "--master HOST:PORT"),
        (request("torch", nodes=2, node_rank=2, master=("a", 1)), "0 to 1"),
        (replace(request("torch"), arguments=("chat",)), "only training"),
        (replace(request("torch"), arguments=()), "only training"),
        (replace(request("torch"), arguments=("train",)), "no recipe"),
        (replace(request("torch"), arguments=(*TRAIN, "--device=cpu")), "before --"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, told):
    with pytest.raises(RequestError) as caught:
        build(asked, {})
    assert told in str(caught.value)


def test_more_processes_than_visible_cards_are_refused():
    with pytest.raises(RequestError, match="fewer cards") as caught:
        build(request("torch", 4, device="a100"), {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert "--nproc 2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"), [("10.0.0.1:29500", ("10.0.0.1", 29500)), ("[::1]:8", ("::1", 8))]
)
def test_a_master_is_host_and_port(text, expected):
    assert parse_master(text) == expected


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:70000", "host:x"])
def test_a_master_that_is_none(text):
    with pytest.raises(RequestError, match="--master"):
        parse_master(text)


# --- the recipe, before many workers read it -------------------------------------------------


def written(folder: Path, **changes) -> Path:
    content = {
        "model": {"path": "m"},
        "data": {"files": [{"path": "d.json"}]},
        "rates": {"projector": 1e-3},
        "steps": {"batch": 16, "micro_batch": 2},
        "output": "out",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_a_batch_that_cannot_be_shared_is_refused_at_once(tmp_path):
    path = written(tmp_path)
    check_recipe(Request("torch", 8, ("train", str(path))))
    check_recipe(
        Request("torch", 4, ("train", str(path), "--stop-at", "5"), nodes=2, master=("a", 1))
    )
    with pytest.raises(RequestError, match="a multiple of 6"):
        check_recipe(Request("torch", 3, ("train", str(path))))


def test_a_strategy_of_the_recipe_that_the_backend_has_not_is_refused(tmp_path):
    path = written(tmp_path, running={"strategy": "zero3"})
    with pytest.raises(RequestError, match="--strategy: one of ddp, zero1"):
        check_recipe(Request("mindspore", 2, ("train", str(path))))
    check_recipe(Request("mindspore", 2, ("train", str(path)), strategy="zero1"))


# --- Slurm -----------------------------------------------------------------------------------


def test_a_slurm_script_is_one_and_asks_for_what_is_needed(tmp_path):
    text = slurm_script(request("mindspore", 8, nodes=4, device="ascend910b", strategy="zero1"))
    script = tmp_path / "job.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    for line in ("--nodes=4", "--ntasks-per-node=1", "--gres=npu:8", "--signal=USR1@120"):
        assert f"#SBATCH {line}\n" in text
    # What each machine would run, with Slurm's programs and variables played by the test.
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho first\necho second\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\n"$@"\n')
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("scontrol", "srun", "python"):
        (tmp_path / name).chmod(0o755)
    script.write_text(text.replace(PYTHON, "python"))
    slurm = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "123456", "SLURM_NODEID": "2"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script], env={"PATH": path, **slurm}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (
        "-m unillava launch --backend mindspore --nproc 8 --nnodes 4 --logs output/logs "
        "--strategy zero1 --device ascend910b --node-rank 2 --master first:23456 "
        "-- train recipe.yaml steps.batch=16"
    )


# --- LLaVA's arguments -----------------------------------------------------------------------


def changed(recipe: str, arguments: str, **more) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that the arguments of a script come to, and those without effect."""
    path = CONFIGS / f"{recipe}.yaml"
    translation = translate(shlex.split(arguments), load_recipe(path), **more)
    return load_recipe(path, translation.overrides), translation.left_out


V1_5 = """--deepspeed ./scripts/zero3.json --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1
    --data_path a.json --image_folder pictures --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter p/mm_projector.bin --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --image_aspect_ratio pad --group_by_modality_length True --bf16 True --output_dir out
    --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
    --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
    --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4
    --lazy_preprocess True --report_to wandb"""


def test_the_script_of_llava_1_5_comes_to_its_recipe():
    """All that finetune.sh says is what the recipe has already, but for names and paths."""
    found, left_out = changed("llava_v1_5/finetune_7b", V1_5, processes=8)
    before = load_recipe(CONFIGS / "llava_v1_5/finetune_7b.yaml")
    assert found.model == replace(
        before.model, language="lmsys/vicuna-13b-v1.5", template="v1",
        pretrain_mm_mlp_adapter="p/mm_projector.bin",
    )  # fmt: skip
    assert (found.rates, found.steps, found.optimizer) == (
        before.rates, before.steps, before.optimizer,
    )  # fmt: skip
    assert found.data.files[0].path == "a.json" and found.data.files[0].images == "pictures"
    assert replace(found.data, files=before.data.files) == before.data
    assert found.running == replace(
        before.running, strategy="zero3", deepspeed=str(CONFIGS / "deepspeed" / "zero3.json")
    )
    assert found.logging.wandb and found.output == "out" and found.saving == before.saving
    assert set(left_out) == {
        "per_device_eval_batch_size", "evaluation_strategy", "save_strategy", "tf32",
        "lazy_preprocess",
    }  # fmt: skip


def test_open_llava_nexts_own_arguments():
    found, _ = changed(
        "llava_v1_5/finetune_7b",
        "--image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad --learning_rate 2e-5 "
        "--unfreeze_mm_vision_tower True --mm_vision_tower_lr 2e-6 --model_max_length 4096",
    )
    assert (found.model.family, found.model.image_mode) == ("llava_next", "anyres")
    assert (found.rates.language, found.rates.projector, found.rates.vision) == (2e-5, 2e-5, 2e-6)
    assert found.data.max_length == 4096


def test_lora_and_qlora_and_their_targets():
    lora = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5"
    found, _ = changed(
        "llava_v1_5/lora_7b", f"{lora} --learning_rate 2e-4 --lora_qv_proj_only True"
    )
    assert (found.lora.rank, found.lora.alpha, found.lora.base) == (128, 256.0, "full")
    assert found.lora.targets == ("*.self_attn.q_proj", "*.self_attn.v_proj")
    assert (found.rates.language, found.rates.projector) == (2e-4, 2e-5)
    found, _ = changed(
        "llava_v1_5/lora_7b", "--lora_enable True --bits 4 --freeze_mm_mlp_adapter True"
    )
    assert (found.lora.rank, found.lora.base, found.rates.projector) == (64, "nf4", None)


def test_moss2_stops_after_its_steps():
    found, _ = changed(
        "llava_moss2/finetune",
        "--max_steps 700 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
        "--save_total_limit 5",
        processes=4,
    )
    assert (found.steps.max_steps, found.steps.batch, found.steps.micro_batch) == (700, 32, 4)


def test_a_learning_rate_wakes_no_part_that_the_recipe_freezes():
    found, _ = changed("llava_v1_5/pretrain_7b", "--learning_rate 2e-3")
    assert (found.rates.language, found.rates.projector, found.rates.vision) == (None, 2e-3, None)
    found, _ = changed("llava_v1_5/finetune_7b", "--learning_rate 1e-3 --tune_mm_mlp_adapter True")
    assert (found.rates.language, found.rates.projector) == (None, 1e-3)
    found, _ = changed(
        "llava_v1_5/pretrain_7b",
        "--mm_tunable_parts mm_vision_tower,mm_language_model --learning_rate 1e-5",
    )
    assert (found.rates.language, found.rates.projector, found.rates.vision) == (1e-5, None, 1e-5)


def test_a_model_is_a_language_model_or_a_whole_one(tiny):
    found, _ = changed("llava_v1_5/pretrain_7b", "--model_name_or_path lmsys/vicuna-7b-v1.1")
    assert (found.model.language, found.model.path) == ("lmsys/vicuna-7b-v1.1", None)
    task = "--model_name_or_path liuhaotian/llava-v1.5-13b"
    found, _ = changed("llava_v1_5/finetune_7b", task)
    assert (found.model.language, found.model.path) == (None, "liuhaotian/llava-v1.5-13b")
    assert found.model.vision is None and found.model.pretrain_mm_mlp_adapter is None
    whole = tiny("llava")
    found, _ = changed("llava_v1_5/pretrain_7b", f"--model_name_or_path {whole}")
    assert found.model.path == str(whole)


def test_deepspeed_is_torchs():
    found, _ = changed("llava_v1_5/finetune_7b", "--deepspeed zero2.json", backend="mindspore")
    assert found.running.strategy == "auto" and found.running.deepspeed.endswith("zero2.json")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--learnin_rate 1", "did you mean --learning_rate?"),
        ("2e-5", "2e-5 is not known"),
        ("--learning_rate fast", "a number"),
        ("--mm_use_im_start_end True", "false"),
        ("--mm_vision_select_layer -1", "-2"),
        ("--optim sgd", "adamw_torch"),
        ("--deepspeed zero1.json", "zero2.json, zero3.json, zero3_offload.json"),
        ("--image_folder pictures", "without --data_path"),
        ("--gradient_accumulation_steps 2", "give both"),
        ("--per_device_train_batch_size 0", "above 0"),
        ("--unfreeze_mm_vision_tower True", "at no rate"),
        ("--mm_tunable_parts mm_vision_resampler", "mm_mlp_adapter"),
        ("--image_aspect_ratio anyres --mm_patch_merge_type flat", "spatial_unpad"),
        ("--quant_type fp4 --bits 4", "nf4"),
    ],
)
def test_arguments_that_cannot_be_followed(arguments, told):
    with pytest.raises(RequestError) as caught:
        changed("llava_v1_5/finetune_7b", arguments)
    assert told in str(caught.value)


def test_options_of_the_launcher_stand_among_the_arguments():
    text = "--nproc 4 --bf16 True --device=a100 --strategy zero2 steps.batch=32 --print"
    asked, mode, rest = read_options("r.yaml", shlex.split(text))
    assert (asked.processes, asked.device, asked.strategy, mode) == (4, "a100", "zero2", "print")
    assert rest == ["--bf16", "True", "steps.batch=32"]
    with pytest.raises(RequestError, match="--nproc"):
        read_options("r.yaml", ["--nproc", "many"])


# --- MindFormers' arguments ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["train r.yaml"],
            "--worker_num 8 --local_worker_num 8 --master_port 8118 --log_dir output/msrun_log "
            f"--join False --cluster_time_out {CLUSTER_TIMEOUT} python -m unillava train r.yaml",
        ),
        (
            ["run.py --a 1", "4"],
            "--worker_num 4 --local_worker_num 4 --master_port 8118 --log_dir output/msrun_log "
            "--join False --cluster_time_out 7200 python run.py --a 1",
        ),
        (
            ["train r.yaml", "4", "8119", "logs", "True", "60"],
            "--worker_num 4 --local_worker_num 4 --master_port 8119 --log_dir logs --join True "
            "--cluster_time_out 60 python -m unillava train r.yaml",
        ),
        (
            ["train r.yaml", "16", "8", "10.0.0.1", "8119", "1", "logs", "False", "60"],
            "--worker_num 16 --local_worker_num 8 --master_addr 10.0.0.1 --node_rank 1 "
            "--master_port 8119 --log_dir logs --join False --cluster_time_out 60 "
            "python -m unillava train r.yaml",
        ),
        (
            # All workers on this machine: there is nobody to meet elsewhere.
            ["train r.yaml", "8", "8", "10.0.0.1", "8119", "1", "logs", "False", "60"],
            "--worker_num 8 --local_worker_num 8 --master_port 8119 --log_dir logs --join False "
            "--cluster_time_out 60 python -m unillava train r.yaml",
        ),
    ],
)
def test_msrun_launcher_takes_the_four_forms(arguments, expected):
    launch = build_form(read_form(arguments), {})
    assert Path(launch.command[0]).name == "msrun"
    assert " ".join(launch.command[1:]) == expected
    assert launch.environment["UNILLAVA_BACKEND"] == "mindspore"


def test_one_worker_trains_without_msrun():
    launch = build_form(read_form(["python train r.yaml", "1"]), {"MS_ROLE": "MS_WORKER"})
    assert launch.command == (PYTHON, "-m", "unillava", "train", "r.yaml")
    assert launch.unset == ("MS_ROLE",)


def test_a_suffix_of_the_logs():
    launch = build_form(read_form(["train r.yaml", "2"]), {"MF_LOG_SUFFIX": "a"})
    assert "output/msrun_log_a" in launch.command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "1, 2, 6 or 9"),
        (["a", "2", "3"], "1, 2, 6 or 9"),
        (["a", "two"], "WORKER_NUM"),
        (["a", "2", "80", "l", "yes", "1"], "JOIN"),
        (["a", "2", "4", "h", "80", "0", "l", "True", "1"], "contradict"),
    ],
)
def test_forms_that_msrun_launcher_does_not_take(arguments, told):
    with pytest.raises(RequestError, match=told):
        read_form(arguments)


# --- the scripts -----------------------------------------------------------------------------


def script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RECIPE", "UNILLAVA_BACKEND")}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        capture_output=True, text=True, cwd=cwd, env=environment | {"PYTHON": PYTHON}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "recipe", "arguments"),
    [
        ("pretrain.sh", "pretrain_7b", "--tune_mm_mlp_adapter True --learning_rate 1e-3"),
        ("finetune.sh", "finetune_7b", "--group_by_modality_length True --learning_rate 2e-5"),
        ("finetune_lora.sh", "lora_7b", "--lora_enable True --lora_r 128 --lora_alpha 256"),
    ],
)
def test_the_scripts_print_what_they_would_run(name, recipe, arguments, tmp_path):
    more = "--per_device_train_batch_size 4 --nproc 2 --device cpu --bf16 False --print"
    done = script(name, *shlex.split(f"{arguments} {more}"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = shlex.split(done.stdout)
    assert "torch.distributed.run" in printed
    assert str(CONFIGS / "llava_v1_5" / f"{recipe}.yaml") in printed
    assert "steps.batch=8" in printed and 'running.precision="float32"' in printed
    assert printed[-2:] == ["--device", "cpu"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("pretrain.sh", ["--learnin_rate", "1"], "did you mean --learning_rate?"),
        ("finetune.sh", ["--nproc"], "--nproc needs a value"),
        ("finetune_lora.sh", ["--nproc", "3", "--print"], "a multiple of 48"),
        ("msrun_launcher.sh", ["train r.yaml", "2", "3"], "takes 1, 2, 6 or 9 arguments"),
    ],
)
def test_the_scripts_refuse_wrong_arguments(name, arguments, told, tmp_path):
    done = script(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


# --- the watch -------------------------------------------------------------------------------

WORKERS = """
import os, signal, subprocess, sys, time
launcher, folder, plan = sys.argv[1], sys.argv[2], sys.argv[3:]
if launcher == "worker":
    number, what = folder, plan[0]
    def leave(*_):
        print("saved", flush=True)
        sys.exit(143)
    if what == "saves":
        signal.signal(signal.SIGTERM, leave)
    elif what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"worker {number} runs", file=sys.stderr, flush=True)
    if what == "dies":
        time.sleep(0.5)
        print("the reason", file=sys.stderr, flush=True)
        sys.exit(7)
    if what == "killed":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1 if what == "ends" else 30)
    sys.exit(0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
workers = []
for number, what in enumerate(plan):
    log = open(f"{folder}/{number}.log", "w")
    workers.append(subprocess.Popen(
        [sys.executable, __file__, "worker", str(number), what],
        stdout=log, stderr=log, start_new_session=True,
    ))
helper = subprocess.Popen(["sleep", "30"])  # as msrun's scheduler: no worker
print("pids", os.getpid(), *(w.pid for w in workers), helper.pid, flush=True)
while True:
    time.sleep(1)
    codes = [w.poll() for w in workers]
    if launcher == "stuck":
        continue
    if any(codes) or None not in codes:
        for w in (*workers, helper):
            w.kill()
        sys.exit(1 if any(codes) else 0)
"""
SUPERVISE = """
import sys
from unillava.launch import watch
from unillava.launch.command import Launch
watch.GRACE = 1.0
sys.exit(watch.supervise(Launch((sys.executable, *sys.argv[1:]), {})))
"""


class Watched:
    """`supervise` in a process of its own, over a launcher made of plain Python."""

    def __init__(self, folder: Path, *plan: str, launcher: str = "launcher") -> None:
        path = folder / "launcher.py"
        path.write_text(WORKERS)
        self.process = subprocess.Popen(
            [PYTHON, "-c", SUPERVISE, str(path), launcher, str(folder), *plan],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        line = self.process.stdout.readline().split()
        self.pids = [int(word) for word in line[1:]]
        for number in range(len(plan)):
            while "runs" not in (folder / f"{number}.log").read_text():
                time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors

    @property
    def left(self) -> list[int]:
        """Those of its processes that still run; the dead may wait to be collected."""
        found = []
        for pid in self.pids:
            status = Path(f"/proc/{pid}/stat")
            try:
                if status.read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.append(pid)
            except OSError:
                continue
        return found


def test_the_end_of_a_run_is_its_launchers(tmp_path):
    code, errors = Watched(tmp_path, "ends", "ends").end()
    assert (code, errors) == (0, "")


@pytest.mark.parametrize(
    ("what", "code", "told"), [("dies", 7, "exit code 7"), ("killed", 137, "killed by SIGKILL")]
)
def test_a_dead_worker_ends_the_run_and_its_log_is_shown(tmp_path, what, code, told):
    watched = Watched(tmp_path, "saves", what)
    found, errors = watched.end()
    assert found == code and told in errors and str(tmp_path / "1.log") in errors
    assert "| worker 1 runs" in errors and ("the reason" in errors) == (what == "dies")
    assert "0.log" not in errors and not watched.left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_workers_which_save(tmp_path, number):
    if signal.getsignal(number) == signal.SIG_IGN and number == signal.SIGHUP:
        pytest.skip("run under nohup, whose SIGHUP stays ignored")
    watched = Watched(tmp_path, "saves", "saves")
    watched.process.send_signal(number)
    code, errors = watched.end()
    assert (code, errors) == (143, "")
    assert all((tmp_path / f"{n}.log").read_text().endswith("saved\n") for n in (0, 1))
    assert not watched.left


def test_slurm_may_send_its_warning_to_everybody(tmp_path):
    """SIGUSR1 to all processes of the job at once: only the watch takes notice."""
    watched = Watched(tmp_path, "saves", "saves")
    for pid in (*watched.pids[:-1], watched.process.pid):  # but for the helper, which is `sleep`
        os.kill(pid, signal.SIGUSR1)
    assert watched.end() == (143, "")
    assert all((tmp_path / f"{n}.log").read_text().count("saved") == 1 for n in (0, 1))


def test_a_second_signal_ends_what_does_not_end(tmp_path):
    watched = Watched(tmp_path, "deaf", "deaf")
    watched.process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert watched.process.poll() is None
    watched.process.send_signal(signal.SIGINT)
    code, _ = watched.end()
    assert code == 143
    time.sleep(0.2)
    assert not watched.left


def test_a_launcher_that_waits_in_vain_is_ended(tmp_path):
    """As msrun's, whose scheduler waits two hours for a worker that has died at once."""
    watched = Watched(tmp_path, "dies", "deaf", launcher="stuck")
    code, errors = watched.end()
    assert code == 7 and "the reason" in errors
    time.sleep(0.2)
    assert not watched.left


def test_a_program_that_is_absent(tmp_path, capsys):
    from unillava.launch.command import Launch
    from unillava.launch.start import watch

    with pytest.raises(RequestError, match="cannot be started"):
        watch(Launch((str(tmp_path / "absent"),), {}))


def test_a_taken_port_is_told_before_anybody_waits(tmp_path):
    import socket

    from unillava.launch.start import carry_out

    path = written(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        master = taken.getsockname()
        asked = Request("torch", 2, ("train", str(path)), nodes=2, master=master)
        with pytest.raises(RequestError, match=re.escape(f"port {master[1]} of --master")):
            carry_out(asked)

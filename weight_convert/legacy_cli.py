"""The command line of MindFormers' convert_weight.py, on top of this package.

Flags and their meaning are those of MindFormers 1.5 (convert_weight.py in its root,
research/llava_next/convert_weight.py, mindformers/models/llama/convert_weight.py), with four
differences: nothing of a framework is needed, `False` means no (`--from_vision False` turned it
on), flags that would be ignored are refused, and LLaVA can be converted back.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from weight_convert import files
from weight_convert.canonical import PARTS
from weight_convert.cast import dtype_name
from weight_convert.contents import Contents, look
from weight_convert.convert import Plan, carry_out, plan
from weight_convert.dialects import mindformers
from weight_convert.errors import CheckpointError, UnillavaError
from weight_convert.opening import open_source
from weight_convert.source import Options, Source, describe_parts
from weight_convert.storage.tensor import few

LANGUAGE_MODELS = tuple(
    "llama llama2 llama3 llama3_1 vicuna mistral yi qwen2 qwen2_5 codellama".split()
)
MODELS = {
    "llava": "llava",
    "llava_next": "llava",
    "llava_next_video": "llava",
    "clip": "clip",
    **dict.fromkeys(LANGUAGE_MODELS, "llama"),
}
"""--model -> the converter."""
TO_MINDSPORE = {"llava": "mindformers", "llama": "mindformers-llama", "clip": "mindformers-clip"}
TO_TORCH = {"llava": "hf", "llama": "llama", "clip": "clip"}
NEEDED = {"llava": ("vision", "projector", "language"), "llama": ("language",), "clip": ("vision",)}
"""Converter -> dialects, and the parts that it wants."""
ALONE = {"vision": "clip", "language": "llama"}
"""Part -> the converter of a model that is nothing else."""
YES, NO = ("true", "yes", "1", "on", "y", "t"), ("false", "no", "0", "off", "n", "f")
TORCH_SUFFIXES = (".bin", ".pth", ".pt")
REFUSED = {
    "layers": "gpt2 and wizardcoder; here the layers are counted in the checkpoint",
    "is_pretrain": "swin",
    "telechat_type": "telechat",
    "is_lora": "qwen2_5; convert adapters with `unillava convert`",
    "w2_transb": "an old form of LLaMA that no MindFormers since 1.3 reads",
    "w2_transpose": "an old form of LLaMA that no MindFormers since 1.3 reads",
}
"""MindFormers' flags for models, or forms, that are not converted here."""
HELP_END = """\
examples:
  python convert_weight.py --model llava_next --input_path DIR --output_path OUT.ckpt
  python convert_weight.py --model llava_next --input_path CLIP_DIR --output_path VISION.ckpt \\
      --from_vision True
  python convert_weight.py --model llama --input_path DIR --output_path OUT.ckpt --qkv_concat True
  python convert_weight.py --model llava_next --input_path OUT.ckpt --output_path HF_DIR \\
      --reversed --base DIR_WITH_CONFIG

An output path without a suffix gets .ckpt, as MindSpore does it; one that ends in / is a
directory, with YAML and tokenizer files. --reversed writes a Hugging Face directory, or the
weights alone where the output path ends in .bin or .pth. A file that exists is replaced once the
new one is complete.
"""


@dataclass(frozen=True)
class Job:
    """What the arguments ask for."""

    source: Path
    destination: Path
    model: str
    """A key of MODELS."""
    to: str
    """Dialect that is written."""
    options: Options
    needed: tuple[str, ...]
    """Parts that the source must have."""
    back: bool
    """From MindSpore."""
    resume: bool
    overwrite: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can mend.

    Args:
        arguments: without the program's name; those of the process if absent.
    """
    try:
        run(read_arguments(sys.argv[1:] if arguments is None else arguments))
    except UnillavaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume goes on", file=sys.stderr)
        return 130
    return 0


# --- arguments -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CheckpointError(f"convert_weight.py: {message}", fix="--help shows the arguments")


def read_arguments(arguments: Sequence[str]) -> Job:
    """What a command line asks for.

    Args:
        arguments: without the program's name.

    Raises:
        CheckpointError: an argument is unknown, missing, contradicts another one, or belongs to a
            model that is not converted here.
    """
    given = _parser().parse_args(list(arguments))
    _refuse(given)
    model = (given.model or "llava_next").lower().replace("-", "_")
    converter = _converter(model)
    _check_fusing(given, converter)
    part = _single_part(given, converter)
    source, destination = _paths(given)
    options = Options(
        base=_path(given.base) or _path(given.config_path),
        strategy=_path(given.src_strategy_path_or_dir),
        dtype=dtype_name(given.dtype) if given.dtype else None,
        qkv_concat=given.qkv_concat,
        parts=frozenset((part,) if part else PARTS),
    )
    return Job(
        source=source if given.reversed else _named_by_file(source),
        destination=destination,
        model=model,
        to=TO_TORCH[ALONE.get(part, converter)] if given.reversed else TO_MINDSPORE[converter],
        options=options,
        needed=(part,) if part else NEEDED[converter],
        back=given.reversed,
        resume=given.resume,
        overwrite=given.overwrite,
    )


def _single_part(given: argparse.Namespace, converter: str) -> str | None:
    """The only part of a LLaVA that is meant, if one is."""
    parts = [part for part in ALONE if getattr(given, f"from_{part}")]
    if len(parts) > 1:
        raise CheckpointError(
            "--from_vision and --from_language exclude each other",
            fix="convert the two models one by one, into one folder",
        )
    if parts and converter != "llava":
        raise CheckpointError(
            f"--from_{parts[0]} is for the parts of a LLaVA",
            given=f"--model {given.model}",
            expected="--model llava_next",
        )
    return parts[0] if parts else None


def _parser() -> _Parser:
    parser = _Parser(
        prog="convert_weight.py",
        description="Convert weights between Hugging Face (or any layout that unillava knows) "
        "and MindFormers.",
        epilog=HELP_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help=f"one of {', '.join(MODELS)}; default with --torch_ckpt_path: llava_next")
    add("--reversed", action="store_true", help="from MindSpore to Hugging Face")
    add("--input_path", help="directory, or file of weights")
    add("--output_path", help="file or directory")
    add("--torch_ckpt_path", "--torch_ckpt_dir", help="the path of PyTorch's weights")
    add("--mindspore_ckpt_path", help="the path of MindSpore's weights")
    add("--pre_ckpt_path", help="with --qkv_concat: weights of MindSpore that are not fused")
    add("--dtype", help="fp32, fp16 or bf16; default: each tensor keeps its own")
    for flags, text in (
        (("--qkv_concat",), "llama: fuse q, k, v, and gate and up projection"),
        # The second is how the list of parameters in MindFormers' README spells it.
        (("--from_vision", "--from_vison"), "convert a vision tower alone"),
        (("--from_language",), "convert a language model alone"),
    ):
        add(*flags, nargs="?", const=True, default=False, type=_yes, metavar="BOOL", help=text)
    add("--config_path", help="MindFormers' YAML file of the model, or a directory with one")
    add("--base", help="a checkpoint with the configuration and tokenizer that the input lacks")
    add("--src_strategy_path_or_dir", help="how the ranks of a parallel run cut the tensors")
    add("--resume", action="store_true", help="go on after an interruption")
    add("--overwrite", action="store_true", help="replace a directory that exists, at the end")
    for name in REFUSED:
        add(f"--{name}", nargs="?", const="True", help=argparse.SUPPRESS)
    return parser


def _yes(value: str) -> bool:
    if value.lower() in (*YES, *NO):
        return value.lower() in YES
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


def _refuse(given: argparse.Namespace) -> None:
    """Flags that have no meaning for these models; switches that are off are let pass."""
    for name, owner in REFUSED.items():
        value = getattr(given, name)
        if value is not None and value.lower() not in NO:
            raise CheckpointError(
                f"--{name} has no meaning for --model {given.model}",
                given=value,
                expected=f"it for {owner}",
                fix="leave it out",
            )


def _converter(model: str) -> str:
    if model in MODELS:
        return MODELS[model]
    raise CheckpointError(
        "this model is not converted here", given=model, expected=f"one of {', '.join(MODELS)}"
    )


def _check_fusing(given: argparse.Namespace, converter: str) -> None:
    if given.pre_ckpt_path and not given.qkv_concat:
        raise CheckpointError(
            "--pre_ckpt_path is for --qkv_concat True", fix="use --input_path for other conversions"
        )
    if given.qkv_concat and (converter != "llama" or given.reversed):
        raise CheckpointError(
            "--qkv_concat is for language models on the way to MindSpore",
            given=f"--model {given.model}" + (" --reversed" if given.reversed else ""),
            expected="--model llama",
            fix="leave it out: MindFormers' LLaVA converters never fused, they ignored the flag",
        )


def _paths(given: argparse.Namespace) -> tuple[Path, Path]:
    """Source and destination, by whichever of their names they are given."""
    torch, mindspore = given.torch_ckpt_path, given.mindspore_ckpt_path
    old_source, old_target = (mindspore, torch) if given.reversed else (torch, mindspore)
    source = _only("input_path", given.input_path, old_source, given.pre_ckpt_path)
    if old_source and not given.output_path and not old_target and not given.reversed:
        old_target = "llava_next.ckpt"  # MindFormers' default
    target = _only("output_path", given.output_path, old_target)
    if given.model is None and not (torch or mindspore):
        raise CheckpointError(
            "--model is missing", expected=f"one of {', '.join(MODELS)}", fix="--help has examples"
        )
    return Path(source).expanduser(), _destination(target, given.reversed)


def _only(name: str, *values: str | None) -> str:
    found = [value for value in values if value]
    if len(found) != 1:
        raise CheckpointError(
            f"--{name} is {'missing' if not found else 'given twice'}",
            given=" and ".join(found) or None,
            fix="--help has examples",
        )
    return found[0]


def _destination(target: str, back: bool) -> Path:
    path = Path(target).expanduser()
    if back:
        if path.suffix == ".ckpt":
            raise CheckpointError(
                "--reversed writes PyTorch's weights",
                given=target,
                expected=f"a directory, or a file {' or '.join(TORCH_SUFFIXES)}",
            )
        return path
    if path.suffix in TORCH_SUFFIXES:
        raise CheckpointError(
            "MindSpore's weights are written, in a file of PyTorch's name",
            given=target,
            expected="a file .ckpt",
            fix="the other direction needs --reversed",
        )
    is_complete = target.endswith(("/", os.sep)) or path.suffix in (".ckpt", ".safetensors")
    return path if is_complete else path.with_name(f"{path.name}.ckpt")


def _path(given: str | None) -> Path | None:
    return Path(given).expanduser() if given else None


def _named_by_file(path: Path) -> Path:
    """The directory of a Hugging Face checkpoint; MindFormers also takes a file in it."""
    named = path.suffix != ".ckpt" and not path.is_dir()
    return path.parent if named and (path.parent / "config.json").is_file() else path


# --- running ---------------------------------------------------------------------------------


def run(job: Job) -> None:
    """Carry a job out, with a bar if there is somebody to look at it.

    Raises:
        CheckpointError: see `open_source`, `plan` and `carry_out`.
    """
    source = _open(job)
    _check_parts(job, source)
    chosen = plan(source, job.to, job.destination, job.options)
    for line in _notes(job, chosen):
        print(f"note: {line}", file=sys.stderr)
    began = time.monotonic()
    with _progress(chosen.total_bytes) as advance:
        overwrite = job.overwrite or (chosen.target.single_file and not job.destination.is_dir())
        carry_out(chosen, resume=job.resume, overwrite=overwrite, progress=advance)
    count = sum(len(file.tensors) for file in chosen.target.weights)
    seconds, size = time.monotonic() - began, chosen.total_bytes / 1e6
    print(f"{job.destination}: {count} tensors, {size:.1f} MB in {seconds:.1f} s")


def _open(job: Job) -> Source:
    """The source; for weights alone in a file of PyTorch, also without any configuration."""
    contents = look(job.source)
    weights_alone = job.back and job.destination.suffix in files.SUFFIXES
    if weights_alone and not job.options.base and not _is_described(contents):
        return mindformers.open_undescribed(contents, job.options)
    return open_source(job.source, job.options)


def _is_described(contents: Contents) -> bool:
    settings = any(
        name == "config.json" or name.endswith((".yaml", ".yml")) for name in contents.names
    )
    return bool(contents.manifest.get("config")) or (settings and not contents.is_file)


def _check_parts(job: Job, source: Source) -> None:
    absent = [part for part in job.needed if part not in source.parts]
    if not absent:
        return
    only = "--from_vision True" if source.parts == {"vision"} else "--from_language True"
    partial = len(source.parts) == 1 and MODELS[job.model] == "llava"
    raise CheckpointError(
        f"{job.source} has no {few(absent)}",
        given=f"{source.dialect}: {describe_parts(source.parts)}",
        expected=describe_parts(job.needed),
        fix=f"if that is meant, say so: {only}" if partial else None,
    )


def _notes(job: Job, chosen: Plan) -> Iterator[str]:
    source, target = chosen.source, chosen.target
    family = source.config.get("model_type", job.model)
    alike = {job.model, "llava_next_video" if job.model == "llava_next" else job.model}
    if MODELS[job.model] == "llava" and family not in alike:
        yield f"--model {job.model} was said, and this is a {family}; it is converted as that"
    if job.back and not target.single_file and not any("tokenizer" in n for n in source.files):
        yield "the result has no tokenizer; --base DIR takes it from another checkpoint"
    if source.dropped:
        yield f"{len(source.dropped)} tensors that are no weights were left out: " + few(
            source.dropped, 3
        )
    if target.left_out and len(job.options.parts) > 1:
        yield f"{len(target.left_out)} tensors do not belong to it: {few(target.left_out, 3)}"
    yield from source.notes


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None] | None]:
    """A bar of bytes per second on a terminal, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
    except ImportError:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("converting", total=total)
        yield lambda name, count: bar.advance(task, count)

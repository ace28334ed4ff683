"""What holds the house together: who imports whom, what loads a framework, docstrings, style."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {
    "torch": {"torch", "torchvision", "torch_npu", "deepspeed", "accelerate", "flash_attn"},
    "mindspore": {"mindspore"},
    "paddle": {"paddle", "paddlenlp"},
}
ALL_FRAMEWORKS = set().union(*FRAMEWORKS.values())
ROOMS = ("unillava", "backends", "weight_convert")
UPPER = {
    f"unillava.{room}"
    for room in ("training", "inference", "serving", "evaluation", "parity", "launch", "loading")
}
MAY_NOT_IMPORT = {
    "weight_convert": {"backends", "unillava"},
    "backends": {"unillava", "weight_convert"},
    "unillava.spec": {"backends", "weight_convert"},
    "unillava.data": {"backends", "unillava.models", "unillava.cli", *UPPER},
    "unillava.models": {"weight_convert", "unillava.data", "unillava.cli", *UPPER},
    **{room: {"unillava.cli"} for room in UPPER},
}
"""Room -> what nothing in it may import; the longest matching name of each side counts."""
ALLOWED = {
    # The one error root of the project.
    ("backends.errors", "weight_convert.errors"),
    ("unillava.errors", "weight_convert.errors"),
}
JUDGES = {f"scripts.paddlenlp_{name}" for name in ("check", "judge", "logits")}
"""Scripts that run a framework to compare with it, in an environment of its own."""


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full module or module.attribute) of every import in a file, also inside functions."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = len(package) - node.level + 1
            base = [*package[:up], *filter(None, [node.module])] if node.level else [node.module]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def broken_rules(path: Path) -> Iterator[str]:
    """Each import of a file that goes against the directions of docs/architecture.md."""
    source = module_name(path)
    forbidden = {
        ban for room, bans in MAY_NOT_IMPORT.items() if within(source, room) for ban in bans
    }
    own = source.split(".")[1] if source.count(".") >= 1 and within(source, "backends") else None
    for line, target in imports(path):
        allowed = any(source == a and within(target, b) for a, b in ALLOWED)
        framework = target.split(".")[0] in ALL_FRAMEWORKS and source not in JUDGES
        neighbour = any(own != name and within(target, f"backends.{name}") for name in FRAMEWORKS)
        if (
            (not allowed and any(within(target, ban) for ban in forbidden))
            or (framework and target.split(".")[0] not in FRAMEWORKS.get(own or "", ()))
            or (neighbour and own in FRAMEWORKS)
        ):
            yield f"{path.relative_to(ROOT)}:{line} imports {target}"


def test_import_directions():
    files = [*python_files(*ROOMS, "scripts"), *ROOT.glob("*.py")]
    found = [text for path in files for text in broken_rules(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "file, line",
    [
        ("unillava/data/x.py", "from backends import nn"),
        ("unillava/data/x.py", "import backends.torch.nn"),
        ("unillava/models/x.py", "import torch"),
        ("unillava/inference/x.py", "def f():\n    import paddle.nn"),
        ("unillava/parity/x.py", "from unillava.cli import app"),
        ("unillava/models/x.py", "from ..inference import engine"),
        ("backends/torch/x.py", "from backends.paddle import ops"),
        ("backends/torch/x.py", "import mindspore"),
        ("backends/x.py", "import torch"),
        ("backends/paddle/x.py", "from unillava.spec import LlavaSpec"),
        ("weight_convert/x.py", "from backends import runtime"),
        ("weight_convert/dialects/x.py", "import unillava"),
    ],
)
def test_the_walk_sees_each_kind_of_breach(tmp_path, monkeypatch, file, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    assert len(list(broken_rules(tmp_path / file))) == 1


def test_every_package_has_an_init():
    """Otherwise an installed copy would lack it."""
    folders = {path.parent for path in python_files(*ROOMS)}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


NEUTRAL = [
    "unillava",
    "unillava.__main__",
    "unillava.cli.app; unillava.cli.app.build_app()",
    "weight_convert",
    "backends",
    "backends.contract",
    *(module_name(path) for path in python_files("unillava/data", "weight_convert")),
    *(f"unillava.{name}" for name in ("spec", "config", "checkpoint", "tiny", "doctor", "loading")),
]


def test_neutral_parts_load_no_framework():
    """All in one process: if one of them loaded a framework, the list at the end names it."""
    code = "\n".join(f"import {name}" for name in NEUTRAL)
    code += f"\nimport sys; print([n for n in {sorted(ALL_FRAMEWORKS)} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Module-level public functions and classes, and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    method
                    for method in node.body
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                )


def untyped(function: ast.FunctionDef) -> bool:
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    named = [a for a in arguments if a is not None and a.arg not in ("self", "cls")]
    return function.returns is None or any(a.annotation is None for a in named)


IN_CONTRACT = ("nn.py", "ops.py", "runtime.py", "training.py", "parallel.py")
SHORT = 3
"""Statements up to which a function may speak for itself."""


def lacks(path: Path) -> Iterator[str]:
    """Public things of a file without docstring or type hints.

    What every backend has is documented once, in backends/contract.py.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT)
    contract = name.parts[0] == "backends" and name.name in IN_CONTRACT
    if ast.get_docstring(tree) is None and tree.body:
        yield f"{name}: no module docstring"
    for node in public_functions(tree):
        if contract or node.name == "forward" or ast.get_docstring(node):
            pass
        elif not (isinstance(node, ast.FunctionDef) and len(node.body) <= SHORT):
            yield f"{name}:{node.lineno} {node.name}: no docstring"
        if isinstance(node, ast.FunctionDef) and untyped(node):
            yield f"{name}:{node.lineno} {node.name}: no type hints"


def test_public_functions_have_docstrings_and_type_hints():
    found = [text for path in python_files(*ROOMS) for text in lacks(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_ruff(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_line_is_left_to_do():
    """Nothing unfinished is called finished."""
    marks = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "pytest.mark." + "skip")
    exempt = {ROOT / "backends/contract.py"}  # its runtime is signatures only
    found = [
        f"{path.relative_to(ROOT)}: {mark}"
        for path in python_files(*ROOMS, "tests")
        for mark in marks
        if path not in exempt and mark in path.read_text(encoding="utf-8")
    ]
    assert not found, "\n".join(found)

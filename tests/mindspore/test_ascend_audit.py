"""Every MindSpore function that the backend uses is documented for the devices it runs on.

MindSpore's docstrings have a section "Supported Platforms". The sources are read as syntax, so
that nothing that is used can be forgotten here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mindspore
import numpy as np
import pytest

from backends.mindspore import ascend, nn, ops

EVERYWHERE = {"Ascend", "GPU", "CPU"}

OPERATORS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.USub: "neg", ast.Eq: "equal",
    ast.NotEq: "not_equal", ast.Lt: "less", ast.LtE: "less_equal", ast.Gt: "greater",
    ast.GtE: "greater_equal", ast.Subscript: "strided_slice",
}  # fmt: skip
"""Operators on tensors -> the function of mindspore.ops that they stand for."""

NOT_FUNCTIONS = {
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "bool_",
    "uint8",
    "nn",
}
"""Attributes of the package itself: dtypes, and the module of its layers."""


def attribute_paths(module: ModuleType) -> Iterator[tuple[str, ...]]:
    """`F.cat(...)` as ("F", "cat"), every longest chain of attributes in the source."""
    inner: set[int] = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        path, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            inner.add(id(value))
            path.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name):
            yield (value.id, *reversed(path))


def used(module: ModuleType, package: Any) -> dict[str, Any]:
    """Dotted name -> object of everything that `module` takes from a MindSpore package."""
    aliases = {name for name, value in vars(module).items() if value is package}
    found = {}
    for alias, *path in attribute_paths(module):
        if alias in aliases:
            value = package
            for part in path:
                value = getattr(value, part)
            found[".".join(path)] = value
    return found


def platforms(function: Any) -> set[str]:
    section = re.search(r"Supported Platforms:\s*\n\s*(.+)", function.__doc__ or "")
    return set(re.findall(r"``(\w+)``", section.group(1))) if section else set()


USED = {module: used(module, mindspore.ops) for module in (ops, ascend)}


@pytest.mark.parametrize("name", USED[ops])
def test_portable_ops_run_everywhere(name):
    assert platforms(USED[ops][name]) >= EVERYWHERE


@pytest.mark.parametrize("name", USED[ascend])
def test_ascend_ops_run_on_ascend(name):
    assert "Ascend" in platforms(USED[ascend][name])


def test_only_the_ascend_file_holds_ops_of_ascend_alone():
    alone = {name for name, f in USED[ascend].items() if platforms(f) == {"Ascend"}}
    assert {"flash_attention_score", "incre_flash_attention", "rms_norm"} <= alone
    assert not alone & set(USED[ops])


@pytest.mark.parametrize("module", [ops, ascend], ids=["ops", "ascend"])
def test_operators_run_everywhere(module):
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        kinds = [node, *getattr(node, "ops", []), getattr(node, "op", None)]
        found |= {OPERATORS[type(k)] for k in kinds if type(k) in OPERATORS}
    assert found
    for name in found:
        assert platforms(getattr(mindspore.ops, name)) >= EVERYWHERE, name


@pytest.mark.parametrize("module", [ops, ascend], ids=["ops", "ascend"])
def test_no_methods_of_tensors(module):
    """Methods would escape the audit; `.shape` and `.dtype` are all that is read of a tensor."""
    source = ast.parse(inspect.getsource(module))
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and not isinstance(node.value, ast.Name):
            text = ast.unparse(node.value)
            assert node.attr in ("shape", "dtype") or "np." in text or text == "ms.nn", text
    for alias, *path in attribute_paths(module):
        known = getattr(module, alias, None)
        is_module = isinstance(known, ModuleType)
        assert is_module or path[-1] in ("shape", "dtype"), f"{alias}.{'.'.join(path)}"
        if known is mindspore:
            assert path[0] in NOT_FUNCTIONS, path
        elif is_module:
            assert known in (mindspore.ops, ascend, np), alias


def test_layers_are_documented():
    """The base classes on Ascend; on CPU their `construct` is ours. `empty` makes parameters."""
    found = used(nn, mindspore.mint)
    assert set(found) == {"empty", "nn.Linear", "nn.Embedding", "nn.LayerNorm"}
    for name, value in found.items():
        assert "Ascend" in platforms(value), name
    assert platforms(found["empty"]) >= {"Ascend", "CPU"}
    for name in ("Linear", "Embedding", "LayerNorm"):
        assert "construct" in vars(getattr(nn, name)), name

"""Fixtures for every test: tiny checkpoints and the photograph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine is no fault of the code under test.
settings.register_profile("unillava", deadline=None)
settings.load_profile("unillava")

DATA = Path(__file__).with_name("data")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family=…, text=…, vision=…, **options)`: the directory of a tiny checkpoint.

    Takes what `unillava.tiny.build_tiny` takes. Built once per session for each set of arguments,
    so do not change what is in it: copy it first.
    """
    from unillava.tiny import build_tiny

    built: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("tiny")

    def build(
        family: str = "llava_next", text: str = "llama", vision: str = "clip", **options: Any
    ) -> Path:
        key = json.dumps([family, text, vision, options], sort_keys=True)
        if key not in built:
            name = f"{len(built):02}-{family}-{text}-{vision}"
            built[key] = build_tiny(root / name, family, text, vision, **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def photo() -> Path:
    """A real photograph, 512 x 600 JPEG (see tests/data/README.md)."""
    return DATA / "photo.jpg"

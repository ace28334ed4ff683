"""transformers for its tokenizers alone."""

from __future__ import annotations

import importlib
import os
import sys

HEAVY = ("torch", "torchvision", "tensorflow", "jax")
"""What transformers would import at once where it is installed."""


def import_transformers_light() -> None:
    """Import transformers in a process that does not need torch, without importing torch.

    It would cost seconds and memory, and clash with MindSpore. Such a process sees a
    transformers without models from then on (one process, one framework). Does nothing where
    torch or transformers is loaded already.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    hidden = [name for name in HEAVY if name not in sys.modules]
    # The documented way to make a module unimportable: importlib then finds no such package.
    sys.modules.update(dict.fromkeys(hidden))
    # Else: "PyTorch was not found. Models won't be available".
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        importlib.import_module("transformers")
        # Imported lazily by the package, and only now with torch out of sight.
        importlib.import_module("transformers.models.auto.tokenization_auto")
    finally:
        for name in hidden:
            del sys.modules[name]

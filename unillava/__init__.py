"""unillava: one LLaVA-family system, native on PyTorch, MindSpore and PaddlePaddle.

    import unillava
    model = unillava.load("path/or/hub-id", backend="torch")
    print(model.chat("What is in the picture?", image="photo.jpg").text)

Importing this loads no framework; `load` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unillava.errors import UnillavaError

if TYPE_CHECKING:
    from unillava.inference.model import Model

__all__ = ["UnillavaError", "__version__", "load"]
__version__ = "0.1.0"


def load(
    path: str,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    template: str | None = None,
    compile: bool = False,
    kernels: str | None = None,
    num_frames: int = 8,
    base: str | None = None,
    vision: str | None = None,
) -> Model:
    """Open a checkpoint and make it ready to chat.

    Args:
        path: a checkpoint of any dialect (`unillava convert --list`): a directory, a file of
            weights, or a hub id (`llava-hf/llava-1.5-7b-hf`).
        backend: torch, mindspore or paddle; None: UNILLAVA_BACKEND, else what is installed and
            which device is there. One backend per process.
        dtype: float32, float16 or bfloat16; None: the checkpoint's own on an accelerator that
            supports it, else float32.
        device: as the framework names it (cuda:0, npu:0, ascend:0, gpu:0, cpu); None: the best.
        template: conversation template by name; None: chosen from the checkpoint's content.
        compile: use the framework's compiler; gives the same tokens.
        kernels: auto (fused where possible) or portable; None: UNILLAVA_KERNELS, else auto.
        num_frames: frames taken from a video, evenly spread from the first to the last.
        base: a checkpoint that gives what this one lacks: the configuration and tokenizer of a
            bare weight file, or the model that an adapter belongs to.
        vision: the directory of the vision tower, if the checkpoint has none inside.

    Raises:
        UnillavaError: what is wrong with the checkpoint, the backend or the options.
    """
    from unillava.loading import load_model

    return load_model(
        path,
        backend=backend,
        dtype=dtype,
        device=device,
        template=template,
        compiled=compile,
        kernels=kernels,
        num_frames=num_frames,
        base=base,
        vision=vision,
    )

"""A checkpoint directory to a model that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import backends
from unillava.checkpoint import Checkpoint, open_checkpoint
from unillava.data.conversation import choose_template
from unillava.data.images import ImageProcessor
from unillava.data.pipeline import Pipeline
from unillava.light import import_transformers_light

if TYPE_CHECKING:
    from unillava.inference.model import Model


def load_model(
    path: str,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    template: str | None = None,
    compiled: bool = False,
    kernels: str | None = None,
    num_frames: int = 8,
    base: str | None = None,
    vision: str | None = None,
) -> Model:
    """See `unillava.load`. What is cheap to check is checked before the weights are read."""
    checkpoint = open_checkpoint(path, base=base, vision=vision)
    checkpoint.check()
    choose_backend(checkpoint, backend=backend, dtype=dtype, device=device, kernels=kernels)
    pipeline = load_pipeline(checkpoint, template=template, num_frames=num_frames)
    from unillava.inference.model import Model

    return Model(checkpoint, load_network(checkpoint), pipeline, compiled=compiled)


def choose_backend(
    checkpoint: Checkpoint,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    kernels: str | None = None,
) -> None:
    """Select the backend, and the dtype as `unillava.load` promises."""
    runtime = backends.select(backend, device=device, kernels=kernels)
    device = runtime.current()[0]
    if dtype is None:
        own = checkpoint.spec.dtype
        on_host = device.split(":")[0] == "cpu"
        dtype = own if own in runtime.supported_dtypes(device) and not on_host else "float32"
    backends.select(backends.NAME, device=device, dtype=dtype, kernels=kernels)


def load_network(checkpoint: Checkpoint) -> Any:
    """The native module of the chosen backend with the checkpoint's weights.

    Tensors are streamed: besides the module itself only one tensor is in memory.

    Raises:
        CheckpointError: a tensor is missing, surplus or of another shape.
    """
    from unillava.models.llava import Llava

    checkpoint.check()
    runtime = backends.runtime
    network = runtime.build(lambda: Llava(checkpoint.spec))
    for name, array, is_bfloat16 in checkpoint.tensors():
        runtime.assign(network, name, array, bfloat16=is_bfloat16)
    return network


def load_pipeline(
    checkpoint: Checkpoint, *, template: str | None = None, num_frames: int = 8
) -> Pipeline:
    """The framework-neutral half: tokenizer, template and image processor."""
    if backends.NAME != "torch":
        import_transformers_light()
    tokenizer = checkpoint.tokenizer()
    spec = checkpoint.spec
    return Pipeline(
        spec=spec,
        tokenizer=tokenizer,
        template=choose_template(spec, tokenizer, checkpoint.chat_template, template),
        images=ImageProcessor.from_config(spec, checkpoint.processor_config),
        num_frames=num_frames,
    )

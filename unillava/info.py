"""What a checkpoint is: facts for `unillava info`, from its files alone, without a framework."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from unillava.checkpoint import Checkpoint
from unillava.data.conversation import choose_template
from unillava.data.layout import image_rows, num_tiles, video_rows
from unillava.errors import CheckpointError
from unillava.memory import (
    ASSUMPTIONS,
    DTYPE_BYTES,
    InferenceMemory,
    TrainingMemory,
    inference_memory,
    training_memory,
)
from unillava.spec import LlavaSpec
from weight_convert.canonical import part_of
from weight_convert.dialects.hf import spelling_of

TYPICAL_SIZES = ((336, 336), (640, 480), (480, 640), (1024, 768), (1920, 1080), (1080, 1920))
"""(width, height) in pixels."""
TYPICAL_FRAMES = (8, 16, 32)
STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PARTS = ("vision", "projector", "newline", "language")


@dataclass(frozen=True)
class Part:
    """One part of the model, as stored."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class ImageTokens:
    """What one image of a size becomes."""

    width: int
    height: int
    tiles: int
    tokens: int
    """Positions of the merged sequence."""


@dataclass(frozen=True)
class VideoTokens:
    """What a video of so many frames becomes."""

    frames: int
    tokens: int


@dataclass(frozen=True)
class Info:
    """Everything that `unillava info` shows."""

    directory: str
    layout: str
    family: str
    vision: str
    projector: str
    language: str
    image_mode: str
    parts: list[Part]
    files: int
    dtypes: dict[str, int]
    """dtype -> number of parameters stored in it."""
    template: str | None
    template_problem: str | None
    """Why the template is not known."""
    context: int
    images: list[ImageTokens]
    videos: list[VideoTokens]
    inference: list[InferenceMemory]
    training: list[TrainingMemory]
    problem: str | None
    """How the weights contradict config.json, if they do."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def examine(checkpoint: Checkpoint, sizes: Iterable[tuple[int, int]] = TYPICAL_SIZES) -> Info:
    """Collect the facts.

    Args:
        checkpoint: opened; need not pass its `check`.
        sizes: (width, height) of images, in pixels, to count tokens for.

    Raises:
        MediaError, ConfigError: a size that is no image, as `data.layout` says.
    """
    spec = checkpoint.spec
    template, template_problem = _template(checkpoint)
    return Info(
        directory=str(checkpoint.directory),
        layout=_layout(checkpoint),
        family=spec.family,
        vision=describe_vision(spec),
        projector=describe_projector(spec),
        language=describe_language(spec),
        image_mode=spec.image_mode,
        parts=_parts(checkpoint),
        files=len({place.path for tensor in checkpoint.stored.values() for place in tensor.places}),
        dtypes=_dtypes(checkpoint),
        template=template,
        template_problem=template_problem,
        context=spec.text.max_position,
        images=[_image_tokens(spec, width, height) for width, height in sizes],
        videos=[VideoTokens(n, len(video_rows(spec, n))) for n in TYPICAL_FRAMES]
        if spec.video
        else [],
        inference=[inference_memory(spec, dtype) for dtype in DTYPE_BYTES],
        training=training_memory(spec),
        problem=_problem(checkpoint),
    )


def as_json(info: Info) -> dict[str, Any]:
    """The facts as plain JSON values; bytes and counts are integers."""
    memory = {
        "inference": [asdict(m) | {"total": m.total} for m in info.inference],
        "training": [asdict(m) | {"total": m.total} for m in info.training],
        "assumptions": list(ASSUMPTIONS),
    }
    totals = {"parameters": info.parameters, "bytes": info.bytes}
    return asdict(info) | totals | memory


def describe_vision(spec: LlavaSpec) -> str:
    """One line about the vision tower."""
    tower, layers = spec.vision, spec.feature_layers
    chosen = ", ".join(map(str, layers))
    return (
        f"{tower.kind}, {tower.num_layers} blocks of width {tower.hidden_size}, "
        f"{tower.image_size} px in patches of {tower.patch_size}, feature layer {chosen}"
    )


def describe_projector(spec: LlavaSpec) -> str:
    """One line about the projector."""
    projector = spec.projector
    kinds = {0: "identity", 1: "linear"}
    kind = kinds.get(projector.depth, f"mlp{projector.depth}x_{projector.activation}")
    return f"{kind}, {projector.input_size} to {projector.output_size}"


def describe_language(spec: LlavaSpec) -> str:
    """One line about the language model."""
    text, rope = spec.text, spec.text.rope
    words = [
        f"{text.kind}, {text.num_layers} blocks of width {text.hidden_size}",
        f"{text.num_heads} heads ({text.num_kv_heads} for keys)",
        f"vocabulary {text.vocab_size}" + (", tied head" if text.tie_embeddings else ""),
        f"rope theta {rope.theta:,.0f}",
    ]
    if rope.kind != "default":
        words.append(f"{rope.kind} scaling {rope.factor:g}")
    if text.sliding_window:
        words.append(f"window {text.sliding_window}")
    return ", ".join(words)


def _layout(checkpoint: Checkpoint) -> str:
    if checkpoint.dialect != "hf":
        return f"{checkpoint.dialect} (see unillava convert --list)"
    spelling = spelling_of(
        place.name for tensor in checkpoint.stored.values() for place in tensor.places
    )
    words = {None: "in several spellings", "hub": "on the hub"}.get(spelling, spelling)
    return f"Hugging Face, names as {words}"


def _parts(checkpoint: Checkpoint) -> list[Part]:
    entries = [(part_of(name), tensor) for name, tensor in checkpoint.stored.items()]
    parts = []
    for part in PARTS:
        own = [tensor for name, tensor in entries if name == part]
        parameters = sum(prod(tensor.shape) for tensor in own)
        parts.append(Part(part, len(own), parameters, sum(tensor.nbytes for tensor in own)))
    return [part for part in parts if part.tensors]


def _dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in checkpoint.stored.values():
        counts[STORED_DTYPES.get(tensor.dtype, tensor.dtype)] += prod(tensor.shape)
    return dict(counts.most_common())


def _template(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """(name, None), or (None, what stands in the way)."""
    try:
        tokenizer = checkpoint.tokenizer()
    except CheckpointError as error:
        return None, error.problem
    return choose_template(checkpoint.spec, tokenizer, checkpoint.chat_template).name, None


def _image_tokens(spec: LlavaSpec, width: int, height: int) -> ImageTokens:
    size_hw = height, width
    return ImageTokens(width, height, num_tiles(spec, size_hw), len(image_rows(spec, size_hw)))


def _problem(checkpoint: Checkpoint) -> str | None:
    try:
        checkpoint.check()
    except CheckpointError as error:
        return str(error)
    return None

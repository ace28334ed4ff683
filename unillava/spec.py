"""What a LLaVA-family model is: frozen dataclasses, and the parameter table derived from them.

Reading them from config.json is `unillava.config`. Nothing here imports a framework, so sizes,
names and memory of a 34B model are known on a laptop.

Shape letters: V vocabulary, D text width, F feed-forward width, H heads, K key/value heads,
C vision width, P patch side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VideoNewline = Literal["grid", "frame", "one_token", "no_token"]
ImageMode = Literal["square", "pad", "anyres"]
AnyresVariant = Literal["hf", "llava"]


@dataclass(frozen=True)
class VisionSpec:
    """A CLIP or SigLIP vision transformer."""

    kind: Literal["clip", "siglip"]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    num_channels: int = 3
    has_head: bool = False
    """SigLIP's pooling head: never used by LLaVA, but its parameters exist in some checkpoints."""

    @property
    def grid(self) -> int:
        """Patches per side of one tile."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Rows of the position table: the patches, and the class token of CLIP."""
        return self.grid**2 + (self.kind == "clip")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extensions."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    """llama3: the context before extension. dynamic: the length from which the base grows."""


@dataclass(frozen=True)
class TextSpec:
    """A decoder of the LLaMA family (LLaMA, Vicuna, Mistral, Yi, Qwen2)."""

    kind: Literal["llama", "mistral", "qwen2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position: int
    rope: RopeSpec = field(default_factory=RopeSpec)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention output projection (`attention_bias` of LLaMA, not of Qwen2)."""
    mlp_bias: bool = False
    sliding_window: int | None = None
    """Mistral v0.1: a query sees at most this many keys, itself included; None: all."""


@dataclass(frozen=True)
class ProjectorSpec:
    """From vision rows to text rows: `depth` Linear layers with the activation between them.

    depth 0 is `identity`, 1 is `linear`, 2 is `mlp2x_gelu`. Names: linear_1, linear_2, ...
    """

    depth: int
    input_size: int
    output_size: int
    activation: str = "gelu"
    bias: bool = True


@dataclass(frozen=True)
class VideoSpec:
    """How the frames of a video become rows of the merged sequence."""

    pool_mode: Literal["average", "max", "bilinear", "none"] = "average"
    pool_stride: int = 2
    pool_position: Literal["before_projector", "after_projector"] = "before_projector"
    newline: VideoNewline = "no_token"


@dataclass(frozen=True)
class LlavaSpec:
    """One model of the LLaVA family."""

    family: Literal["llava", "llava_next", "llava_next_video"]
    vision: VisionSpec
    text: TextSpec
    projector: ProjectorSpec
    feature_layers: tuple[int, ...] = (-2,)
    """Indices into [embeddings, block 1, ...]; several are concatenated along the width."""
    keep_class_token: bool = False
    """True for the strategy `full` (HF) or `cls_patch` (LLaVA); SigLIP has no class token."""
    image_token: int = 32000
    video_token: int | None = None
    image_mode: ImageMode = "square"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    """Candidate (height, width) of anyres, in pixels."""
    unpad: bool = False
    """anyres: cut the padding rows and append the newline row (`spatial_unpad`)."""
    anyres_variant: AnyresVariant = "hf"
    """anyres: whose rounding; see `unillava.data.layout.unpadded_box`."""
    has_newline: bool = False
    """Whether the parameter `image_newline` exists."""
    video: VideoSpec | None = None
    template: str | None = None
    """Conversation template named by the checkpoint, None: chosen from its content."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the weights are stored in, as config.json says."""

    @property
    def rows_per_tile(self) -> int:
        """Projected rows that one image tile yields."""
        keeps_class = self.keep_class_token and self.vision.kind == "clip"
        return self.vision.grid**2 + keeps_class


@dataclass(frozen=True)
class AdapterSpec:
    """Low-rank adapters on the language model, and what its Linear layers keep their weights in."""

    modules: frozenset[str]
    """Paths of the adapted layers under `language_model`."""
    rank: int
    scale: float
    """What B A x is multiplied by."""
    dropout: float = 0.0
    """Of the input of A, while training."""
    base: Literal["full", "nf4", "int8", "int4"] = "full"
    """Storage of the weights of all Linear layers in the blocks, adapted or not."""


def parameter_table(spec: LlavaSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape (torch orientation, [out, in]) of every parameter, in file order."""
    table = {}
    table.update(_vision_table(spec.vision, "vision_tower.vision_model."))
    table.update(_projector_table(spec.projector, "multi_modal_projector."))
    if spec.has_newline:
        table["image_newline"] = (spec.text.hidden_size,)
    table.update(_text_table(spec.text, "language_model."))
    return table


def _linear(name: str, out: int, inp: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inp)} | ({f"{name}.bias": (out,)} if bias else {})


def _layer_norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _vision_table(spec: VisionSpec, prefix: str) -> dict[str, tuple[int, ...]]:
    C, F, P = spec.hidden_size, spec.intermediate_size, spec.patch_size
    embeddings = f"{prefix}embeddings."
    table: dict[str, tuple[int, ...]] = {}
    if spec.kind == "clip":
        table[f"{embeddings}class_embedding"] = (C,)
    table[f"{embeddings}patch_embedding.weight"] = (C, spec.num_channels, P, P)
    if spec.kind == "siglip":
        table[f"{embeddings}patch_embedding.bias"] = (C,)
    table[f"{embeddings}position_embedding.weight"] = (spec.num_positions, C)
    if spec.kind == "clip":
        table.update(_layer_norm(f"{prefix}pre_layrnorm", C))
    for n in range(spec.num_layers):
        block = f"{prefix}encoder.layers.{n}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            table.update(_linear(f"{block}self_attn.{part}", C, C))
        table.update(_layer_norm(f"{block}layer_norm1", C))
        table.update(_linear(f"{block}mlp.fc1", F, C))
        table.update(_linear(f"{block}mlp.fc2", C, F))
        table.update(_layer_norm(f"{block}layer_norm2", C))
    table.update(_layer_norm(f"{prefix}post_layernorm", C))
    if spec.has_head:
        head = f"{prefix}head."
        table[f"{head}probe"] = (1, 1, C)
        table[f"{head}attention.in_proj_weight"] = (3 * C, C)
        table[f"{head}attention.in_proj_bias"] = (3 * C,)
        table.update(_linear(f"{head}attention.out_proj", C, C))
        table.update(_layer_norm(f"{head}layernorm", C))
        table.update(_linear(f"{head}mlp.fc1", F, C))
        table.update(_linear(f"{head}mlp.fc2", C, F))
    return table


def _projector_table(spec: ProjectorSpec, prefix: str) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {}
    width = spec.input_size
    for n in range(1, spec.depth + 1):
        table.update(_linear(f"{prefix}linear_{n}", spec.output_size, width, spec.bias))
        width = spec.output_size
    return table


def _text_table(spec: TextSpec, prefix: str) -> dict[str, tuple[int, ...]]:
    D, F = spec.hidden_size, spec.intermediate_size
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    table: dict[str, tuple[int, ...]] = {f"{prefix}model.embed_tokens.weight": (spec.vocab_size, D)}
    for n in range(spec.num_layers):
        block = f"{prefix}model.layers.{n}."
        table.update(_linear(f"{block}self_attn.q_proj", query, D, spec.qkv_bias))
        table.update(_linear(f"{block}self_attn.k_proj", key, D, spec.qkv_bias))
        table.update(_linear(f"{block}self_attn.v_proj", key, D, spec.qkv_bias))
        table.update(_linear(f"{block}self_attn.o_proj", D, query, spec.output_bias))
        table.update(_linear(f"{block}mlp.gate_proj", F, D, spec.mlp_bias))
        table.update(_linear(f"{block}mlp.up_proj", F, D, spec.mlp_bias))
        table.update(_linear(f"{block}mlp.down_proj", D, F, spec.mlp_bias))
        table[f"{block}input_layernorm.weight"] = (D,)
        table[f"{block}post_attention_layernorm.weight"] = (D,)
    table[f"{prefix}model.norm.weight"] = (D,)
    if not spec.tie_embeddings:
        table[f"{prefix}lm_head.weight"] = (spec.vocab_size, D)
    return table

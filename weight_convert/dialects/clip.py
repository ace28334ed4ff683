"""Vision towers on their own, as transformers saves them: CLIP and SigLIP.

Read are whole CLIPModel and SiglipModel directories, of which the text side is left out, and the
towers alone; with `vision_model.` before the names, or without, as transformers 5 saves the
towers alone. Written are CLIPVisionModel and SiglipVisionModel with the names of the hub's files,
which every version of transformers loads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from weight_convert import canonical, files
from weight_convert.canonical import VISION, VISION_DEFAULTS, Config, is_buffer, part_of
from weight_convert.contents import Contents
from weight_convert.dialects.base import Dialect, check_complete, to_canonical, to_stored
from weight_convert.dialects.configs import as_it_was, check_types, dtype_of, restored
from weight_convert.errors import CheckpointError
from weight_convert.mapping import NameTable, Rule, prefixed, rule
from weight_convert.opening import borrowed
from weight_convert.source import Options, Source, Target, as_json, parse_json
from weight_convert.storage.tensor import Tensor

PREFIX = "vision_model."
CONFIG_KEYS = ("torch_dtype", "dtype", "vision_config")
"""What a canonical configuration says about the tower."""
PREPROCESSOR = "preprocessor_config.json"
HEAD_PROBE = f"{VISION}head.probe"
"""One of the tensors of SigLIP's pooling head, which LLaVA never uses."""


@dataclass(frozen=True)
class Tower:
    """What distinguishes one kind of tower."""

    name: str
    title: str
    model_type: str
    whole: str
    """model_type of the model with its text side."""
    architecture: str
    processor: Config
    """The image processor that the tower was trained with; sizes are filled in."""
    names: tuple[str, ...]
    heads: Mapping[int, int]
    """Width -> attention heads, of OpenAI's and Google's own models."""

    def table(self, prefix: str) -> NameTable:
        rules: list[Rule] = [rule(name, name) for name in self.names]
        return NameTable(prefixed(rules, VISION, prefix))


_BLOCKS = (
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "encoder.layers.{n}.self_attn.k_proj.{p}",
    "encoder.layers.{n}.self_attn.v_proj.{p}",
    "encoder.layers.{n}.self_attn.q_proj.{p}",
    "encoder.layers.{n}.self_attn.out_proj.{p}",
    "encoder.layers.{n}.layer_norm1.{p}",
    "encoder.layers.{n}.mlp.fc1.{p}",
    "encoder.layers.{n}.mlp.fc2.{p}",
    "encoder.layers.{n}.layer_norm2.{p}",
    "post_layernorm.{p}",
)
_BYTES = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
TOWERS = (
    Tower(
        name="clip",
        title="CLIP vision tower (transformers' CLIPVisionModel; CLIPModel is read)",
        model_type="clip_vision_model",
        whole="clip",
        architecture="CLIPVisionModel",
        processor=_BYTES
        | {
            "do_center_crop": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        names=("embeddings.class_embedding", "pre_layrnorm.{p}", *_BLOCKS),
        heads={768: 12, 1024: 16},
    ),
    Tower(
        name="siglip",
        title="SigLIP vision tower (transformers' SiglipVisionModel; SiglipModel is read)",
        model_type="siglip_vision_model",
        whole="siglip",
        architecture="SiglipVisionModel",
        processor=_BYTES
        | {
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
        },
        names=(
            "embeddings.patch_embedding.bias",
            *_BLOCKS,
            "head.probe",
            "head.attention.in_proj_weight",
            "head.attention.in_proj_bias",
            "head.attention.out_proj.{p}",
            "head.layernorm.{p}",
            "head.mlp.fc1.{p}",
            "head.mlp.fc2.{p}",
        ),
        heads={768: 12, 1024: 16, 1152: 16, 1536: 16},
    ),
)
TEXT_SIDE = re.compile(r"(text_model\.|text_projection\.|visual_projection\.|logit_(scale|bias)$)")
"""What CLIPModel and SiglipModel have besides the tower."""


# --- recognition -----------------------------------------------------------------------------


def _evidence(tower: Tower, contents: Contents) -> str:
    kind = contents.config.get("model_type")
    if kind in (tower.model_type, tower.whole):
        return f"config.json: model_type {kind!r}"
    if kind is not None:
        return ""
    for prefix in (PREFIX, ""):
        patch, block, token = (
            f"{prefix}{name}"
            for name in (
                "embeddings.patch_embedding.weight",
                "encoder.layers.0.layer_norm1.weight",
                "embeddings.class_embedding",
            )
        )
        if {patch, block} <= contents.tensors.keys():
            has_token = token in contents.tensors
            return f"a tensor {patch}" if has_token == (tower.name == "clip") else ""
    return ""


# --- reading ---------------------------------------------------------------------------------


def _read(tower: Tower, contents: Contents, options: Options) -> Source:
    stored = files.open_weights(contents.path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
    tensors, dropped = to_canonical(
        stored,
        tower.table(prefix),
        options,
        ignored=lambda name: is_buffer(name) or TEXT_SIDE.match(name) is not None,
    )
    if contents.config:
        dtype = dtype_of(contents.config, tensors)
        config = _canonical_config(tower, contents.config, dtype, str(contents.path))
        if tower.name == "siglip":
            config["vision_config"]["vision_use_head"] = HEAD_PROBE in tensors
        config = as_it_was(contents, config, there_and_back, CONFIG_KEYS)
    else:
        config = partial_config(borrowed(contents, options)[0])
    check_complete(tensors, config, ("vision",), options)
    side = {PREPROCESSOR: contents.path / PREPROCESSOR} if PREPROCESSOR in contents.names else {}
    return Source(
        tower.name,
        contents.path,
        config,
        tensors,
        side,
        dropped=dropped,
        memory=_memory(tower, contents),
    )


def partial_config(config: Config) -> Config:
    """What a canonical configuration says about the vision tower, and nothing else."""
    part = {key: config[key] for key in CONFIG_KEYS if key in config}
    return {"torch_dtype": canonical.stored_dtype(config)} | part


def _canonical_config(tower: Tower, config: Config, dtype: str, where: str) -> Config:
    """The canonical configuration from a config.json of the tower alone or of the whole model."""
    given = dict(config)
    if config["model_type"] == tower.whole:
        sections = [config.get(f"vision_config{suffix}") or {} for suffix in ("", "_dict")]
        if not all(isinstance(section, dict) for section in sections):
            raise CheckpointError(f"{where}: vision_config in config.json is no object")
        # The older of the two spellings wins, as in transformers before 5.
        given = {**sections[0], **sections[1]}
    check_types(given, VISION_DEFAULTS[tower.model_type], f"config.json of {where}")
    vision = {
        key: value
        for key, value in given.items()
        if key not in ("architectures", "transformers_version", "torch_dtype", "dtype")
    }
    vision = canonical.vision_config({"vision_config": vision | {"model_type": tower.model_type}})
    return {"torch_dtype": dtype, "vision_config": dict(sorted(vision.items()))}


def _memory(tower: Tower, contents: Contents) -> dict[str, Config]:
    """The files of a tower alone, to be written again as they are."""
    config = contents.config
    if config.get("model_type") != tower.model_type:
        return {}
    if config.get("architectures") not in (None, [tower.architecture]):
        return {}  # a projection of the tower's output is left out
    kept = {"config": config}
    if PREPROCESSOR in contents.names:
        kept["processor"] = contents.json(PREPROCESSOR)
    return {tower.name: kept}


def tower_config(tensors: Mapping[str, Tensor]) -> Config:
    """`vision_config` of a tower of which only the tensors are known.

    Args:
        tensors: canonical name -> tensor.

    Raises:
        CheckpointError: no tower, or one with shapes from which the heads do not follow.
    """
    clip = f"{VISION}embeddings.class_embedding" in tensors
    tower = TOWERS[0 if clip else 1]
    shapes = [
        tensors[VISION + name].shape if VISION + name in tensors else ()
        for name in (
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers.0.mlp.fc1.weight",
        )
    ]
    if [len(shape) for shape in shapes] != [4, 2, 2]:
        raise CheckpointError("the vision tower has shapes that cannot be", given=shapes)
    (width, _, patch, _), (positions, _), (inner, _) = shapes
    heads = tower.heads.get(width)
    if heads is None:
        raise CheckpointError(
            f"the number of heads of a {tower.name} tower of width {width} is not known",
            expected=f"width {', '.join(map(str, tower.heads))}",
            fix="name a directory with the tower and its config.json: --vision DIR",
        )
    layers = {name.split(".")[4] for name in tensors if name.startswith(f"{VISION}encoder.layers.")}
    vision = {
        "model_type": tower.model_type,
        "hidden_size": width,
        "image_size": math.isqrt(positions - clip) * patch,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": len(layers),
        "patch_size": patch,
    }
    if not clip:
        vision["vision_use_head"] = HEAD_PROBE in tensors
    return dict(sorted(canonical.vision_config({"vision_config": vision}).items()))


# --- writing ---------------------------------------------------------------------------------


def _write(tower: Tower, source: Source, options: Options) -> Target:
    if "vision" not in source.parts:
        raise CheckpointError(
            f"{source.path} has no vision tower to write",
            fix="name the tower that belongs to it: --vision DIR",
        )
    own = tower_of(source.config)
    if own is not tower:
        raise CheckpointError(
            f"dialect {tower.name} cannot hold this vision tower",
            given=f"vision_config.model_type {own.model_type!r}",
            expected=tower.model_type,
            fix=f"--to {own.name}",
        )
    tensors, left_out = to_stored(
        source.tensors,
        tower.table(PREFIX),
        options,
        unheld=lambda name: part_of(name) != "vision",
    )
    weights, index = files.shards(
        tensors, options.weights or "safetensors", options.max_shard_bytes
    )
    kept = source.memory.get(tower.name, {})
    documents = {
        "config.json": as_json(_config(tower, source, kept.get("config"))),
        PREPROCESSOR: as_json(_processor(source, kept.get("processor"))),
        **index,
    }
    return Target(tower.name, weights, documents, left_out=left_out)


def tower_of(config: Config) -> Tower:
    """The kind of vision tower that a canonical configuration describes.

    Raises:
        CheckpointError: none that is known.
    """
    kind = canonical.vision_config(config)["model_type"]
    return next(tower for tower in TOWERS if tower.model_type == kind)


def _config(tower: Tower, source: Source, kept: Config | None) -> Config:
    now = _stored_config(tower, source.config)
    if tower.name == "siglip":
        now["vision_use_head"] = HEAD_PROBE in source.tensors
    if kept is None:
        return now
    dtype = dtype_of(kept, source.tensors)
    before = _stored_config(tower, _canonical_config(tower, kept, dtype, "the manifest"))
    if tower.name == "siglip":
        before["vision_use_head"] = kept.get("vision_use_head", HEAD_PROBE in source.tensors)
    return restored(kept, before, now)


def _stored_config(tower: Tower, config: Config) -> Config:
    vision = canonical.vision_config(config)
    stored = {
        **{key: value for key, value in vision.items() if key != "dtype"},
        "architectures": [tower.architecture],
        "torch_dtype": canonical.stored_dtype(config),
    }
    return dict(sorted(stored.items()))


def there_and_back(config: Config) -> Config:
    """What a canonical configuration of a tower becomes when it is written and read."""
    tower = tower_of(config)
    stored = _stored_config(tower, config)
    return _canonical_config(tower, stored, stored["torch_dtype"], "the manifest")


# --- the image processor ---------------------------------------------------------------------

_OF_MODELS = (
    *("aspect_ratio_setting", "do_pad", "image_grid_pinpoints", "image_seq_length"),
    *("processor_class", "image_processor_type", "video_processor_type", "auto_map"),
    *("feature_extractor_type",),
)
"""What the processor of a whole model says beyond what its tower needs."""


def _processor(source: Source, kept: Config | None) -> Config:
    now = tower_processor(source.config, image_processor(source))
    return kept if kept and tower_processor(source.config, kept) == now else now


def tower_processor(config: Config, given: Config) -> Config:
    """preprocessor_config.json of a tower alone: CLIPImageProcessor, SiglipImageProcessor.

    Args:
        config: canonical.
        given: the settings of an image processor, the whole model's or the tower's (see
            `image_processor`). What they do not say follows from the tower.
    """
    tower, side = tower_of(config), canonical.vision_config(config)["image_size"]
    square = {"height": side, "width": side}
    sizes: Config = {"size": square}
    if tower.name == "clip":
        sizes = {"size": {"shortest_edge": side}, "crop_size": square}
    settings = {**tower.processor, **sizes, **given}
    if tower.name == "siglip" and not given.get("do_center_crop"):
        settings.pop("crop_size", None)
        settings.pop("do_center_crop", None)
    kept = {key: value for key, value in settings.items() if key not in _OF_MODELS}
    kept["image_processor_type"] = tower.processor["image_processor_type"]
    return dict(sorted(kept.items()))


def image_processor(source: Source) -> Config:
    """The image processor's settings, wherever a source has them; `{}` if nowhere."""
    nested = {}
    if "processor_config.json" in source.files:
        whole = parse_json(source.files["processor_config.json"], "processor_config.json")
        nested = whole.get("image_processor") or {}
    if nested or PREPROCESSOR not in source.files:
        return nested
    return parse_json(source.files[PREPROCESSOR], PREPROCESSOR)


def _dialect(tower: Tower) -> Dialect:
    return Dialect(
        tower.name,
        tower.title,
        lambda contents: _evidence(tower, contents),
        lambda contents, options: _read(tower, contents, options),
        lambda source, options: _write(tower, source, options),
    )


DIALECTS = tuple(_dialect(tower) for tower in TOWERS)

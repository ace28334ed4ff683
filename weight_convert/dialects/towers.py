"""The vision tower of a checkpoint that names it: inside, beside, or in Hugging Face's cache.

Original LLaVA's config.json has the name of a CLIP or SigLIP, as on the hub or as a directory. The
weights are in the checkpoint if the tower was trained, or if DeepSpeed saved it along; whether
they are is told by the tensors alone. How many heads a tower has and which activation, its shapes
do not say: that is looked up in its own config.json, else in what is known of public towers.

Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weight_convert import canonical
from weight_convert.canonical import VISION, VISION_DEFAULTS, Config
from weight_convert.contents import Contents
from weight_convert.dialects import clip
from weight_convert.dialects.configs import check_types
from weight_convert.dialects.mm_settings import KNOWN_TOWERS
from weight_convert.errors import CheckpointError
from weight_convert.opening import open_source
from weight_convert.source import Options, as_json, read_json
from weight_convert.storage.tensor import Tensor

FOLDER = "vision_tower"
"""Folder of a checkpoint in which its tower is written, or only the tower's settings."""
PROCESSOR = clip.PREPROCESSOR
SIGLIP = "siglip_vision_model"
SIGLIP_LAYERS = {1152: 27}
"""Width -> layers of public SigLIP towers that LLaVA uses."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_IN_SHAPES = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass(frozen=True)
class Tower:
    """A vision tower that was found."""

    config: Config
    """The canonical vision_config."""
    layers: int
    """Layers of the whole tower; a checkpoint may lack the last of SigLIP's."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Canonical name -> tensor, if they are not inside the checkpoint."""
    processor: Config = field(default_factory=dict)
    """Its preprocessor_config.json; empty if that is not known."""
    dropped: tuple[str, ...] = ()
    memory: Mapping[str, Config] = field(default_factory=dict)
    folder: str = FOLDER
    """Name of its folder inside the checkpoint, if it is there."""


def find_tower(
    contents: Contents,
    name: object,
    inside: Mapping[str, Tensor],
    options: Options,
    stated: Config | None = None,
) -> Tower:
    """The tower of a checkpoint.

    Args:
        contents: the checkpoint.
        name: what its configuration calls the tower.
        inside: canonical tensors of the tower that are in the checkpoint, or `{}`.
        options: `vision` is a directory with the tower.
        stated: a canonical vision_config of the tower that is inside, if another checkpoint
            gives it.

    Raises:
        CheckpointError: it is nowhere, or not the one that is inside.
    """
    directory = _locate(contents, name, options)
    if inside and stated is not None:
        return Tower(_of_shapes(inside, stated, "the configuration given"), _whole(stated))
    if inside:
        return _from_inside(inside, name, directory)
    if directory is None:
        raise CheckpointError(
            f"{contents.path} does not hold its vision tower",
            given=f"no tensors of it, and mm_vision_tower {name!r} is no directory here and not "
            "in the cache of Hugging Face",
            expected=f"the files of {name}" if name else "a CLIP or SigLIP directory",
            fix="name the directory that holds it: --vision DIR",
        )
    source = open_source(directory)
    tensors = {n: t for n, t in source.tensors.items() if n.startswith(VISION)}
    if not tensors:
        raise CheckpointError(
            f"{directory} has no vision tower",
            given=f"dialect {source.dialect}",
            fix="name a CLIP or SigLIP directory: --vision DIR",
        )
    config = canonical.vision_config(source.config)
    return Tower(
        config,
        config["num_hidden_layers"],
        tensors,
        clip.image_processor(source),
        source.dropped,
        source.memory,
        _folder_in(contents, directory),
    )


def known_name(tensors: Mapping[str, Tensor], config: Config, layers: int) -> str | None:
    """The hub's name of a tower whose settings follow from its shapes; None if they do not.

    Args:
        tensors: canonical name -> tensor, the tower's among them.
        config: its canonical vision_config.
        layers: of the whole tower.
    """
    kind, width = config["model_type"], config["hidden_size"]
    name = KNOWN_TOWERS.get((kind, width, config["image_size"]))
    if name is None or (kind == SIGLIP and layers != SIGLIP_LAYERS.get(width)):
        return None
    implied = clip.tower_config(tensors)
    return name if all(implied[key] == config[key] for key in _NOT_IN_SHAPES) else None


def settings_files(config: Config, layers: int, processor: Config, folder: str) -> dict[str, bytes]:
    """A folder with a tower's settings, without its weights.

    Args:
        config: canonical vision_config.
        layers: of the whole tower.
        processor: its preprocessor_config.json.
        folder: its name.
    """
    settings = {**config, "num_hidden_layers": layers}
    documents = {"config.json": dict(sorted(settings.items())), PROCESSOR: processor}
    return {f"{folder}/{name}": as_json(document) for name, document in documents.items()}


# --- where it is -----------------------------------------------------------------------------


def _locate(contents: Contents, name: object, options: Options) -> Path | None:
    if options.vision is not None:
        if not options.vision.is_dir():
            raise CheckpointError(f"there is no directory {options.vision}", given="--vision")
        return options.vision
    places = [contents.directory / FOLDER]
    if isinstance(name, str) and name:
        places.insert(0, contents.directory / Path(name).expanduser())
        places.append(_cached(name))
    return next((place for place in places if place and (place / "config.json").is_file()), None)


def _cached(name: str) -> Path | None:
    """The newest snapshot of a hub's repository in the local cache.

    Source: huggingface_hub, constants.py and "Understand caching".
    """
    if not HUB_ID.fullmatch(name):
        return None
    folder = _cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
        snapshots = [folder / "snapshots" / revision] if re.fullmatch(r"\w+", revision) else []
    except (OSError, UnicodeDecodeError):
        snapshots = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
    return snapshots[-1] if snapshots else None


def _cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    general = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or general).expanduser() / "hub"


def _folder_in(contents: Contents, directory: Path) -> str:
    """The folder's name if it lies directly in the checkpoint."""
    parent, name = directory.resolve().parent, directory.resolve().name
    return name if parent == contents.directory.resolve() else FOLDER


# --- what is inside --------------------------------------------------------------------------


def _from_inside(tensors: Mapping[str, Tensor], name: object, directory: Path | None) -> Tower:
    processor: Config = {}
    if directory is None:
        config = clip.tower_config(tensors)
        if isinstance(name, str) and name.startswith("laion/"):
            config["hidden_act"] = "gelu"  # OpenCLIP's towers, unlike OpenAI's
        layers = SIGLIP_LAYERS.get(config["hidden_size"], _whole(config))
    else:
        stated = _stated(directory)
        config = _of_shapes(tensors, stated, str(directory))
        layers = stated["num_hidden_layers"]
        processor = read_json(directory / PROCESSOR, optional=True)
    return Tower(config, layers, processor=processor)


def _whole(config: Config) -> int:
    """Layers of the whole tower of which the checkpoint has those that LLaVA needs."""
    return config["num_hidden_layers"] + (config["model_type"] == SIGLIP)


def _stated(directory: Path) -> Config:
    """The canonical vision_config that a tower's directory states."""
    given = read_json(directory / "config.json")
    section = given.get("vision_config")
    if isinstance(section, dict):
        kinds = {tower.whole: tower.model_type for tower in clip.TOWERS}
        given = {"model_type": kinds.get(given.get("model_type")), **section}
    left_out = ("architectures", "transformers_version", "torch_dtype", "dtype")
    kept = {key: value for key, value in given.items() if key not in left_out}
    config = canonical.vision_config({"vision_config": kept})
    check_types(config, VISION_DEFAULTS[config["model_type"]], f"config.json of {directory}")
    return config


def _of_shapes(tensors: Mapping[str, Tensor], stated: Config, where: str) -> Config:
    """What is stated of the tower that is inside; of its layers, those that are there."""
    token = stated["model_type"] == "clip_vision_model"
    patch, grid = stated["patch_size"], stated["image_size"] // stated["patch_size"]
    width = stated["hidden_size"]
    for name, shape in (
        ("embeddings.patch_embedding.weight", (width, stated["num_channels"], patch, patch)),
        ("embeddings.position_embedding.weight", (grid**2 + token, width)),
        ("encoder.layers.0.mlp.fc1.weight", (stated["intermediate_size"], width)),
    ):
        found = tensors[VISION + name].shape if VISION + name in tensors else None
        if found != shape:
            raise CheckpointError(
                f"{where} is not of the vision tower that the checkpoint holds",
                given=f"{name} {found} inside, {shape} as is stated",
                fix="name the directory of the tower that it was trained with: --vision DIR",
            )
    blocks = {name.split(".")[4] for name in tensors if name.startswith(f"{VISION}encoder.layers.")}
    config = {**stated, "num_hidden_layers": len(blocks)}
    if not token:
        config["vision_use_head"] = clip.HEAD_PROBE in tensors
    return dict(sorted(config.items()))

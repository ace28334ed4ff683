"""Typed errors; all derive from `UnillavaError`, and the command line turns them into exit 2."""

from weight_convert.errors import CheckpointError, UnillavaError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MediaError",
    "RequestError",
    "UnillavaError",
]


class ConfigError(UnillavaError):
    """config.json names something unknown or contradicts itself; the message names the field."""


class DataError(UnillavaError):
    """A file of training data cannot be read or written, or is damaged."""


class MediaError(UnillavaError):
    """An image or a video cannot be fetched or decoded."""


class RequestError(UnillavaError):
    """A request (messages, prompt, sampling options) cannot be carried out as given."""

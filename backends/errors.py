"""Errors of the backends."""

from weight_convert.errors import UnillavaError


class BackendError(UnillavaError):
    """A backend, device, dtype or operation is not available here."""

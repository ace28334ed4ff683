"""Writing files: entirely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unillava.errors import DataError


@contextlib.contextmanager
def written(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which gets its name only when the block has ended without an error.

    Args:
        path: its name.
        overwrite: replace what has that name; else nothing is replaced, whoever made it when.

    Raises:
        DataError: the name is taken, or the disk refuses.
    """
    path = Path(path)
    if not overwrite:
        refuse_taken(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(scratch, path)
        else:
            _name(scratch, path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}",
            fix="check the folder, its permissions and the free space",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it has its name by now, or could not be made
            scratch.unlink()


def refuse_taken(path: str | os.PathLike[str]) -> None:
    """Raise DataError if something has that name already."""
    if os.path.lexists(path):
        raise _taken(path)


def as_json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8; half characters (lone surrogates) stay the escapes that they were."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent).encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode()


def _name(scratch: Path, path: Path) -> None:
    """Give a file a name that nothing has."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError:  # a file system without hard links
        refuse_taken(path)
        os.replace(scratch, path)


def _taken(path: str | os.PathLike[str]) -> DataError:
    return DataError(
        "there is a file of that name already",
        given=path,
        expected="a new name: nothing is overwritten",
        fix="name another file, or move that one away",
    )

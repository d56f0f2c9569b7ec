"""What --out holds: whole files, and those of one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flags import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to. It takes the place of `path` once all of it is written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path | None) -> Iterator[None]:
    """Makes the directory `path` and keeps other processes out of it. None is no directory.

    It is made before the training, so that a path that cannot be written to is told before the training too.
    """
    if path is None:
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Root may write where the mode bits say no: only writing shows.
        with tempfile.TemporaryFile(dir=path):
            pass
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write to --out {path}: {error.strerror}") from error
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """The lock ends with the process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process is writing to --out {path}") from error

"""A run on disk: metrics.jsonl, and checkpoints that training continues from exactly.

checkpoints/STEP/ holds state/, which Orbax writes, progress.json, and checksums.json, which says what the other files
must be. Whatever is damaged is told in one line before Orbax sees it. The last two checkpoints are kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

Rows = list[dict[str, Any]]

KEPT = 2


class InputError(Exception):
    """What the user gave cannot be used; the message says why in one line."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to. It takes the place of `path` once all of it is written."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


class RunDirectory:
    """The directory --out, for one process at a time; None keeps nothing. `settings` must be the same to resume."""

    def __init__(self, path: Path | None, settings: dict[str, Any], resume: bool):
        self.path, self.settings, self.lock, self.done = path, settings, None, 0
        if path is None:
            return
        _check(path)
        self.checkpoints = path.absolute() / "checkpoints"
        if resume and not self.checkpoints.is_dir():
            raise InputError(f"{path} holds no run to resume")
        self.done = max(self._steps(), default=0)
        if resume and not self.done:
            raise InputError(f"{path} holds no checkpoint to resume from")
        if not resume and (self.done or (path / "metrics.jsonl").exists()):
            raise InputError(f"{path} already holds a run: add --resume to continue it, or choose another --out")
        self.lock = _claim(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def restore(self, state: Any) -> tuple[Any, int, Rows]:
        """The saved state, placed on devices as `state` is; the steps done; their metrics."""
        folder = self.checkpoints / str(self.done)
        fault = damage(folder)
        if fault:
            whole = [n for n in self._steps() if n < self.done and not damage(self.checkpoints / str(n))]
            remedy = f"remove it to continue from {whole[-1]}" if whole else "there is no whole one before it"
            raise InputError(f"the checkpoint {self.path}/checkpoints/{self.done} is damaged ({fault}): {remedy}")
        progress = json.loads((folder / "progress.json").read_text())
        for name, value in self.settings.items():
            if value != progress["settings"].get(name):
                raise InputError(f"{self.path} was started with {name} {progress['settings'].get(name)}, not {value}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(folder / "state", abstract)
        # A run killed between its checkpoint and its metrics lacks the last ones.
        self._write_metrics(progress["rows"])
        return restored, self.done, progress["rows"]

    def save(self, done: int, state: Any, rows: Rows) -> None:
        """A whole checkpoint or none: it gets its name last."""
        if self.path is None:
            return
        folder, part = self.checkpoints / str(done), self.checkpoints / "part"
        last = f"the last whole one is {max(self._steps(), default='none')}"
        with _told(f"cannot write the checkpoint {folder} ({last})", part):
            part.mkdir(parents=True)
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(part / "state", state)
            (part / "progress.json").write_text(json.dumps({"settings": self.settings, "rows": rows}))
            (part / "checksums.json").write_text(json.dumps(_checksums(part)))
            part.rename(folder)
            self._write_metrics(rows)
            for old in self._steps()[:-KEPT]:
                shutil.rmtree(self.checkpoints / str(old))

    def _steps(self) -> list[int]:
        return sorted(int(name.name) for name in self.checkpoints.glob("[0-9]*"))

    def _write_metrics(self, rows: Rows) -> None:
        assert self.path is not None
        with replacing(self.path / "metrics.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))


def damage(folder: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, if there is one."""
    try:
        written = json.loads((folder / "checksums.json").read_text())
        found = _checksums(folder)
    except (OSError, ValueError) as error:
        return f"checksums.json: {error}"
    return next((name for name in {**written, **found} if written.get(name) != found.get(name)), None)


def _checksums(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json")
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _check(path: Path) -> None:
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"cannot write to --out {str(path)[:80]}: {error.strerror}") from error


def _claim(path: Path) -> int:
    """Makes the directory and keeps other processes out of it, as long as this one lives."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Root may write where the mode bits say no: only writing shows.
        with tempfile.TemporaryFile(dir=path):
            pass
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"another process is writing to --out {path}") from error
    except OSError as error:
        raise InputError(f"cannot write to --out {path}: {error.strerror}") from error
    return lock


@contextlib.contextmanager
def _told(what: str, part: Path) -> Iterator[None]:
    """A full disk surfaces from Orbax as any of a dozen types, and in pages of its log.

    Its threads go on after it has failed, and complain of an event loop that is gone: nobody is told of that.
    `part` is what to clear away.
    """
    shutil.rmtree(part, ignore_errors=True)
    hook, sys.unraisablehook = sys.unraisablehook, _unless_the_loop_is_closed
    logging.disable()
    try:
        yield
        sys.unraisablehook = hook
    except Exception as error:
        raise InputError(f"{what}: {_why(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(part, ignore_errors=True)


def _unless_the_loop_is_closed(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _why(error: Exception) -> str:
    """The system's own words, which Orbax wraps into many of its own."""
    text = " ".join(str(error).split())
    known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))
    return next((words for words in known if words in text), text[:200] or type(error).__name__)

"""A run on disk: metrics.jsonl, report.png, and checkpoints that training continues from exactly."""

import contextlib
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flags import InputError

Rows = list[dict[str, Any]]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to, which takes the place of `path` once all of it is written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """A damaged file or a full disk surfaces from Orbax as any of a dozen types, some with pages of text."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {textwrap.shorten(str(error), 120) or type(error).__name__}") from error


@contextlib.contextmanager
def quiet_if_it_fails() -> Iterator[None]:
    """Reads of a restore that failed outlive Orbax's event loop, and each would print a traceback about that."""
    before = sys.unraisablehook

    def after(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = after
    yield
    sys.unraisablehook = before


def make_writable(path: Path) -> None:
    """Fails before training rather than after it. Asks by writing: root may write where the mode bits say no."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write to --out {path}: {error.strerror}") from error


class RunDirectory:
    """Checkpoints hold the state of every network, the settings, and the metrics so far.

    metrics.jsonl is rewritten from those metrics: it agrees with the checkpoint wherever a run was interrupted.
    `epochs` may grow when a run is resumed; None if the settings fix its length.
    """

    def __init__(self, path: Path, settings: dict[str, Any], epochs: int | None, resume: bool):
        self.path = path
        self.settings = settings
        self.epochs = epochs
        checkpoints = path.absolute() / "checkpoints"
        if resume and not checkpoints.is_dir():
            raise InputError(f"{path} holds no run to resume")
        make_writable(path)

        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        with told(f"cannot use {path}"):
            self.manager = ocp.CheckpointManager(checkpoints, options=options)
        self.done = self.manager.latest_step() or 0
        if resume and not self.done:
            raise InputError(f"{path} holds no checkpoint to resume from")
        if not resume and (self.done or (path / "metrics.jsonl").exists()):
            raise InputError(f"{path} already holds a run: add --resume to continue it, or choose another --out")

    def restore(self, state: Any) -> tuple[Any, int, Rows]:
        """The saved state, placed on devices as `state` is; the epochs or steps done; their metrics."""
        saved = self._read(progress=ocp.args.JsonRestore())["progress"]
        self._check_settings(saved["settings"], saved["epochs"])
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = self._read(state=ocp.args.StandardRestore(abstract))["state"]
        # A run killed between its checkpoint and its metrics lacks the last ones.
        self._write(saved["rows"])
        return restored, self.done, saved["rows"]

    def save(self, done: int, state: Any, rows: Rows) -> None:
        progress = {"settings": self.settings, "epochs": self.epochs, "rows": rows}
        contents = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        with told(f"cannot write a checkpoint to {self.path}"):
            self.manager.save(done, args=contents)
        self._write(rows)

    def close(self) -> None:
        self.manager.close()

    def _read(self, **contents: Any) -> Any:
        with told(f"cannot read the checkpoint in {self.path}"), quiet_if_it_fails():
            return self.manager.restore(self.done, args=ocp.args.Composite(**contents))

    def _write(self, rows: Rows) -> None:
        with replacing(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _check_settings(self, settings: dict[str, Any], epochs: int | None) -> None:
        for name, value in self.settings.items():
            if value != settings.get(name):
                raise InputError(f"{self.path} was started with {name} {settings.get(name)}, not {value}")
        if self.epochs is None:
            return
        if self.epochs < self.done:
            raise InputError(f"{self.path} has already trained {self.done} epochs, more than --epochs {self.epochs}")
        # An annealed smoothing spans the epochs it was started with: other ones mean another past.
        if self.epochs != epochs and self.settings["--schedule"] != "constant":
            raise InputError(
                f"{self.path} anneals its smoothing over {epochs} epochs: --epochs can change only with a constant one"
            )

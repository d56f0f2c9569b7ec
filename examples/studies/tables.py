"""What the small experiments leave behind: a table in Markdown, the figures as JSON, a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import replacing

from jax_ls.sweeps.results import markdown as table

__all__ = ["new_figure", "table", "write"]


def write(out: Path, name: str, text: str, record: dict[str, Any], draw: Callable[[Path], None]) -> None:
    """NAME.md, NAME.json and NAME.png, each whole or not at all."""
    with replacing(out / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replacing(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with replacing(out / f"{name}.png") as temporary:
        draw(temporary)
    print(f"wrote {out}: {name}.md, {name}.json, {name}.png")


def new_figure(width: float, height: float, dpi: int = 80) -> Any:
    """A figure that no window system has to show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure

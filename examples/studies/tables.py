"""What a study leaves behind: a table in Markdown, the figures as JSON, a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from files import replacing

# Okabe and Ito's blue, vermilion, green and purple, told apart by all common kinds of colour vision.
BLUE, VERMILION, GREEN, PURPLE = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "^", "s", "D")


def table(rows: list[list[str]]) -> str:
    """A table in Markdown with aligned columns; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def as_json(record: dict[str, Any]) -> str:
    """JSON of a line for each entry; a list of plain values stays on its line."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda plain: f"[{' '.join(plain[1].split())}]", text) + "\n"


def write(out: Path, name: str, text: str, record: dict[str, Any], draw: Callable[[Path], None]) -> None:
    """NAME.md, NAME.json and NAME.png, each whole or not at all."""
    with replacing(out / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replacing(out / f"{name}.json") as temporary:
        temporary.write_text(as_json(record), encoding="utf-8")
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


def finish(axes: Any, **legend: Any) -> None:
    """The look that all charts share."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(edgecolor="none", framealpha=0.85, fontsize=8.5, title_fontsize=8.5, alignment="left", **legend)

"""One look for all figures: colors, sizes, how they are written, and labels that don't overlap.

Nothing here goes through pyplot, so no figure outlives its drawing and no backend is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.files import written_beside

BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK, GRAY = "#E69F00", "#56B4E9", "#F0E442", "#000000", "#8A8A8A"
EXPERT_COLORS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, YELLOW, BLACK)
"""The palette of Okabe and Ito, told apart by color-blind readers."""
EXPERT_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
Tell = Callable[[str], None]
"""Is told, in a sentence, of each figure that is left out and why."""

_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "hf-switch-sae",
    "savefig.dpi": 160,
}


def untold(sentence: str) -> None:
    """Nobody is told."""


@contextmanager
def look() -> Iterator[None]:
    """Within it figures are made and written in our look; others' settings are as before after.

    Raises:
        SwitchSAEError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SwitchSAEError(
            'figures need matplotlib: pip install "hf-switch-sae[viz]".'
        ) from None
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float = 6.0, height: float = 4.0) -> Any:
    """An empty figure, inches, laid out so that nothing is cut off; within `look`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write `name`.svg and `name`.png into a folder; returns their paths."""
    files = [folder / f"{name}.svg", folder / f"{name}.png"]
    for file in files:
        kind = file.suffix[1:]
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        with written_beside(file) as beside:
            figure.savefig(beside, format=kind, metadata=metadata)
    return files


def label_points(axes: Any, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write a label beside each point where it covers no other label, point, or the frame.

    The first place that is free, from near to far, with a line to the point where it is far; where
    none is free, the one that covers least.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # the layout has to be known
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    at = axes.transData.transform(points)
    dot = 5 * figure.dpi / 72
    taken = [(x - dot, y - dot, x + dot, y + dot) for x, y in at]
    legend = axes.get_legend()
    if legend is not None:
        box = legend.get_window_extent(renderer)
        taken.append((box.x0, box.y0, box.x1, box.y1))
    for own, (place, text) in enumerate(zip(at, labels, strict=True)):
        shape = axes.text(0, 0, text, fontsize=8)
        extent = shape.get_window_extent(renderer)
        shape.remove()
        size = (extent.width + 2, extent.height + 2)
        best, least, reach = None, float("inf"), 0.0
        for step in range(1, 9):
            for x, y in _around(place, size, dot * (0.6 + step * 0.9)):
                box4 = (x, y, x + size[0], y + size[1])
                others = [each for index, each in enumerate(taken) if index != own]
                covered = sum(_overlap(box4, each) for each in others) + _outside(box4, frame)
                if covered < least - 1e-9:
                    best, least, reach = box4, covered, step
            if least == 0:
                break
        if best is None:  # pragma: no cover - there is always a first place
            continue
        taken.append(best)
        middle = ((best[0] + best[2]) / 2, (best[1] + best[3]) / 2)
        inverse = axes.transData.inverted()
        axes.annotate(
            text,
            xy=inverse.transform(place),
            xytext=inverse.transform(middle),
            fontsize=8,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": GRAY, "lw": 0.6, "shrinkB": 3}
            if reach > 1
            else None,
        )


def _around(
    point: Sequence[float], size: tuple[float, float], gap: float
) -> Iterator[tuple[float, float]]:
    """Lower left corners of boxes around a point: right, left, above, below, then the corners."""
    (x, y), (width, height) = point, size
    right, left, up, down = x + gap, x - gap - width, y + gap, y - gap - height
    middle_x, middle_y = x - width / 2, y - height / 2
    yield from ((right, middle_y), (left, middle_y), (middle_x, up), (middle_x, down))
    yield from ((right, up), (right, down), (left, up), (left, down))


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Sequence[float], frame: Any) -> float:
    """How much of a box is beyond the frame."""
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return max(0.0, (box[2] - box[0]) * (box[3] - box[1]) - inside)

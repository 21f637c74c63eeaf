"""The look of all figures: colors, sizes, how they are saved, and labels that don't overlap.

Beware Nothing here goes through pyplot, so no figure outlives its drawing, and which backend others
       use does not change. Labels are placed by hand, as matplotlib has nothing for it and
       adjustText 1.4 was tried: of the nine points in our tests it lets two labels overlap, and
       it moves others beyond the frame.
"""

from __future__ import annotations

import itertools
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
"""Called with a sentence for each figure that is left out, which says why."""

_SETTINGS: dict[Any, Any] = {
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
    "svg.hashsalt": "hf-switch-sae",  # else ids in an SVG are random
    "savefig.dpi": 160,
}


def ignore(sentence: str) -> None:
    """A `Tell` that drops what it is told."""


def check_installed() -> None:
    """Raise if figures can't be drawn here, before anything is measured for them.

    Raises:
        SwitchSAEError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SwitchSAEError('figures need matplotlib: pip install "hf-switch-sae[viz]".') from None


def can_draw(tell: Callable[[str], None]) -> bool:
    """Whether figures can be drawn here; if not, `tell` is told why there are none."""
    try:
        check_installed()
    except SwitchSAEError as err:
        tell(f"no figures: {err}")
        return False
    return True


@contextmanager
def look() -> Iterator[None]:
    """Make and save figures in our look within the block; others' settings are restored after it.

    Raises:
        SwitchSAEError: matplotlib is not installed.
    """
    check_installed()
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float = 6.0, height: float = 4.0) -> Any:
    """An empty figure of a size in inches, laid out so that nothing is cut off; within `look`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    # it attaches itself; `label_points` needs its renderer to measure texts
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write `name`.svg and `name`.png into a folder; returns their paths."""
    files = [folder / f"{name}.svg", folder / f"{name}.png"]
    for file in files:
        kind = file.suffix[1:]
        # neither date nor version goes into a file: the same data gives the same bytes
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        with written_beside(file) as beside:
            figure.savefig(beside, format=kind, metadata=metadata)
    return files


def legend_above(figure: Any, axes: Any, columns: int) -> None:
    """Put the legend above the axes, where it covers no data."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=columns,
        fontsize=8.5,
        handlelength=2.8,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def plain_log_ticks(axis: Any) -> None:
    """Write the ticks of a log axis as plain numbers, between powers of ten too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def label_points(
    axes: Any,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Write a label for each point where it covers no other label, point or line.

    It takes the first free place inside the frame, from near to far, or the place that covers least
    if none is free. A thin line leads to the point unless the label is right beside it. Nothing
    may change the layout afterward.
    """
    # places are in pixels, so the layout has to be computed now, and to stay
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    at = axes.transData.transform(points)
    # a marker's radius and some air: 4.5 points, in pixels
    dot = 4.5 * figure.dpi / 72
    # what a label must not cover: the points, the lines, and the labels before it
    taken = [(x - dot, y - dot, x + dot, y + dot) for x, y in at]
    drawn = [box for line in lines for box in _boxes_along(axes.transData.transform(line))]
    inverse = axes.transData.inverted()
    for own, (place, text) in enumerate(zip(at, labels, strict=True)):
        # only a text that is there has a size
        shape = axes.text(0, 0, text, fontsize=8)
        extent = shape.get_window_extent(renderer)
        shape.remove()
        others = [box for index, box in enumerate(taken) if index != own] + drawn
        best, beside = _free_place(place, (extent.width + 2, extent.height), dot, others, frame)
        taken.append(best)
        middle = ((best[0] + best[2]) / 2, (best[1] + best[3]) / 2)
        leader = {"arrowstyle": "-", "color": GRAY, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            text,
            xy=inverse.transform(place),
            xytext=inverse.transform(middle),
            fontsize=8,
            ha="center",
            va="center",
            bbox={"boxstyle": "square,pad=0.05", "fc": "none", "ec": "none"},
            arrowprops=None if beside else leader,
        )


def _free_place(
    point: Sequence[float],
    size: tuple[float, float],
    dot: float,
    others: Sequence[Sequence[float]],
    frame: Any,
) -> tuple[tuple[float, float, float, float], bool]:
    """The box for a label of some size, in pixels, and whether it is right beside its point."""
    found: tuple[float, tuple[float, float, float, float], bool] | None = None
    for step in range(10):
        for way, (x, y) in enumerate(_around(point, size, dot * (1.3 + step))):
            box = (x, y, x + size[0], y + size[1])
            beside = step == 0 and way < 4
            # a label cut by the frame is worse than one that covers something, hence the 3
            covered = sum(_overlap(box, each) for each in others) + 3 * _outside(box, frame)
            if not beside:  # the line that leads there must cover nothing either
                leader = list(_boxes_along((point, (x + size[0] / 2, y + size[1] / 2))))
                covered += sum(_overlap(a, b) for a in leader for b in others)
            # of places equally bad up to rounding, the first is the nearest
            if found is None or covered < found[0] - 1e-9:
                found = (covered, box, beside)
            if covered == 0:
                return box, found[2]
    assert found is not None
    return found[1], found[2]


def _boxes_along(line: Any) -> Iterator[tuple[float, float, float, float]]:
    """Small boxes that together cover a line of straight pieces."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        many = max(int(max(abs(x1 - x0), abs(y1 - y0)) // 3), 1)
        for step in range(many + 1):
            x, y = x0 + (x1 - x0) * step / many, y0 + (y1 - y0) * step / many
            yield (x - 1.5, y - 1.5, x + 1.5, y + 1.5)


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
    """The area of a box that lies beyond the frame."""
    inside = _overlap(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return max(0.0, (box[2] - box[0]) * (box[3] - box[1]) - inside)

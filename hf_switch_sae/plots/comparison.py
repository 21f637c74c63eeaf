"""comparison.json of several SAEs -> what they cost against what they lose.

flops_fvu          operations per token against FVU, with a Pareto front
l0_fvu             active features per token against FVU
l0_ce_recovered    the same against cross entropy recovered, where that was measured

Beware The Pareto front is of the SAEs with the commonest k only: more active features lower the
       error whatever the operations, so SAEs of another k would not be compared by their cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.plots.style import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PINK,
    VERMILION,
    Tell,
    ignore,
    label_points,
    legend_above,
    look,
    new_figure,
    save,
)

# name in the legend, color, marker, line style
_FAMILIES = {
    "switch": ("Switch SAE", BLUE, "o", "-"),
    "topk": ("TopK SAE", VERMILION, "s", "--"),
    "batch_topk": ("BatchTopK SAE", ORANGE, "v", (0, (5, 1))),
    "relu": ("ReLU SAE", GREEN, "^", ":"),
    "jumprelu": ("JumpReLU SAE", PINK, "D", "-."),
}
_SAE = Mapping[str, Any]


def draw_comparison(
    comparison: Mapping[str, Any], folder: str | Path, tell: Tell = ignore
) -> list[Path]:
    """Draw a comparison, each figure as SVG and PNG; returns the paths.

    Args:
        comparison: as in comparison.json, format 1.
        folder: where to write; made if it is not there.
        tell: called with a sentence for each figure that is left out.

    Raises:
        SwitchSAEError: another format, no SAE in it, or matplotlib is not installed.
    """
    saes = comparison.get("saes") or []
    if comparison.get("format") != 1 or not saes:
        raise SwitchSAEError(
            f"this is no comparison of format 1 with SAEs in it: format "
            f"{comparison.get('format')!r}, {len(saes)} SAEs."
        )
    folder = Path(folder)
    with look():
        files = save(_costs(saes), folder, "flops_fvu")
        files += save(_sparsity(saes, "fvu", "FVU (lower is better)"), folder, "l0_fvu")
        measured = [sae for sae in saes if sae.get("ce_recovered") is not None]
        if measured:
            label = "CE recovered (1 is all of it)"
            files += save(_sparsity(measured, "ce_recovered", label), folder, "l0_ce_recovered")
        else:
            tell("l0_ce_recovered is left out: the comparison has no CE recovered.")
    return files


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by x, of the points that no other point beats.

    One point beats another if it is lower in one coordinate and not higher in the other. Of points
    that are the same, only the first is returned.
    """
    # by x, then y: a point is on the front if it is below all points before it
    order = sorted(range(len(points)), key=lambda index: points[index])
    front: list[int] = []
    for index in order:
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def _costs(saes: Sequence[_SAE]) -> Any:
    figure = new_figure(6.6, 4.8)
    axes = figure.add_subplot()
    points = [(float(sae["flops_per_token"]["total"]), float(sae["fvu"])) for sae in saes]
    # relu and jumprelu SAEs may have no k; they are left out of the front
    k = Counter(sae["k"] for sae in saes if sae["k"] is not None).most_common(1)
    alike = [point for point, sae in zip(points, saes, strict=True) if k and sae["k"] == k[0][0]]
    front = [alike[index] for index in pareto_front(alike)]
    # a staircase, as nothing measured lies between two points of the front
    stairs = front[:1]
    for x, y in front[1:]:
        stairs += [(x, stairs[-1][1]), (x, y)]
    if len(front) > 1:
        axes.plot(
            *zip(*stairs, strict=True),
            color=GRAY,
            lw=1,
            zorder=1,
            label=f"Pareto front, k = {k[0][0]}",
        )
    _scatter(axes, saes, points)
    axes.set_xscale("log")
    axes.set_xlabel("floating-point operations per token (router + encoder + decoder, log scale)")
    axes.set_ylabel("FVU (lower is better)")
    _room_for_labels(axes, points, log_x=True)
    legend_above(figure, axes, 5)
    # labels come last: axis limits and legend decide which pixel a point is at
    lines = [stairs] if len(front) > 1 else []
    label_points(axes, points, [str(sae["label"]) for sae in saes], lines)
    return figure


def _sparsity(saes: Sequence[_SAE], figure_of: str, label: str) -> Any:
    figure = new_figure(6.6, 4.8)
    axes = figure.add_subplot()
    points = [(float(sae["l0"]), float(sae[figure_of])) for sae in saes]
    series: dict[tuple, list[int]] = {}
    for index, sae in enumerate(saes):  # the same SAE at several k becomes a line
        kind = (sae["family"], sae["num_experts"], sae["num_features"])
        series.setdefault(kind, []).append(index)
    lines = [
        (kind[0], sorted(points[index] for index in members))
        for kind, members in series.items()
        if len(members) > 1
    ]
    for name, line in lines:
        _, color, _, style = _family(name)
        axes.plot(*zip(*line, strict=True), ls=style, color=color, lw=1, zorder=1)
    _scatter(axes, saes, points)
    axes.set_xlabel("L0 (active features per token)")
    axes.set_ylabel(label)
    _room_for_labels(axes, points, log_x=False)
    legend_above(figure, axes, 5)
    label_points(axes, points, [str(sae["label"]) for sae in saes], [line for _, line in lines])
    return figure


def _scatter(axes: Any, saes: Sequence[_SAE], points: Sequence[tuple[float, float]]) -> None:
    # a call for each family, so that each is in the legend once
    for name in dict.fromkeys(str(sae["family"]) for sae in saes):
        label, color, marker, _ = _family(name)
        of_it = [point for sae, point in zip(saes, points, strict=True) if sae["family"] == name]
        xs, ys = zip(*of_it, strict=True)
        axes.scatter(
            xs, ys, s=42, c=color, marker=marker, edgecolors="white", lw=0.7, label=label, zorder=3
        )


def _family(name: str) -> tuple[str, str, str, Any]:
    return _FAMILIES.get(name, (name, BLACK, "X", "-"))


def _room_for_labels(axes: Any, points: Sequence[tuple[float, float]], log_x: bool) -> None:
    """Set limits that leave room for labels, even if all points are the same."""
    xs, ys = zip(*points, strict=True)
    if log_x:
        factor = max(1.5, (max(xs) / min(xs)) ** 0.14)
        axes.set_xlim(min(xs) / factor, max(xs) * factor)
    else:
        margin = max(0.16 * (max(xs) - min(xs)), 0.08 * max(max(xs), 1))
        axes.set_xlim(min(xs) - margin, max(xs) + margin)
    margin = max(0.14 * (max(ys) - min(ys)), 0.02 * max(map(abs, ys)))
    axes.set_ylim(min(ys) - margin, max(ys) + margin)

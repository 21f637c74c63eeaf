"""An SAE's geometry -> pictures of it.

maps          t-SNE of encoder and decoder rows by expert, and how pure neighborhoods are
duplicates    how many features have a neighbor above a cosine, against random vectors
similarity    mean largest cosine from expert to expert
alignment     cosines of encoder rows with the router's rows
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.geometry.result import Geometry
from hf_switch_sae.plots.style import (
    BLUE,
    EXPERT_COLORS,
    EXPERT_MARKERS,
    GRAY,
    GREEN,
    ORANGE,
    VERMILION,
    Tell,
    ignore,
    legend_above,
    look,
    new_figure,
    save,
)

_NAMED_EXPERTS = 16
"""Up to so many experts, each has a marker or a number of its own; beyond, a color scale."""
_MOST_SHOWN = 64
"""Experts of a matrix beyond which an SVG holds it as a bitmap."""


def draw_geometry(geometry: Geometry, folder: str | Path, tell: Tell = ignore) -> list[Path]:
    """Draw what was measured, each figure as SVG and PNG; returns the paths.

    Args:
        geometry: of one SAE.
        folder: where to write; made if it is not there.
        tell: called with a sentence for each figure that is left out.

    Raises:
        SwitchSAEError: matplotlib is not installed.
    """
    folder = Path(folder)
    files: list[Path] = []
    with look():
        if geometry.clusters is None:
            tell("maps is left out: no t-SNE was asked for.")
        else:
            files += save(_maps(geometry), folder, "maps")
        files += save(_duplicates(geometry), folder, "duplicates")
        experts = geometry.sae["num_experts"]
        if experts == 1 or geometry.router is None:
            tell("similarity and alignment are left out: the SAE has one expert and no router.")
            return files
        if geometry.similarity["experts"] is None:
            tell(f"similarity is left out: {experts} experts are too many to show.")
        else:
            files += save(_similarity(geometry), folder, "similarity")
        files += save(_alignment(geometry), folder, "alignment")
    return files


def _maps(geometry: Geometry) -> Any:
    figure = new_figure(8.4, 4.6)
    experts, table = geometry.sae["num_experts"], geometry.table
    clusters = geometry.clusters or {}
    shown = table["encoder_x"].isfinite().nonzero()[:, 0]
    # shuffled, so that no expert is drawn on top of the others
    generator = torch.Generator().manual_seed(0)
    shown = shown[torch.randperm(len(shown), generator=generator, device="cpu")]
    for at, name in enumerate(("encoder", "decoder")):
        axes = figure.add_subplot(1, 2, at + 1)
        points = torch.stack([table[f"{name}_x"], table[f"{name}_y"]], 1)[shown]
        last = _by_expert(axes, points, table["expert"][shown], experts)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_color("#BBBBBB")
        axes.set_title(f"{name} rows, {len(shown):,} of {len(table['expert']):,} features")
        if clusters.get("purity"):
            # a t-SNE picture flatters or hides clusters, so the same figure of the rows stands by
            purity = clusters["purity"][name]
            axes.set_xlabel(
                f"of {clusters['neighbors']} neighbors in the same expert:\n"
                f"{purity['rows']:.1%} of rows, {purity['picture']:.1%} in the picture, "
                f"{clusters['chance']:.1%} by chance"
            )
    # one legend for both maps
    if 1 < experts <= _NAMED_EXPERTS:
        handles, names = figure.axes[0].get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda index: int(names[index]))
        figure.legend(
            [handles[index] for index in order],
            [names[index] for index in order],
            loc="outside lower center",
            ncols=min(experts, 16),
            title="expert",
            handletextpad=0.1,
            columnspacing=1.0,
            markerscale=2.5 if len(shown) > 2000 else 1.2,
        )
    elif experts > _NAMED_EXPERTS:
        figure.colorbar(last, ax=figure.axes, label="expert", shrink=0.7)
    return figure


def _by_expert(axes: Any, points: Tensor, expert: Tensor, experts: int) -> Any:
    """Draw dots in the order given; of few experts, each gets a color and a marker of its own."""
    xs, ys = points.T.numpy()
    size = min(max(24_000 / max(len(xs), 1), 5.0), 24.0)
    # rasterized, as tens of thousands of dots would make an SVG of many megabytes
    if experts == 1:
        return axes.scatter(xs, ys, s=size, color=BLUE, lw=0, rasterized=True)
    if experts > _NAMED_EXPERTS:
        numbers = expert.numpy()
        return axes.scatter(xs, ys, s=size, c=numbers, cmap="viridis", lw=0, rasterized=True)
    last = None
    # a marker takes a call of its own, so the experts take turns, a twentieth of the dots each
    slices = torch.arange(len(expert), device=expert.device) * 20 // max(len(expert), 1)
    for part in range(20):
        for each in range(experts):
            mine = ((expert == each) & (slices == part)).numpy()
            last = axes.scatter(
                xs[mine],
                ys[mine],
                s=size,
                c=EXPERT_COLORS[each % len(EXPERT_COLORS)],
                # shifted after each round of colors, so that no two of 16 experts look alike
                marker=EXPERT_MARKERS[(each + each // len(EXPERT_COLORS)) % len(EXPERT_MARKERS)],
                lw=0.15,
                edgecolors="#444444",
                label=str(each) if part == 0 else None,
                rasterized=True,
            )
    return last


def _duplicates(geometry: Geometry) -> Any:
    figure = new_figure(6.2, 4.8)
    axes = figure.add_subplot()
    found = geometry.duplicates
    curve, at = found["curve"], found["threshold"]
    kinds = [
        ("between", "in another expert", BLUE, "o"),
        ("within", "in its own expert", VERMILION, "s"),
    ]
    kinds = [each for each in kinds if curve[each[0]]]
    # with one expert, or one feature in each, "anywhere" says it all
    if len(kinds) < 2:
        kinds = [("any", "anywhere", BLUE, "o")]
    lines = (("share", "features", "-"), ("of_activations", "activations", "--"))
    # one feature: a share of features is never smaller, so the log axis begins there
    lowest = 1 / geometry.sae["num_features"]
    for kind, where, color, marker in kinds:
        for name, label, style in (*lines, ("null", "random vectors", ":")):
            if curve[kind][name] is None:  # of activations, if the SAE is not calibrated
                continue
            # a share of 0 has no place on a log axis
            pairs = zip(curve["thresholds"], curve[kind][name], strict=True)
            xs, ys = zip(*[(x, y) for x, y in pairs if y > 0], strict=True)
            axes.plot(
                xs,
                ys,
                style,
                color=color,
                marker=marker,
                ms=4,
                # the curves of both kinds may coincide, so their markers take turns
                markevery=(0 if kind == "between" else 3, 6),
                label=f"{label}, {where}",
            )
    # the threshold that the card's table is of
    axes.axvline(at, color=GRAY, lw=1)
    axes.annotate(
        f"duplicate\nabove {at:g}",
        (at, lowest),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=8,
        color="#555555",
    )
    axes.set_yscale("log")
    axes.set_ylim(lowest * 0.8, 1.25)
    axes.set_xlim(0, 1)
    axes.set_xlabel("cosine")
    axes.set_ylabel("share with a decoder row nearer than that (log scale)")
    legend_above(figure, axes, len(kinds))
    return figure


def _similarity(geometry: Geometry) -> Any:
    experts = geometry.sae["num_experts"]
    side = 5.2 if experts > 8 else 4.6
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    values = torch.tensor(
        [[torch.nan if v is None else v for v in row] for row in geometry.similarity["experts"]],
        dtype=torch.float32,
        device="cpu",
    )
    image = axes.imshow(values.numpy(), cmap="cividis", rasterized=experts > _MOST_SHOWN)
    axes.grid(visible=False)
    if experts <= _NAMED_EXPERTS:
        axes.set_xticks(range(experts))
        axes.set_yticks(range(experts))
        # a number has to be read on dark cells and on light ones
        middle = float((values.nan_to_num(0).max() + values.nan_to_num(1).min()) / 2)
        for row, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                if value == value:  # nan: an expert of a single feature, against itself
                    color = "black" if value > middle else "white"
                    axes.text(
                        column,
                        row,
                        f"{value:.2f}".lstrip("0"),
                        ha="center",
                        va="center",
                        fontsize=7 if experts > 8 else 8,
                        color=color,
                    )
    null = geometry.similarity["null"]["other"]
    axes.set_xlabel("to a feature of expert")
    axes.set_ylabel("from the features of expert")
    axes.set_title(f"of random vectors: {null:.2f}", fontsize=9)
    figure.colorbar(image, ax=axes, label="mean largest decoder cosine", shrink=0.85)
    return figure


def _alignment(geometry: Geometry) -> Any:
    figure = new_figure(6.2, 4.0)
    axes = figure.add_subplot()
    router = geometry.router or {}
    held = router["histogram"]
    edges, total = held["edges"], sum(held["own"])
    for name, label, color, style, mean in (
        ("own", "its own expert's row", GREEN, "-", router["own"]),
        ("others", "mean over the other experts' rows", ORANGE, "--", router["others"]),
    ):
        shares = [count / total for count in held[name]]
        axes.stairs(
            shares,
            edges,
            color=color,
            fill=name == "own",
            alpha=0.55 if name == "own" else 1,
            lw=1.8,
            ls=style,
            label=f"{label} (on average {mean:+.3f})",
        )
    axes.set_xlim(*_used_range(edges, held["own"], held["others"]))
    axes.set_xlabel("cosine of an encoder row with the router's row")
    axes.set_ylabel("share of features")
    legend_above(figure, axes, 1)
    return figure


def _used_range(edges: Sequence[float], *counts: Sequence[int]) -> tuple[float, float]:
    """The part of a histogram that is not empty, and one bar on either side."""
    used = [at for count in counts for at, many in enumerate(count) if many]
    return edges[max(min(used) - 1, 0)], edges[min(max(used) + 2, len(edges) - 1)]

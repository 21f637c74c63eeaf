"""One SAE and how it was trained -> pictures of it.

load        the share of tokens, or of activations, that each expert gets
density     how often features fire
training    FVU, dead features and the balance of experts over a run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.plots.style import (
    BLUE,
    GRAY,
    VERMILION,
    Tell,
    ignore,
    legend_above,
    look,
    new_figure,
    plain_log_ticks,
    save,
)

# figure in a run's log, what its axis says, whether the axis is logarithmic
_CURVES = (
    ("fvu", "FVU (log scale)", True),
    ("dead_share", "dead features, share", False),
    ("expert_load", "busiest expert over mean", False),
)


def draw_sae(
    num_experts: int,
    folder: str | Path,
    *,
    rate: Tensor | None = None,
    load: Sequence[float] | None = None,
    run: Mapping[str, Any] | None = None,
    tell: Tell = ignore,
) -> list[Path]:
    """Draw what is known of an SAE, each figure as SVG and PNG; returns the paths.

    Args:
        num_experts: E.
        folder: where to write; made if it is not there.
        rate: [F], share of tokens on which each feature fires; None if not calibrated.
        load: [E], share of tokens routed to each expert; by default the experts' shares of
            activations are drawn, which follow from `rate`.
        run: the content of training.json.
        tell: called with a sentence for each figure that is left out.

    Raises:
        SwitchSAEError: matplotlib is not installed.
    """
    folder = Path(folder)
    files: list[Path] = []
    with look():
        if num_experts == 1:
            tell("load is left out: the SAE has one expert.")
        elif load is None and rate is None:
            tell("load is left out: the SAE is not calibrated, and no load was measured.")
        else:
            files += save(_load(num_experts, rate, load), folder, "load")
        if rate is None:
            tell("density is left out: the SAE is not calibrated (hf-switch-sae calibrate).")
        else:
            files += save(_density(rate), folder, "density")
        curves = training_curves(run or {})
        if curves:
            files += save(_training(curves), folder, "training")
        else:
            tell("training is left out: there is no training.json with a log of two steps.")
    return files


def training_curves(run: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Figure -> "training" and "held out" -> (tokens, value), from a run's log.

    A run of several SAEs logs figures of each; these are of the SAE whose hookpoint the notes name.
    """
    log = run.get("log") or []
    # the entry of an evaluation has its step, but not the tokens seen until then
    a_step = run.get("tokens", 0) / max(run.get("steps", 0), 1)
    prefix = f"{run.get('hookpoint')}/"
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in log:
        tokens = entry.get("tokens", entry.get("step", 0) * a_step)
        for figure, _, _ in _CURVES:
            for kind, before in (("training", ""), ("held out", "eval_")):
                names = (f"{before}{figure}", f"{before}{prefix}{figure}")
                value = next((entry[name] for name in names if name in entry), None)
                if isinstance(value, int | float):
                    curves.setdefault(figure, {}).setdefault(kind, []).append((tokens, value))
    # a single point is not a curve
    return {
        figure: {kind: points for kind, points in held.items() if points}
        for figure, held in curves.items()
        if any(len(points) > 1 for points in held.values())
    }


def _load(num_experts: int, rate: Tensor | None, load: Sequence[float] | None) -> Any:
    figure = new_figure(6.2, 3.4)
    axes = figure.add_subplot()
    shares = torch.as_tensor(load, dtype=torch.float64, device="cpu") if load is not None else None
    counted = "tokens"
    if shares is None:
        # features are numbered expert by expert
        of_each = torch.as_tensor(rate, device="cpu").double().view(num_experts, -1).sum(1)
        shares, counted = of_each / of_each.sum().clamp_min(1e-30), "activations"
    axes.bar(range(num_experts), shares.tolist(), color=BLUE, width=0.8)
    axes.axhline(1 / num_experts, color=VERMILION, ls="--", lw=1.4, label="evenly spread")
    if num_experts <= 16:
        axes.set_xticks(range(num_experts))
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, num_experts - 0.4)
    axes.set_xlabel("expert")
    axes.set_ylabel(f"share of {counted}")
    legend_above(figure, axes, 1)
    return figure


def _density(rate: Tensor) -> Any:
    figure = new_figure(6.2, 3.6)
    axes = figure.add_subplot()
    rate = rate.double().cpu()
    # features that never fired have no logarithm; the title counts them
    alive = rate[rate > 0].log10()
    never = len(rate) - len(alive)
    if len(alive):
        # if all features fire alike, bins still need a width
        low, high = float(alive.min()), max(float(alive.max()), float(alive.min()) + 0.1)
        edges = torch.linspace(low, high, 41, dtype=torch.float64, device="cpu")
        counts = torch.histogram(alive.clamp(low, high), edges).hist
        axes.stairs(counts.tolist(), edges.tolist(), fill=True, color=BLUE)
        median = float(alive.median())
        axes.axvline(median, color=VERMILION, ls="--", lw=1.4, label=f"median {10**median:.2g}")
        axes.legend(loc="upper left", fontsize=8)
    axes.set_xlabel("firing rate, log10 of the share of tokens")
    axes.set_ylabel("features")
    axes.set_title(f"{len(rate):,} features, {never:,} never fired", fontsize=9)
    return figure


def _training(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Any:
    drawn = [each for each in _CURVES if each[0] in curves]
    figure = new_figure(3.4 * len(drawn) if len(drawn) > 1 else 5.2, 3.2)
    for at, (name, label, logarithmic) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), at + 1)
        for kind, color, style, marker in (
            ("training", BLUE, "-", None),
            ("held out", VERMILION, "--", "s"),
        ):
            if points := curves[name].get(kind):
                xs, ys = zip(*points, strict=True)
                axes.plot(
                    [x / 1e6 for x in xs], ys, style, color=color, marker=marker, ms=4, label=kind
                )
        if name == "expert_load":
            # 1 is the least it can be: every expert as busy as any other
            axes.axhline(1, color=GRAY, lw=1)
        elif logarithmic:
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
        axes.set_xlabel("tokens, millions")
        axes.set_ylabel(label)
        if len(curves[name]) > 1:
            axes.legend(fontsize=8)
    return figure

"""The files of a release -> what its card may say. Nothing on a card is typed by hand.

config.json, metrics.json, training.json, features.json     beside each SAE
model.safetensors                                           only its statistics are read
geometry.json                                               beside an SAE
comparison.json                                             beside an SAE, or at the top
*.png                                                       beside these, or in figures/
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.hub.layout import (
    COMPARISON,
    DESCRIPTIONS,
    FIGURES,
    GEOMETRY,
    METRICS,
    NOTES,
    read_json,
    saes_in,
)

CAPTIONS = {
    "flops_fvu": "Operations per token against FVU; the stepped line joins SAEs that no other with "
    "as many active features beats",
    "l0_fvu": "Active features per token against FVU",
    "l0_ce_recovered": "Active features per token against cross entropy recovered",
    "duplicates": "Share of features, and of activations, with a neighbor above a cosine, against "
    "random vectors",
    "similarity": "Mean largest decoder cosine from the features of one expert to those of another",
    "alignment": "Cosines of encoder rows with the router's rows of their own and of other experts",
    "maps": "t-SNE of encoder rows and of decoder rows, with a color and a marker for each expert",
    "load": "Share of each expert",
    "density": "Histogram of features' firing rates",
    "training": "FVU, dead features and balance of experts over training",
}
"""Figure -> what it shows, in words for those who can't see it."""

_OPTIONAL = dict.fromkeys(("hookpoint", "base_model", "base_model_revision", "k", "source"))
"""Fields that a card asks for and a config may be without."""


@dataclass(frozen=True)
class Facts:
    """What is known of one SAE of a release; without a config, of all of them together."""

    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    """Numbers only."""
    measured_on: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)
    """statistics_tokens, residual_norm, outlier_norm if it is finite, and the median_max and
    largest_max of the features' largest activations; empty if the SAE is not calibrated."""
    geometry: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    """Name -> path within the release."""
    example: tuple[int, str] | None = None
    """A feature, and the words that it fires on most strongly."""


def facts_of(folder: Path) -> dict[str, Facts]:
    """Subfolder -> what is known of the SAE in it.

    Raises:
        SwitchSAEError: a file is damaged.
    """
    return {place: _facts(folder, place, config) for place, config in saes_in(folder).items()}


def facts_over_all(folder: Path) -> Facts:
    """What is at the top of a release, for all its SAEs: a comparison, and its figures."""
    return Facts(comparison=_of_format_1(folder / COMPARISON), figures=_figures(folder, folder))


def _facts(folder: Path, place: str, config: dict[str, Any]) -> Facts:
    own = folder / place
    measured = read_json(own / METRICS)
    metrics = measured or config.get("metrics") or {}
    return Facts(
        # None for what a config lacks: the template stops at a missing name
        config={**_OPTIONAL, **config},
        metrics={
            name: value
            # the template formats numbers, and to Python a bool is an int
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
        measured_on=measured.get("measured_on") or {},
        run=read_json(own / NOTES),
        statistics=_statistics(own),
        geometry=_of_format_1(own / GEOMETRY),
        # what is at the top is shown once, by `facts_over_all`
        comparison=_of_format_1(own / COMPARISON) if place else {},
        figures=_figures(folder, own) if place else {},
        example=_example(read_json(own / DESCRIPTIONS)),
    )


def _example(words_of: dict[str, Any]) -> tuple[int, str] | None:
    """A feature that tells a reader something, if there is one: several words, all of them real."""
    described = [each for each in words_of if each.isdecimal() and words_of[each]]
    telling = (
        each
        for each in described
        if len(words_of[each]) > 1 and all(map(_is_a_word, words_of[each]))
    )
    feature = next(telling, next(iter(described), None))
    return None if feature is None else (int(feature), " ".join(words_of[feature]))


def _is_a_word(text: str) -> bool:
    """Whether a token may be a whole word, not a sign or a number."""
    return len(text) > 2 and text.isalpha()


def _of_format_1(file: Path) -> dict[str, Any]:
    held = read_json(file)
    if held and held.get("format") != 1:
        raise SwitchSAEError(
            f"{file} is of format {held.get('format')!r}, not 1: write it again, or remove it."
        )
    return held


def _figures(folder: Path, own: Path) -> dict[str, str]:
    """Figure -> path of its PNG within the release; the Hub shows no SVG."""
    found = {}
    for name in CAPTIONS:
        for file in (own / FIGURES / f"{name}.png", own / f"{name}.png"):
            if file.is_file():
                found[name] = file.relative_to(folder).as_posix()
                break
    return found


def _statistics(own: Path) -> dict[str, float]:
    """The statistics stored with an SAE's weights, as a card shows them."""
    found: dict[str, torch.Tensor] = {}
    names = ("statistics_tokens", "residual_norm", "outlier_norm", "feature_max")
    # a large SAE is saved in several files, and each statistic is in one of them
    for file in sorted(own.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                there = set(tensors.keys())
                found |= {name: tensors.get_tensor(name) for name in names if name in there}
        except (SafetensorError, OSError) as err:
            raise SwitchSAEError(f"{file} can't be read: {err}") from err
    # over 0 tokens the others are only what they were initialized with
    if set(names) - found.keys() or not int(found["statistics_tokens"]):
        return {}
    # features that never fired have a largest activation of 0, which would hide the median
    strengths = found.pop("feature_max").float()
    numbers = {name: float(value) for name, value in found.items()}
    if numbers["outlier_norm"] == float("inf"):  # no bound: nothing to show
        del numbers["outlier_norm"]
    fired = strengths[strengths > 0]
    if len(fired):
        numbers |= {"median_max": float(fired.median()), "largest_max": float(fired.max())}
    return numbers

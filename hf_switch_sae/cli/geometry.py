"""`hf-switch-sae geometry`: how an SAE's features lie to one another, in numbers and pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_switch_sae import plots
from hf_switch_sae.cli.loading import load_sae
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.geometry.measure import measure_geometry
from hf_switch_sae.hub.layout import FIGURES, NOTES, read_json


def geometry(
    sae: Annotated[str, typer.Argument(help="Hub id or folder of the SAE.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder to write into; by default the SAE's own.")
    ] = None,
    subfolder: Annotated[str, typer.Option(help="Where the SAE lies in its repository.")] = "",
    threshold: Annotated[float, typer.Option(help="Cosine above which two are duplicates.")] = 0.9,
    pairs: Annotated[int, typer.Option(min=0, help="Pairs to list, at most.")] = 100,
    maps: Annotated[bool, typer.Option(help="Draw t-SNE maps, which take the longest.")] = True,
    map_features: Annotated[int, typer.Option(min=8, help="Features on a map, at most.")] = 4096,
    figures: Annotated[bool, typer.Option(help="Draw figures.")] = True,
    seed: Annotated[int, typer.Option(help="Of random vectors, sample and t-SNE.")] = 0,
) -> None:
    """Measure duplicates, similarity of experts and clusters; writes geometry.json and figures."""
    own = Path(sae) / subfolder
    if to is None and not own.is_dir():
        raise SwitchSAEError(f"{sae} is no folder here: say where to write with --to FOLDER.")
    figures = figures and plots.can_draw(_tell)
    folder = own if to is None else to
    switch_sae = load_sae(sae, subfolder)
    found = measure_geometry(
        switch_sae,
        threshold=threshold,
        listed_pairs=pairs,
        maps=maps,
        map_features=map_features,
        seed=seed,
    )
    files = found.save(folder)
    if figures:
        files += plots.draw_geometry(found, folder / FIGURES, _tell)
        files += plots.draw_sae(
            switch_sae.config.num_experts,
            folder / FIGURES,
            rate=switch_sae.feature_rate if int(switch_sae.statistics_tokens) else None,
            run=read_json(own / NOTES),
            tell=_tell,
        )
    print(table(found.to_dict()))
    print(f"{len(files)} files in {folder}", file=sys.stderr)


def table(shown: dict[str, Any]) -> str:
    """The main figures of a geometry.json."""
    duplicates, nearest = shown["duplicates"], shown["nearest"]
    lines = [f"{'':<24}{'features':>12}{'activations':>13}{'random':>10}"]
    for kind, said in (("any", ""), ("within", ", own expert"), ("between", ", other experts")):
        if duplicates[kind]:
            values = (duplicates[kind][name] for name in ("share", "of_activations", "null"))
            cells = ("-" if value is None else f"{value:.2%}" for value in values)
            lines.append(f"{'duplicates' + said:<24}" + "{:>12}{:>13}{:>10}".format(*cells))
    one = nearest["any"]
    lines.append(
        f"{'nearest cosine, mean':<24}{one['mean']:>12.4f}{'':>13}{one['null_mean']:>10.4f}"
    )
    lines.append(f"pairs above {duplicates['threshold']:g}: {shown['pairs']['count']:,}")
    if shown["router"]:
        own, others = shown["router"]["own"], shown["router"]["others"]
        lines.append(f"encoder row with the router's row: own {own:+.3f}, others {others:+.3f}")
    clusters = shown["clusters"] or {}
    for name, purity in (clusters.get("purity") or {}).items():
        lines.append(
            f"neighbors of the same expert, {name}: {purity['rows']:.1%} of rows, "
            f"{purity['picture']:.1%} in the picture, {clusters['chance']:.1%} by chance"
        )
    return "\n".join(lines)


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)

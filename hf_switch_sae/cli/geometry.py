"""`hf-switch-sae geometry`: how an SAE's features lie to each other, in numbers and pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_switch_sae import plots
from hf_switch_sae.cli.loading import load_sae
from hf_switch_sae.cli.options import SaeAddress, Subfolder
from hf_switch_sae.cli.tables import print_table
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.geometry.measure import measure_geometry
from hf_switch_sae.hub.layout import FIGURES, NOTES, read_json


def geometry(
    sae: SaeAddress,
    to: Annotated[
        Path | None, typer.Option(help="Folder to write into; by default the SAE's own.")
    ] = None,
    subfolder: Subfolder = "",
    threshold: Annotated[
        float, typer.Option(help="Cosine above which two features are duplicates.")
    ] = 0.9,
    pairs: Annotated[int, typer.Option(min=0, help="Most pairs of duplicates to list.")] = 100,
    maps: Annotated[bool, typer.Option(help="Draw t-SNE maps, which takes the longest.")] = True,
    map_features: Annotated[int, typer.Option(min=8, help="Most features on a map.")] = 4096,
    figures: Annotated[bool, typer.Option(help="Draw figures.")] = True,
    seed: Annotated[
        int, typer.Option(help="Seed of the random vectors, the sample and t-SNE.")
    ] = 0,
) -> None:
    """Measure duplicates and clusters of features, and draw them.

    Writes geometry.json, geometry.parquet and figures.
    """
    own = Path(sae) / subfolder
    if to is None and not own.is_dir():
        raise SwitchSAEError(f"{sae} is no folder here: say where to write with --to FOLDER.")
    # asked before the measuring, which takes long
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

    # what calibration and training left beside the SAE is drawn along
    if figures:
        files += plots.draw_geometry(found, folder / FIGURES, _tell)
        files += plots.draw_sae(
            switch_sae.config.num_experts,
            folder / FIGURES,
            rate=switch_sae.feature_rate if int(switch_sae.statistics_tokens) else None,
            run=read_json(own / NOTES),
            tell=_tell,
        )
    _show(found.to_dict())
    print(f"{len(files)} files in {folder}", file=sys.stderr)


def _show(found: dict[str, Any]) -> None:
    """Print the main figures of a geometry.json."""
    duplicates, nearest = found["duplicates"], found["nearest"]["any"]
    rows = []
    for kind, where in (("any", ""), ("within", ", own expert"), ("between", ", other experts")):
        if duplicates[kind]:
            values = (duplicates[kind][name] for name in ("share", "of_activations", "null"))
            cells = ("-" if value is None else f"{value:.2%}" for value in values)
            rows.append([f"duplicates{where}", *cells])
    rows.append(
        ["nearest cosine, mean", f"{nearest['mean']:.4f}", "", f"{nearest['null_mean']:.4f}"]
    )
    print_table(rows, ("", "features", "activations", "random"))

    print(f"pairs above {duplicates['threshold']:g}: {found['pairs']['count']:,}")
    if found["router"]:
        own, others = found["router"]["own"], found["router"]["others"]
        print(f"encoder row with the router's row: own {own:+.3f}, others {others:+.3f}")
    clusters = found["clusters"] or {}
    for name, purity in (clusters.get("purity") or {}).items():
        print(
            f"neighbors of the same expert, {name}: {purity['rows']:.1%} of rows, "
            f"{purity['picture']:.1%} in the picture, {clusters['chance']:.1%} by chance"
        )


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)

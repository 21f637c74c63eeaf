"""`hf-switch-sae card`: the README.md of a release, from its files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.hub.layout import CARD
from hf_switch_sae.release.card import BEGIN, END, is_a_persons, known_repo_id, write_card


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a release.")],
    repo_id: Annotated[
        str | None,
        typer.Option(
            help="Hub id that the snippet loads; by default the card's, else the folder's name."
        ),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="As the Hub names it, such as apache-2.0.")
    ] = None,
) -> None:
    """Write or renew the card of a release from its files.

    The card is README.md. What a person wrote in it is kept.
    """
    if not folder.is_dir():
        raise SwitchSAEError(f"there is no folder {folder}.")
    write_card(folder, repo_id or known_repo_id(folder), license_id)
    print(folder / CARD)
    if is_a_persons(folder):
        print(
            "left as it is: it has no marks of ours, so a person wrote it. Move it away, or put "
            f"{BEGIN} and {END} where our part is to be.",
            file=sys.stderr,
        )

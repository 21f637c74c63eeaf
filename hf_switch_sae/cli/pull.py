"""`hf-switch-sae pull`: fetch a release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.cli.options import Revision
from hf_switch_sae.release.pull import pull as pull_release


def pull(
    repo: Annotated[str, typer.Argument(help="Hub id.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Where to write; by default the repository's name.")
    ] = None,
    revision: Revision = None,
    subfolder: Annotated[str | None, typer.Option(help="Fetch only this SAE.")] = None,
) -> None:
    """Fetch a release from the Hub, byte for byte.

    Prints the revision.
    """
    target = folder or Path(repo.rpartition("/")[2])
    print(pull_release(repo, target, revision=revision, subfolder=subfolder).revision)

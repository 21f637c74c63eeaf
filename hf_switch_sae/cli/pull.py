"""`hf-switch-sae pull`: fetch a release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.release.pull import pull as pull_release


def pull(
    repo: Annotated[str, typer.Argument(help="Hub id.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Where to; by default the repository's name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Only this SAE.")] = None,
) -> None:
    """Fetch a release, byte for byte; prints the revision."""
    target = folder or Path(repo.rpartition("/")[2])
    print(pull_release(repo, target, revision=revision, subfolder=subfolder).revision)

"""`hf-switch-sae push`: publish a release, or a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.hub import push as push_release
from hf_switch_sae.hub import push_recipe
from hf_switch_sae.recipe import Recipe


def push(
    path: Annotated[Path, typer.Argument(help="Folder of a release, or a recipe's .json file.")],
    repo: Annotated[
        str | None, typer.Argument(help="Where to; by default the folder's name, as your own.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private.")
    ] = None,
    branch: Annotated[str, typer.Option(help="Which to commit to.")] = "main",
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    card: Annotated[bool, typer.Option(help="Whether to write a card.")] = True,
) -> None:
    """Publish a release, its card and all, in one commit; prints the revision."""
    repo_id = repo or path.resolve().name
    if path.is_file():
        print(push_recipe(Recipe.load(path), repo_id, path.stem))
        return
    print(
        push_release(
            path, repo_id, private=private, branch=branch, message=message, create_card=card
        )
    )

"""`hf-switch-sae push`: publish a release, or a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import HubError
from hf_switch_sae.release.push import push as push_release
from hf_switch_sae.release.push import push_recipe


def push(
    path: Annotated[Path, typer.Argument(help="Folder of a release, or a recipe's .json file.")],
    repo: Annotated[
        str | None,
        typer.Argument(help="Hub id; by default the folder's name, in your own account."),
    ] = None,
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private.")
    ] = None,
    branch: Annotated[str, typer.Option(help="Branch to commit to.")] = "main",
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    card: Annotated[bool, typer.Option(help="Write or renew the card.")] = True,
) -> None:
    """Publish a release in one commit, or a recipe.

    Prints the revision.
    """
    if not path.exists():
        raise HubError(f"there is no folder or file {path} to push.")
    # a file is a recipe; it joins a repository that is there, so a release's options mean nothing
    if path.is_file():
        if repo is None:
            raise typer.BadParameter(f"say where the recipe goes: push {path} OWNER/REPO")
        of_a_release = {
            "--private": private is not None,
            "--branch": branch != "main",
            "--message": message is not None,
            "--no-card": not card,
        }
        if given := [option for option, is_given in of_a_release.items() if is_given]:
            raise typer.BadParameter(
                f"{', '.join(given)} can't go with a recipe, which is added to a repository that "
                "is there already: leave it out, or push a folder."
            )
        print(push_recipe(Recipe.load(path), repo, path.stem))
        return
    # resolved, because the folder "." has no name
    repo_id = repo or path.resolve().name
    print(
        push_release(
            path, repo_id, private=private, branch=branch, message=message, create_card=card
        )
    )

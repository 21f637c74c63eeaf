"""A folder with SAEs, a subfolder for each -> a repository on the Hugging Face Hub.

Room   `push` publishes a release, whose files are in `hub/layout`; `push_recipe` adds one recipe.
How    A push is one commit, so a revision is a whole release. Large files are sent one by one
       before it, so a push that was cut off sends only what is missing when it is run again.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import HubError
from hf_switch_sae.hub.errors import plain_hub_errors
from hf_switch_sae.hub.layout import CARD, RECIPES, in_checkpoint, recipe_path, saes_in
from hf_switch_sae.hub.source import check_inside
from hf_switch_sae.release.card import write_card
from hf_switch_sae.sae.model import SwitchSAE

_NEVER_PUSHED = {"__pycache__"}
# it tells the Hub which files are large
_PUSHED_THOUGH_HIDDEN = {".gitattributes"}


def push(
    release: str | Path | Mapping[str, SwitchSAE],
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str = "main",
    message: str | None = None,
    recipes: Mapping[str, Recipe] | None = None,
    create_card: bool = True,
    token: str | None = None,
) -> str:
    """Publish a release in one commit, and its card with it.

    Hidden files are not sent, and nothing is deleted on the Hub. The card is written into the
    folder, or renewed there (see `render_card`), and checked by the Hub before any file is sent.

    Args:
        release: a folder with SAEs, or SAEs by subfolder (mostly their hookpoints).
        repo_id: the repository, created if it is not there; without an owner, it is your own.
        private: whether a new repository is private; None to let your account decide.
        branch: the branch to commit to, created from main if it is not there.
        message: of the commit.
        recipes: recipes to publish, by name.
        create_card: whether to write or renew the card.
        token: by default the one you are logged in with.

    Returns:
        The commit's id: the revision to load and to quote.

    Raises:
        HubError: the folder has no SAE, a link leads out of it, the card is not valid, or the Hub
            refuses or can't be reached. What was sent is kept for the next try.
    """
    if isinstance(release, Mapping):
        with tempfile.TemporaryDirectory() as staged:
            save_all(release, staged)
            options: dict[str, Any] = {"private": private, "branch": branch, "message": message}
            options |= {"recipes": recipes, "create_card": create_card, "token": token}
            return push(staged, repo_id, **options)
    folder = Path(release)
    if not saes_in(folder):
        raise HubError(f"there is no SAE in {folder}: no config.json of one in it or below.")
    api = HfApi(token=token)
    repo_id = _with_owner(api, repo_id)

    # complete the folder, then look what is in it
    for name, recipe in (recipes or {}).items():
        (folder / RECIPES).mkdir(exist_ok=True)
        recipe.save(folder / recipe_path(name))
    if create_card:
        write_card(folder, repo_id)
    files = files_to_push(folder)
    with plain_hub_errors(repo_id, "push to"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    if CARD in files:
        _validate(files[CARD], repo_id)
    default = f"Release {', '.join(saes_in(folder)) or 'an SAE'}"
    return _commit(api, repo_id, branch, files, message or default)


def _commit(api: HfApi, repo_id: str, branch: str, files: Mapping[str, Path], message: str) -> str:
    """Send files, and commit them together; returns the commit's id."""
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    with plain_hub_errors(repo_id, "push to"), warnings.catch_warnings():
        # geometry.parquet is data, but it belongs to the SAE
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
        for addition in additions:  # the Hub keeps each of them, whatever happens to the next
            api.preupload_lfs_files(repo_id, [addition], revision=branch)
        done = api.create_commit(repo_id, additions, commit_message=message, revision=branch)
    return str(done.oid)


def save_all(saes: Mapping[str, SwitchSAE], folder: str | Path) -> None:
    """Save SAEs side by side, each in the subfolder that is its name.

    Raises:
        ConversionError: a name climbs out of the folder.
    """
    # all names first: a bad one must not leave half of the SAEs in the folder
    names = [check_inside(name, "the name of an SAE") for name in saes]
    for name, sae in zip(names, saes.values(), strict=True):
        sae.save_pretrained(Path(folder) / name)


def push_recipe(recipe: Recipe, repo_id: str, name: str, token: str | None = None) -> str:
    """Publish a recipe as `recipes/<name>.json`; returns the commit's id.

    Raises:
        HubError: the name can't be a file's name, or the Hub refuses or can't be reached.
    """
    path, api = recipe_path(name), HfApi(token=token)
    repo_id = _with_owner(api, repo_id)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.json"
        recipe.save(file)
        with plain_hub_errors(repo_id, "push to"):
            done = api.upload_file(
                path_or_fileobj=file,
                path_in_repo=path,
                repo_id=repo_id,
                commit_message=f"Add {path}",
            )
    return str(done.oid)


def _with_owner(api: HfApi, repo_id: str) -> str:
    """A repository's full name; a name without an owner is the user's own."""
    if "/" in repo_id:
        return repo_id
    # asked only if need be, as it takes a request and a token
    with plain_hub_errors(repo_id, "find out whose"):
        return f"{api.whoami()['name']}/{repo_id}"


def files_to_push(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, sorted.

    Raises:
        HubError: a link leads out of the folder.
    """
    root, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = {part for part in name.parts if part.startswith(".")} - _PUSHED_THOUGH_HIDDEN
        if hidden or _NEVER_PUSHED & set(name.parts) or in_checkpoint(name) or not path.is_file():
            continue
        # it would publish a file that may never have been meant to be public
        if root not in path.resolve().parents:
            raise HubError(f"{path} is a link out of {folder}; put the file itself there.")
        found[name.as_posix()] = path
    return found


def _validate(readme: Path, repo_id: str) -> None:
    with plain_hub_errors(repo_id, "check the card of"):
        try:
            # a request: the Hub knows which licenses and tasks it accepts
            ModelCard.load(readme).validate()
        except (ValueError, yaml.YAMLError) as err:
            raise HubError(f"the card of {repo_id} ({readme}) is not valid: {err}") from err

"""Releases on the Hugging Face Hub: a folder with a subfolder a hookpoint <-> a repository.

    org/repo
    ├── README.md                   the card
    ├── recipes/<name>.json         edits
    └── layers.15.resid_post/       one SAE: config.json, model.safetensors, metrics.json, ...

A push is one commit, so a revision is a whole release. Large files are sent one by one before it:
a push that was cut off sends only what is missing when it is run again.

Beware A pull writes what was pushed and nothing else; the commit it is of lies in the client's own
       `.cache` folder, not in the files.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, snapshot_download

from hf_switch_sae.card import render_card
from hf_switch_sae.convert import llama_scope
from hf_switch_sae.convert.registry import weight_folders
from hf_switch_sae.convert.source import check_inside, open_source
from hf_switch_sae.errors import HubError
from hf_switch_sae.facts import in_checkpoint, saes_in
from hf_switch_sae.files import written_beside
from hf_switch_sae.hub_errors import plain_hub_errors
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.recipe import Recipe

_NEVER_PUSHED = {"__pycache__"}
_PUSHED_THOUGH_HIDDEN = {".gitattributes"}
_TRACKED = Path(".cache", "huggingface", "download")


@dataclass(frozen=True)
class Pulled:
    """A release on this machine."""

    folder: Path
    revision: str
    """The commit."""


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

    Hidden files stay here, and nothing is deleted there. The card is written into the folder if
    there is none; of one with marks (see `card`) the marked part is renewed, and one without is
    left alone. The Hub checks it before anything is sent.

    Args:
        release: a folder with SAEs, or SAEs by subfolder (mostly their hookpoints).
        repo_id: where to; created if it is not there. Without an owner: your own.
        private: whether a new repository is private; None: as your account has it.
        branch: which to commit to; created from main if it is not there.
        message: of the commit.
        recipes: further edits to publish, by name.
        create_card: whether to write a card.
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
    for name, recipe in (recipes or {}).items():
        (folder / "recipes").mkdir(exist_ok=True)
        recipe.save(folder / _recipe_path(name))
    if create_card:
        write_card(folder, repo_id)
    files = _files_to_push(folder)
    with plain_hub_errors(repo_id, "push to"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    if "README.md" in files:
        _validate(files["README.md"], repo_id)
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    with plain_hub_errors(repo_id, "push to"), warnings.catch_warnings():
        # of geometry.parquet, which belongs to the SAE
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
        for addition in additions:  # each is kept by the Hub, whatever happens to the next
            api.preupload_lfs_files(repo_id, [addition], revision=branch)
        done = api.create_commit(
            repo_id,
            additions,
            commit_message=message or f"Release {', '.join(saes_in(folder)) or 'an SAE'}",
            revision=branch,
        )
    return str(done.oid)


def save_all(saes: Mapping[str, SwitchSAE], folder: str | Path) -> None:
    """Save SAEs side by side, each in the subfolder it is named by.

    Raises:
        ConversionError: a name that climbs out of the folder.
    """
    names = [check_inside(name, "the name of an SAE") for name in saes]
    for name, sae in zip(names, saes.values(), strict=True):
        sae.save_pretrained(Path(folder) / name)


def pull(
    repo_id: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> Pulled:
    """Fetch a release, byte for byte as it was pushed.

    A download that is cut off goes on where it stopped; after a pull that failed, files that are
    there whole are not fetched again. Files of an earlier pull into the same folder that this
    revision lacks are removed, unless they were changed since.

    Args:
        repo_id: where from.
        folder: where to.
        revision: branch, tag or commit.
        subfolder: only this SAE, and the files beside it.
        token: by default the one you are logged in with.

    Raises:
        HubError: the repository can't be read, has no such subfolder, a file in it would be
            written outside of the folder, or that is a file.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise HubError(f"{folder} is a file; name a folder to pull {repo_id} into.")
    with plain_hub_errors(repo_id, "pull"):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]
    for name in names:
        if check_outside(name):
            raise HubError(f"{repo_id} has a file {name!r}, outside of its folder; nothing pulled.")
    if subfolder is not None:
        prefix = f"{subfolder.strip('/')}/"
        wanted = [name for name in names if name.startswith(prefix)]
        if not wanted:
            raise HubError(f"{repo_id} has no subfolder {subfolder!r}: {', '.join(names[:8])}.")
        names = [name for name in names if "/" not in name or name in wanted]
    with plain_hub_errors(repo_id, "pull"):
        snapshot_download(
            repo_id, revision=info.sha, local_dir=folder, allow_patterns=names, token=token
        )
    if subfolder is None:
        _remove_left_over(Path(folder), set(names))
    return Pulled(Path(folder), str(info.sha))


def load_all(name: str | Path, revision: str | None = None, **options: Any) -> dict[str, SwitchSAE]:
    """Every SAE of a release, by subfolder ("" for itself), all of one commit.

    Args:
        name: a local folder or a Hub repository, of ours or of another project.
        revision: branch, tag or commit.
        options: further ones of `SwitchSAE.from_pretrained`.

    Raises:
        HubError: there is no SAE, or the repository can't be read.
    """
    known = ("token", "cache_dir", "local_files_only")
    where = {key: options[key] for key in known if key in options}
    source = open_source(name, revision=revision, **where)
    folders = weight_folders(source, most=100_000)
    deeper = llama_scope.WEIGHTS in source.files
    if deeper or source.weight_files(".safetensors", ".pt", ".pth", ".npz"):
        folders = ["", *folders]
    if not folders:
        raise HubError(f"there is no SAE in {name}: no weights in it.")
    commit = {} if source.revision is None else {"revision": source.revision}
    return {
        folder: SwitchSAE.from_pretrained(name, subfolder=folder, **commit, **options)
        for folder in folders
    }


def push_recipe(recipe: Recipe, repo_id: str, name: str, token: str | None = None) -> str:
    """Publish a recipe as `recipes/<name>.json`; returns the commit's id.

    Raises:
        HubError: a name that is no file name, or the Hub refuses or can't be reached.
    """
    path, api = _recipe_path(name), HfApi(token=token)
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


def pull_recipe(
    repo_id: str, name: str, revision: str | None = None, token: str | None = None
) -> Recipe:
    """The recipe that a repository has as `recipes/<name>.json`.

    Raises:
        HubError: there is none, or the repository can't be read.
        EditError: it is no recipe.
    """
    path = _recipe_path(name)
    with plain_hub_errors(repo_id, f"read {path} of"):
        file = hf_hub_download(repo_id, path, revision=revision, token=token)
    return Recipe.load(file)


def check_outside(name: str) -> bool:
    """Whether a file's name in a repository leads out of the folder it is written to."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "" in parts


def _with_owner(api: HfApi, repo_id: str) -> str:
    """A repository's name; without an owner it is the user's own."""
    if "/" in repo_id:
        return repo_id
    with plain_hub_errors(repo_id, "find out whose"):
        return f"{api.whoami()['name']}/{repo_id}"


def _recipe_path(name: str) -> str:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise HubError(f"{name!r} is no name for a recipe: letters, digits, '-', '_' and '.' only.")
    return f"recipes/{name}.json"


def _files_to_push(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, sorted."""
    root, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = {part for part in name.parts if part.startswith(".")} - _PUSHED_THOUGH_HIDDEN
        if hidden or _NEVER_PUSHED & set(name.parts) or in_checkpoint(name) or not path.is_file():
            continue
        if root not in path.resolve().parents:
            raise HubError(f"{path} is a link out of {folder}; put the file itself there.")
        found[name.as_posix()] = path
    return found


def write_card(folder: Path, repo_id: str, license_id: str | None = None) -> None:
    """Write or renew the README.md of a release; see `card.render_card`."""
    card, readme = render_card(folder, repo_id, license_id), folder / "README.md"
    if readme.exists() and readme.read_text(encoding="utf-8") == card:
        return
    with written_beside(readme) as beside:
        beside.write_text(card, encoding="utf-8")


def _validate(readme: Path, repo_id: str) -> None:
    with plain_hub_errors(repo_id, "check the card of"):
        try:
            ModelCard.load(readme).validate()
        except (ValueError, yaml.YAMLError) as err:
            raise HubError(f"the card of {repo_id} ({readme}) is not valid: {err}") from err


def _remove_left_over(folder: Path, names: set[str]) -> None:
    """Remove files that an earlier pull wrote, that are as it wrote them, and not in `names`."""
    tracked = folder / _TRACKED
    for record in _records(tracked):
        name = record.relative_to(tracked).as_posix().removesuffix(".metadata")
        file = folder / name
        if name in names or not file.is_file():
            continue
        _, etag, *_ = record.read_text(encoding="utf-8").splitlines()
        if etag in _etags(file):
            file.unlink()
            record.unlink()
            if not any(file.parent.iterdir()):
                file.parent.rmdir()


def _records(tracked: Path) -> Iterable[Path]:
    return sorted(tracked.rglob("*.metadata")) if tracked.is_dir() else ()


def _etags(file: Path) -> tuple[str, str]:
    """What the Hub calls this content: as a large file, and as a small one."""
    data = file.read_bytes()
    blob = b"blob %d\0" % len(data) + data
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(blob).hexdigest()

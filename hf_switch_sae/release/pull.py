"""A repository on the Hub -> a folder, byte for byte.

Beware A pull writes what was pushed and nothing else; the commit it is of lies in the client's own
       `.cache` folder, not in the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import HubError
from hf_switch_sae.hub.errors import plain_hub_errors
from hf_switch_sae.hub.layout import recipe_path

_TRACKED = Path(".cache", "huggingface", "download")


@dataclass(frozen=True)
class Pulled:
    """A release on this machine."""

    folder: Path
    revision: str
    """The commit."""


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


def pull_recipe(
    repo_id: str, name: str, revision: str | None = None, token: str | None = None
) -> Recipe:
    """The recipe that a repository has as `recipes/<name>.json`.

    Raises:
        HubError: there is none, or the repository can't be read.
        EditError: it is no recipe.
    """
    path = recipe_path(name)
    with plain_hub_errors(repo_id, f"read {path} of"):
        file = hf_hub_download(repo_id, path, revision=revision, token=token)
    return Recipe.load(file)


def check_outside(name: str) -> bool:
    """Whether a file's name in a repository leads out of the folder it is written to."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "" in parts


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

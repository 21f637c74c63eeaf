"""A repository on the Hub -> a folder, byte for byte.

Room   `pull` fetches a release, `pull_recipe` one recipe of it.
Beware A pull writes what was pushed and nothing else; which commit it is stands in the client's own
       `.cache` folder, not in the files. Files that an earlier pull wrote and the new revision
       lacks are found by the client's records there, whose format is private to it: no public
       function tells what was downloaded into a folder. `HfApi.verify_repo_checksums` lists what
       is too much, but the user's own files among it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import HubError
from hf_switch_sae.hub.errors import plain_hub_errors
from hf_switch_sae.hub.layout import recipe_path

_RECORDS = Path(".cache", "huggingface", "download")


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

    A download that is cut off goes on where it stopped, and a pull that failed does not fetch again
    what it already has whole. Files of an earlier pull into the same folder that this revision
    lacks are removed, unless they were changed since.

    Args:
        repo_id: the repository.
        folder: where to write.
        revision: branch, tag or commit.
        subfolder: only this SAE, and the files at the top of the release.
        token: by default the one you are logged in with.

    Raises:
        HubError: the repository can't be read, it has no such subfolder, one of its files would be
            written outside of the folder, or the folder is a file.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise HubError(f"{folder} is a file; name a folder to pull {repo_id} into.")

    # settle the commit and the files, and refuse what climbs out, before anything is written
    with plain_hub_errors(repo_id, "pull"):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]
    for name in names:
        if is_outside(name):
            raise HubError(f"{repo_id} has a file {name!r}, outside of its folder; nothing pulled.")
    if subfolder is not None:
        prefix = f"{subfolder.strip('/')}/"
        wanted = [name for name in names if name.startswith(prefix)]
        if not wanted:
            raise HubError(f"{repo_id} has no subfolder {subfolder!r}: {', '.join(names[:8])}.")
        names = [name for name in names if "/" not in name or name in wanted]

    with plain_hub_errors(repo_id, "pull"):
        # at the commit whose names were checked: the branch may have moved on
        snapshot_download(
            repo_id, revision=info.sha, local_dir=folder, allow_patterns=names, token=token
        )
    # a part of a release does not tell which of the other files are still in it
    if subfolder is None:
        _remove_files_of_earlier_pulls(Path(folder), keep=set(names))
    return Pulled(Path(folder), str(info.sha))


def pull_recipe(
    repo_id: str, name: str, revision: str | None = None, token: str | None = None
) -> Recipe:
    """The recipe that a repository keeps as `recipes/<name>.json`.

    Raises:
        HubError: there is none, or the repository can't be read.
        EditError: the file is not a recipe.
    """
    path = recipe_path(name)
    with plain_hub_errors(repo_id, f"read {path} of"):
        file = hf_hub_download(repo_id, path, revision=revision, token=token)
    return Recipe.load(file)


def is_outside(name: str) -> bool:
    """Whether a file's name in a repository leads out of the folder it is written to."""
    # Windows has ways out of its own: backslashes, and drives (C:)
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "" in parts


def _remove_files_of_earlier_pulls(folder: Path, keep: set[str]) -> None:
    """Remove what an earlier pull wrote and nobody changed since, but for the files to keep."""
    for record in _records(folder / _RECORDS):
        name = record.relative_to(folder / _RECORDS).as_posix().removesuffix(".metadata")
        file = folder / name
        if name in keep or not file.is_file():
            continue
        # the client's three lines: commit, etag, time
        _, etag, *_ = record.read_text(encoding="utf-8").splitlines()
        # with any other content it was changed since, and is the user's
        if etag in _etags(file):
            file.unlink()
            record.unlink()
            if not any(file.parent.iterdir()):
                file.parent.rmdir()


def _records(folder: Path) -> Iterable[Path]:
    return sorted(folder.rglob("*.metadata")) if folder.is_dir() else ()


def _etags(file: Path) -> tuple[str, str]:
    """What the Hub calls this content if it is a large file, and if it is a small one."""
    with file.open("rb") as stream:
        large = sha_fileobj(stream).hex()
    return large, git_hash(file.read_bytes())

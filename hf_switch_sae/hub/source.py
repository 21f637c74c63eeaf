"""The address of a checkpoint -> its files, fetched one by one as a format asks for them.

A source is a local folder, a single file in one, or a folder in a Hub repository at one commit.
That commit is settled before the first file is fetched, and provenance records it.

Beware Strangers wrote the names of files on the Hub: one that climbs out of its folder is refused
       before it reaches the file system.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name

from hf_switch_sae.errors import ConversionError, HubError
from hf_switch_sae.hub.errors import plain_hub_errors
from hf_switch_sae.hub.layout import LLAMA_SCOPE_WEIGHTS, WEIGHTS, in_checkpoint
from hf_switch_sae.hub.tensors import Tensors, read_tensors, strings_in

SOURCE_KEYWORDS = (
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
)
"""The arguments of `open_source` that say where to look."""
_BLOCK = 2**18
"""Bytes that a request for a part of a file on the Hub fetches."""


@dataclass(frozen=True)
class Source:
    """The files of one checkpoint.

    Args:
        name: folder or Hub repository, as the user wrote it.
        subfolder: the folder within it, "" for the top.
        files: names within the subfolder; only one, if a single file was asked for.
        revision: the commit; None for a local folder.
        hub: keywords of `hf_hub_download`; None for a local folder.
    """

    name: str
    subfolder: str
    files: tuple[str, ...]
    revision: str | None = None
    hub: dict[str, Any] | None = None
    _held: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def where(self) -> str:
        """The whole address; some formats keep the layer or k in it."""
        name = self.name if self.hub is not None else str(Path(self.name).absolute())
        return "/".join(part for part in (name, self.subfolder) if part)

    @property
    def folder_name(self) -> str:
        """The last folder of the address; in a repository of many SAEs, it names the hookpoint."""
        return self.where.rstrip("/").rpartition("/")[2]

    def path(self, file: str) -> Path:
        """A file of the source on this machine, downloaded if need be.

        Raises:
            HubError: the download failed.
        """
        if self.hub is None:
            return Path(self.name, self.subfolder, file)
        inside = self._inside(file)
        with plain_hub_errors(self.name, f"download {inside} of"):
            return Path(hf_hub_download(self.name, inside, revision=self.revision, **self.hub))

    def _inside(self, file: str) -> str:
        """The path of a file within the repository."""
        return f"{self.subfolder}/{file}" if self.subfolder else file

    @contextmanager
    def opened(self, file: str) -> Iterator[BinaryIO]:
        """A file to read parts of; from the Hub, only blocks that hold these parts are fetched.

        Raises:
            HubError: it can't be read.
        """
        # HfFileSystem does not know the cache: it would ask the Hub all the same
        if self.hub is None or self.hub.get("local_files_only"):
            with self.path(file).open("rb") as stream:
                yield stream
            return
        inside = self._inside(file)
        with plain_hub_errors(self.name, f"read {inside} of"):
            hub = HfFileSystem(token=self.hub.get("token"))
            path = f"{self.name}@{self.revision}/{inside}"
            # whole blocks: each request costs more time than the bytes that come along
            with hub.open(path, "rb", block_size=_BLOCK, cache_type="blockcache") as stream:
                yield cast(BinaryIO, stream)

    def within(self, folder: str) -> Source:
        """A folder of this source as a source of its own, at the same commit.

        It asks the Hub for nothing.
        """
        _, files = _under(folder, list(self.files), self.name)
        inner = "/".join(part for part in (self.subfolder, folder) if part)
        # a cache of its own, as files are held by their names within the folder
        return replace(self, subfolder=inner, files=files, _held={})

    def names(self, file: str) -> frozenset[str]:
        """The strings in a .pt file, among them the names of its tensors.

        The tensors are not read, except in a file from before torch 1.6.

        Raises:
            ConversionError: the file is damaged, or holds code.
        """
        key = f"names in {file}"
        if key not in self._held:
            with self.opened(file) as stream:
                found = strings_in(stream)
            self._held[key] = frozenset(self.tensors(file).held) if found is None else found
        names: frozenset[str] = self._held[key]
        return names

    def json(self, file: str) -> dict[str, Any]:
        """The object in a JSON file; {} if there is no such file.

        Raises:
            ConversionError: the file holds something else.
        """
        if file not in self.files:
            return {}
        if file not in self._held:
            try:
                value = json.loads(self.path(file).read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as err:
                raise ConversionError(f"{file} of {self.where} is no JSON: {err}") from None
            if not isinstance(value, dict):
                raise ConversionError(f"{file} of {self.where} is no JSON object.")
            self._held[file] = value
        # a copy, as callers take entries out of it
        return dict(self._held[file])

    def section(self, file: str, name: str) -> dict[str, Any]:
        """The object under a name in a JSON file; {} if there is no such file, or no such name.

        Raises:
            ConversionError: there is something else under that name.
        """
        value = self.json(file).get(name) or {}
        if not isinstance(value, dict):
            raise ConversionError(f"{name!r} in {file} of {self.where} is no JSON object.")
        return value

    def tensors(self, file: str) -> Tensors:
        """The tensors of a weights file, which is read only once.

        Raises:
            ConversionError: it is not there, or it is refused (see `read_tensors`).
        """
        if file not in self.files:
            raise ConversionError(f"{self.where} has no file {file!r}: {', '.join(self.files)}.")
        if file not in self._held:
            self._held[file] = read_tensors(self.path(file))
        return Tensors(self._held[file], f"{self.where}/{file}")

    def folders(self) -> list[str]:
        """Folders with weights in them, sorted; "" is the source's own.

        A run's checkpoints are left out, unless there is nothing else.
        """
        found = sorted({_sae_folder(file) for file in self.files if file.endswith(WEIGHTS)})
        return [folder for folder in found if not in_checkpoint(Path(folder))] or found

    def weight_files(self, *suffixes: str) -> list[str]:
        """Files with one of these endings, directly in this folder."""
        return [name for name in self.files if name.endswith(suffixes) and "/" not in name]

    def provenance(self) -> dict[str, Any]:
        """What `SwitchSAEConfig.source` records of this source."""
        if self.hub is None:
            return {"folder": self.folder_name}  # the rest of the path is nobody else's business
        known = {"repo": self.name, "revision": self.revision, "path": self.subfolder}
        return {key: value for key, value in known.items() if value}


def open_source(
    name: str | Path,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    whole: bool = False,
) -> Source:
    """List the files of a checkpoint, without reading any.

    Args:
        name: a local folder or file, or a Hub repository.
        subfolder: a folder in it, or a single file.
        revision: branch, tag or commit of a repository; its commit is settled here.
        token, cache_dir, force_download, local_files_only: as in `hf_hub_download`.
        whole: ignore the subfolder, to see what else there is.

    Raises:
        ConversionError: there is no such folder, or a path climbs out of it.
        HubError: the repository can't be listed.
    """
    subfolder = "" if whole else check_inside(subfolder, "subfolder")

    # a local path goes before a repository of the same name
    local = Path(name)
    if local.is_file():
        return Source(str(local.parent), "", (local.name,))
    if local.is_dir():
        everything = [p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()]
        return Source(str(name), *_under(subfolder, everything, str(name)))
    # no repository is called that, so the Hub need not be asked
    if local.is_absolute() or str(name).startswith("."):
        raise ConversionError(f"there is no folder {name}.")

    # on the Hub: all files and the commit in one request, or from the cache without any
    hub = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
    if local_files_only or constants.is_offline_mode():
        commit, everything = _cached(str(name), revision or "main", cache_dir)
        hub["local_files_only"] = True
    else:
        with plain_hub_errors(str(name), "list"):
            info = HfApi(token=token).model_info(str(name), revision=revision)
        commit, everything = info.sha, [file.rfilename for file in info.siblings or ()]
    return Source(str(name), *_under(subfolder, everything, str(name)), commit, hub)


def check_inside(path: str, what: str) -> str:
    """A relative path, tidied.

    Raises:
        ConversionError: it climbs out of the folder that it is relative to.
    """
    pure = PurePosixPath(path.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or (pure.parts and ":" in pure.parts[0]):
        raise ConversionError(f"{what}={path!r} climbs out of its folder, so it was refused.")
    return "" if str(pure) == "." else str(pure)


def _sae_folder(weights: str) -> str:
    """The folder of the SAE that a weights file belongs to."""
    # Llama Scope's weights lie a folder below its config, and the config's folder is the SAE's
    above = weights.removesuffix(LLAMA_SCOPE_WEIGHTS)
    is_whole = above == "" or above.endswith("/")
    return (above if is_whole else weights).rpartition("/")[0]


def _under(subfolder: str, everything: list[str], name: str) -> tuple[str, tuple[str, ...]]:
    """The folder and the files in it, for a subfolder or for a single file."""
    # all of them, before any is opened or downloaded
    for file in everything:
        check_inside(file, f"a file of {name}")
    if subfolder in everything:
        folder, _, file = subfolder.rpartition("/")
        return folder, (file,)
    prefix = f"{subfolder}/" if subfolder else ""
    files = [file[len(prefix) :] for file in everything if file.startswith(prefix)]
    return subfolder, tuple(sorted(files))


def _cached(name: str, revision: str, cache_dir: str | Path | None) -> tuple[str | None, list[str]]:
    """The commit of a repository, and its files, as the client's cache has them.

    Raises:
        HubError: the cache has nothing of that revision.
    """
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=name, repo_type="model")
    # a branch or a tag has a file with its commit in it; a full commit id has none
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        raise HubError(
            f"could not list {name}: the Hub is offline, and the cache has nothing of revision "
            f"{revision!r}. Load it once while online."
        )
    return commit, [
        path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()
    ]


def listed_folders(source: Source, most: int = 12) -> str:
    """The folders of a source that have weights, for an error message; "" if there are none."""
    found = [folder for folder in source.folders() if folder]
    return ", ".join(found[:most] + ["..."] * (len(found) > most))

"""Writing to disk so that a file or folder is there whole, or not at all.

Room   `written_beside` (a file or a folder), `written_whole` (one file, with StoreError for what
       the disk says), `write_json`, `write_once` (the first writer wins), `locked`,
       `remove_leftovers`.
How    Everything is written under a hidden name beside its place, brought to the disk with fsync,
       and renamed.
Beware A process that is killed leaves its unfinished file behind, under a name like `LEFT_OVER`.
       Nothing here reads or publishes those.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from hf_switch_sae.errors import StoreError

LEFT_OVER = re.compile(r"\.tmp-(?P<host>.*)-(?P<process>\d+)-[0-9a-f]{8}")
"""The name of an unfinished file: it says which process on which machine writes it."""


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A hidden path in the folder of `path`; whatever is there when the block ends is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield beside
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder at; it is moved to `path` at the end.

    A file at `path` is replaced; a folder must not be there yet. If the block raises, `path` is as
    it was, and nothing is left beside it.

    Raises:
        OSError: no room, no permission, or a folder that is there already.
    """
    with scratch_beside(path) as beside:
        yield beside
        # the content first: a rename may reach the disk before what it names
        for file in beside.rglob("*") if beside.is_dir() else (beside,):
            if file.is_file():
                sync(file)
        beside.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk, so that they survive a power cut.

    Raises:
        OSError: the disk refuses the file.
    """
    is_folder = path.is_dir()
    try:
        # Windows flushes only files that are open for writing
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not is_folder:  # not every system lets one open a folder
            raise


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors_as_store_errors(path: Path) -> Iterator[None]:
    """Turn an OSError raised while `path` is written into a StoreError that says what to do."""
    try:
        yield
    except OSError as err:
        room = "the disk is full" if err.errno in _NO_ROOM else "the file can't be written"
        raise StoreError(
            f"{path}: {room} ({err.strerror or err}). Nothing that was there has changed; make "
            "room or choose another folder, and run the same call again: it goes on where it was."
        ) from err


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write; it appears at `path` only if the block ends without an error.

    Raises:
        StoreError: no room on the disk, or no permission; `path` is as it was.
    """
    with (
        disk_errors_as_store_errors(path),
        written_beside(path) as beside,
        beside.open("xb") as file,
    ):
        yield file


def write_json(path: Path, content: Any, *, indent: int = 2, **how: Any) -> None:
    """Write `content` as JSON with a newline at its end; a file at `path` is replaced.

    Args:
        path: where.
        content: as of `json.dumps`.
        indent: spaces a level.
        how: other arguments of `json.dumps`.

    Raises:
        OSError: no room or no permission; `path` is as it was.
    """
    text = json.dumps(content, indent=indent, **how)
    with written_beside(path) as beside:
        beside.write_text(f"{text}\n", encoding="utf-8")


def write_once(path: Path, data: bytes) -> None:
    """Write a file unless there is one: of several writers at once the first wins, without a lock.

    Raises:
        OSError: no room or no permission.
    """
    with scratch_beside(path) as beside:
        beside.write_bytes(data)
        sync(beside)
        # not by a rename, which would replace the first writer's file
        try:
            os.link(beside, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            with contextlib.suppress(FileExistsError), path.open("xb") as file:
                file.write(data)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders of this machine's processes that no longer run."""
    for path in folder.glob(".tmp-*"):
        found = LEFT_OVER.fullmatch(path.name)
        # machines may share a folder, and a process id means nothing on another
        if found is None or found["host"] != socket.gethostname():
            continue
        if _is_running(int(found["process"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl+C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock file at `path`; the system releases it if the process is killed.

    Raises:
        StoreError: another process holds it, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        # the file stays: if it were removed, two processes could lock two files of that name
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:  # not a POSIX system, so without a lock
            pass
        except BlockingIOError:
            raise StoreError(
                f"another process is at work in {path.parent}; wait for it to finish."
            ) from None
        yield


_Value = TypeVar("_Value")


def rounded(value: _Value) -> _Value:
    """`value` with each float in it, at any depth, cut to the five digits worth writing down.

    Everything else stays as it is, but tuples become lists, as JSON has them.
    """
    found: Any = value
    if isinstance(value, float):
        found = float(f"{value:.5g}")
    elif isinstance(value, dict):
        found = {name: rounded(each) for name, each in value.items()}
    elif isinstance(value, list | tuple):
        found = [rounded(each) for each in value]
    return found  # type: ignore[no-any-return]

"""What is written stands at its place whole, or not at all: a file or a folder, renamed into it.

Room   place -> a path beside it, for the caller to fill -> fsync -> rename.
Beware A process that is killed leaves what it was writing, under a hidden name (`LEFT_OVER`).
       Nothing here reads or publishes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from hf_switch_sae.errors import StoreError

LEFT_OVER = re.compile(r"\.tmp-(?P<host>.*)-(?P<process>\d+)-[0-9a-f]{8}")
"""The name of what is not yet at its place: the machine and the process that write it."""


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder at; moved there if the block ends well.

    A file that is at `path` already is replaced; a folder must not be there yet. Whatever is raised
    within, `path` is as it was and nothing stays beside it.

    Raises:
        OSError: no room, no permission, or a folder that is there already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield beside
        for file in beside.rglob("*") if beside.is_dir() else (beside,):
            if file.is_file():
                _sync(file, os.O_RDWR)
        beside.replace(path)
        with contextlib.suppress(OSError):  # not every system lets one open a folder
            _sync(path.parent, os.O_RDONLY)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def _sync(path: Path, how: int) -> None:
    """Make it last through a power cut."""
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at `path` only when the block has ended without an error.

    Raises:
        StoreError: no room on the disk, or no permission; whatever stood at `path` still does.
    """
    try:
        with written_beside(path) as beside, beside.open("xb") as file:
            yield file
    except OSError as err:
        room = "the disk is full" if err.errno in _NO_ROOM else "the file can't be written"
        raise StoreError(
            f"{path}: {room} ({err.strerror or err}). Nothing that was there has changed; make "
            "room or choose another folder, and run the same call again: it goes on where it was."
        ) from err


def remove_leftovers(folder: Path) -> None:
    """Remove what writers of this machine left behind that are no longer running."""
    for path in folder.glob(".tmp-*"):
        found = LEFT_OVER.fullmatch(path.name)
        if found is None or found["host"] != socket.gethostname():
            continue
        if not _is_running(int(found["process"])):
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
    """Hold a lock, which the system takes back from a process that is killed.

    Raises:
        StoreError: another process holds it, and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
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


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """To the digits that are worth writing down."""
    return {name: float(f"{value:.5g}") for name, value in figures.items()}

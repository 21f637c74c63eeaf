"""What is written stands at its place whole, or not at all: a file or a folder, renamed into it.

Room   place -> a path beside it, for the caller to fill -> fsync -> rename.
Beware A process that is killed leaves what it was writing, under a hidden name (`LEFT_OVER`).
       Nothing here reads or publishes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

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

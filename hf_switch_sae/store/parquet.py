"""Sealed Parquet files: written whole or not at all, and every byte checked when it is read.

Room   tables -> a sealed Parquet file, and back.
How    Pages carry Parquet's own checksums. Between the last page and the footer stand 12 bytes that
       Parquet readers skip, the seal: b"HFSW", the CRC-32 of all bytes before the seal, and the
       CRC-32 of all bytes after it (both little-endian). So a query checks the footer and the pages
       it reads, and `check_body` checks the rest.
Beware A process that is killed leaves a file whose name starts with ".tmp-". Nobody reads it, and
       the next writer on the same machine removes it.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_switch_sae.errors import StoreError
from hf_switch_sae.files import written_whole

SEAL = struct.Struct("<4sII")
SEAL_MAGIC = b"HFSW"
_TAIL = struct.Struct("<I4s")  # a Parquet file ends with its footer's length and b"PAR1"


class _Sink(io.RawIOBase):
    """A file for pyarrow to write to, which takes the checksum and holds the end back.

    The seal goes before the footer, but its checksum of the body is known only once the footer has
    been written. So from `holding` on, what is written is kept until `seal`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._held, self._crc = file, bytearray(), 0
        self.holding = False
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        self._at += (size := memoryview(data).nbytes)
        if self.holding:
            self._held += data
        else:
            self._crc = zlib.crc32(data, self._crc)
            self._file.write(data)
        return size

    def seal(self) -> None:
        """Write the rest of the body, the seal, and the footer."""
        # the footer's length stands at its end
        # closing the writer may have ended the body too, so the footer need not be all that is held
        length, _ = _TAIL.unpack(self._held[-_TAIL.size :])
        cut = len(self._held) - _TAIL.size - length
        body, footer = bytes(self._held[:cut]), bytes(self._held[cut:])
        self._crc = zlib.crc32(body, self._crc)
        self._file.write(body)
        self._file.write(SEAL.pack(SEAL_MAGIC, self._crc, zlib.crc32(footer)))
        self._file.write(footer)


def write_parquet(
    path: Path,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    row_group: int,
    encodings: Mapping[str, str],
    dictionary: list[str],
    room: int | None = None,
) -> int | None:
    """Write tables as one sealed Parquet file at `path`.

    Args:
        path: where to write; a file that is there is replaced.
        schema: of every table, with the metadata that goes into the footer.
        tables: each is written as row groups of its own.
        row_group: the most rows of a row group.
        encodings: column path -> encoding, for columns that are not in `dictionary`.
        dictionary: columns with few distinct values.
        room: the most bytes the file may take; a larger one is not kept.

    Returns:
        The file's size in bytes, or None if it did not fit into `room`.

    Raises:
        StoreError: no room on the disk, or no permission.
    """
    with contextlib.suppress(_TooLarge), written_whole(path) as file:
        sink = _Sink(file)
        writer = pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=dictionary,
            column_encoding=dict(encodings),
            write_page_checksum=True,
        )
        for table in tables:
            writer.write_table(table, row_group_size=row_group)
        # closing the writer writes the footer
        sink.holding = True
        writer.close()
        sink.seal()
        # the size is known only now; on an error `written_whole` keeps nothing of the file
        if room is not None and file.tell() > room:
            raise _TooLarge
        return file.tell()
    return None


class _TooLarge(Exception):
    """The file does not fit into its room."""


def read_footer(path: Path) -> pq.FileMetaData:
    """Read the footer of a sealed Parquet file and check it.

    Raises:
        StoreError: no such file, one that is cut short or damaged, or not one of a store.
    """
    with reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL.size))
        tail = file.read()
        length, magic = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, b"")
        start = size - _TAIL.size - length - SEAL.size
        if magic != b"PAR1" or start < 0:
            raise _damaged(path, "it is cut short, or no Parquet file")
        file.seek(start)
        name, _, crc = SEAL.unpack(file.read(SEAL.size))
        footer = file.read()
        if name != SEAL_MAGIC:
            raise _damaged(path, "it has no seal, so this package did not write it")
        if zlib.crc32(footer) != crc:
            raise _damaged(path, "the checksum of its footer is wrong")
        # to pyarrow this is a whole file without pages, so it needn't read the disk again
        return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))


def check_body(path: Path) -> None:
    """Read a sealed file from end to end against its checksums.

    Raises:
        StoreError: it is cut short or damaged.
    """
    # the footer first, as its length tells where the body ends
    read_footer(path)
    with reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - _TAIL.size)
        length, _ = _TAIL.unpack(file.read())
        left = size - _TAIL.size - length - SEAL.size
        file.seek(0)
        crc = 0
        while left:
            chunk = file.read(min(left, 1 << 22))
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
        _, wanted, _ = SEAL.unpack(file.read(SEAL.size))
    if crc != wanted:
        raise _damaged(path, "the checksum of its rows is wrong")


def read_row_groups(
    path: Path, footer: pq.FileMetaData, groups: list[int], columns: list[str]
) -> pa.Table:
    """Read columns of some row groups and check their pages.

    Raises:
        StoreError: the file is gone or damaged.
    """
    with reading(path):
        file = pq.ParquetFile(path, metadata=footer, page_checksum_verification=True)
        try:
            return file.read_row_groups(groups, columns=columns, use_threads=False)
        finally:
            file.close()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow or the system raises for a bad file into a StoreError that names it."""
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError:
        raise StoreError(f"{path} is gone: it was deleted or moved while the store is open.") from (
            None
        )
    except (pa.ArrowException, OSError, ValueError, OverflowError) as err:
        # which of these pyarrow raises depends on the bytes that are damaged
        raise _damaged(path, str(err).splitlines()[0][:200] if str(err) else "unreadable") from err


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {why}. Nothing of it was used. Delete this file and run what made "
        "it again: only what it held is computed anew."
    )

"""Documents in a fixed order, from whatever holds text.

Room   files, Hub data sets or lists -> documents numbered from 0, and a note of where they are
       from. Recording and training share it.
Beware A document's number is its row in the data set. Empty and skipped rows count too, so the
       number never changes. A text file is one document; a very long one is cut at a line's end
       into documents of `MAX_CHARACTERS`. Files are identified by name, size, and a hash of their
       first and last MiB, so an edit in the middle of a large file that keeps its size goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hf_switch_sae.errors import TextError

MAX_CHARACTERS = 1 << 20
_HASHED = 1 << 20
_KINDS = {".txt": "text", ".md": "text", ".jsonl": "json lines", ".parquet": "parquet"}


@dataclass(frozen=True)
class Document:
    """One document: its number in the data set, and its text or its token ids."""

    number: int
    text: str | list[int]

    @property
    def size(self) -> int:
        """Roughly how many characters it has; a token id counts as 4."""
        return len(self.text) if isinstance(self.text, str) else 4 * len(self.text)


@dataclass(frozen=True)
class Documents:
    """A data set's documents, in the same order every time they are iterated over.

    Built by `read_documents`. Each iteration starts from the beginning.
    """

    provenance: dict[str, Any]
    """JSON-able: what the documents are, as a store records it."""
    read: Callable[[], Iterator[str | list[int] | None]]
    """Gives the rows, starting with the first."""
    count: int | None = None
    """How many there are, for progress bars: maybe an estimate; None if only reading would tell."""

    def __iter__(self) -> Iterator[Document]:
        for number, text in enumerate(self.read()):
            if not isinstance(text, str | list | None):
                raise TextError(
                    f"document {number} is {type(text).__name__}, not a text or a list of token "
                    "ids: name the column that holds the text."
                )
            # to Python these are token ids 0 and 1; a look at the types, as documents are long
            if isinstance(text, list) and bool in set(map(type, text)):
                raise TextError(f"document {number} holds True or False among its token ids.")
            # a missing text keeps its number, so that later documents keep theirs
            yield Document(number, [] if text is None else text)


def read_documents(
    dataset: Any, *, column: str = "text", split: str = "train", revision: str | None = None
) -> Documents:
    """Read documents from whatever holds text.

    Args:
        dataset: a file (.txt, .md, .jsonl, .parquet), a folder of such files (read in order of
            their names), several of them, the id of a Hub data set ("org/name", or
            "org/name:config"), which is streamed, a `datasets.Dataset` or `IterableDataset`, or a
            list of texts or of lists of token ids.
        column: the column with the text, or with lists of token ids.
        split: the split of a Hub data set.
        revision: the commit, tag or branch of a Hub data set.

    Raises:
        TextError: there is nothing there, the kind of file can't be read, or there is no such
            column or split.
    """
    if isinstance(dataset, Documents):
        return dataset
    # a path or a Hub id; what exists here wins
    if isinstance(dataset, str | os.PathLike):
        path = Path(dataset).expanduser()
        if path.exists():
            return _of_files(_files(path), column)
        if isinstance(dataset, str) and dataset.partition(":")[0].count("/") == 1:
            return _of_hub(dataset, column, split, revision)
        raise TextError(
            f"there is no file or folder {path}, and a Hub data set is named 'org/name'."
        )
    # recognized by what it has, so that `datasets` need not be imported
    if hasattr(dataset, "column_names") and hasattr(dataset, "features"):
        return _of_dataset(dataset, column)
    if isinstance(dataset, dict):
        raise TextError(
            f"this is a dict of splits: pass one of them, as dataset[{next(iter(dataset), '')!r}]."
        )
    # anything else is a list: of files, of texts or of token ids
    rows = list(dataset) if isinstance(dataset, Iterable) else None
    if rows is None:
        raise TextError(f"can't read documents from {type(dataset).__name__}.")
    if rows and all(isinstance(row, os.PathLike) or _is_file(row) for row in rows):
        return _of_files([file for row in rows for file in _files(Path(row))], column)
    rows = [row if isinstance(row, str) else _plain(row) for row in rows]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Documents({"kind": "list", "sha256": digest}, lambda: iter(rows), len(rows))


def _is_file(row: Any) -> bool:
    # cheap tests first: a list may hold millions of texts, and the disk is slow to ask
    return (
        isinstance(row, str)
        and len(row) < 1024
        and "\n" not in row
        and (Path(row).suffix in _KINDS and Path(row).is_file())
    )


def _plain(row: Any) -> Any:
    return row.tolist() if hasattr(row, "tolist") else list(row) if isinstance(row, tuple) else row


# --- files --------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _KINDS)
        if not found:
            raise TextError(f"no {', '.join(_KINDS)} in {path}.")
        return found
    if not path.is_file():
        raise TextError(f"there is no file {path}.")
    if path.suffix not in _KINDS:
        raise TextError(f"can't read {path}: it is none of {', '.join(_KINDS)}.")
    return [path]


def _of_files(files: list[Path], column: str) -> Documents:
    for file in files:
        if file.suffix == ".parquet":
            _check_column(file, column)
        elif file.suffix == ".jsonl":
            next(_read_json_lines(file, column), None)  # a wrong column fails before a long run
    provenance = {
        "kind": "files",
        "column": column,
        "files": [
            # no folder, so that a corpus that was moved is still the same
            {"name": file.name, "bytes": file.stat().st_size, "sha256": _ends_hash(file)}
            for file in files
        ],
    }

    def read() -> Iterator[Any]:
        for file in files:
            yield from _READERS[_KINDS[file.suffix]](file, column)

    return Documents(provenance, read, sum(_COUNTERS[_KINDS[file.suffix]](file) for file in files))


def _ends_hash(file: Path) -> str:
    """SHA-256, in hex, of a file's first and last MiB, so that a corpus is not read twice."""
    with file.open("rb") as data:
        digest = hashlib.sha256(data.read(_HASHED))
        # not back over what was read, so a small file is hashed once
        data.seek(max(data.tell(), file.stat().st_size - _HASHED))
        digest.update(data.read())
    return digest.hexdigest()


def _count_pieces(file: Path) -> int:
    # bytes for characters, which is close enough for a progress bar
    return -(-file.stat().st_size // MAX_CHARACTERS)


def _count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(1 << 20), b""))


def _count_rows(file: Path) -> int:
    return int(pq.read_metadata(file).num_rows)


_COUNTERS = {"text": _count_pieces, "json lines": _count_lines, "parquet": _count_rows}


def _read_text(file: Path, _: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        try:
            while some := lines.readlines(MAX_CHARACTERS):
                yield "".join(some)
        except UnicodeDecodeError as err:
            raise TextError(f"{file} is not UTF-8 text ({err.reason} at {err.start}).") from err


def _read_json_lines(file: Path, column: str) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():  # often there is an empty line at the end
                continue
            try:
                row = json.loads(line)
            except ValueError as err:
                raise TextError(f"{file}, line {number}: no JSON ({err}).") from err
            if not isinstance(row, dict):
                raise TextError(f"{file}, line {number}: no JSON object, but {type(row).__name__}.")
            if column not in row:
                raise TextError(
                    f"{file}, line {number}: no column {column!r}; it has {', '.join(row)}. Name "
                    "the column that holds the text."
                )
            yield row[column]


def _read_parquet(file: Path, column: str) -> Iterator[Any]:
    with pq.ParquetFile(file) as rows:
        # a few rows at a time, as documents may be long
        for batch in rows.iter_batches(batch_size=256, columns=[column]):
            yield from batch[column].to_pylist()


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    "text": _read_text,
    "json lines": _read_json_lines,
    "parquet": _read_parquet,
}


def _check_column(file: Path, column: str) -> None:
    try:
        names = pq.read_schema(file).names
    except (OSError, ValueError) as err:
        raise TextError(f"{file} is no Parquet file: {err}") from err
    if column not in names:
        raise TextError(f"{file} has no column {column!r}; it has {', '.join(names)}.")


# --- data sets ----------------------------------------------------------------------------------


def _of_hub(name: str, column: str, split: str, revision: str | None) -> Documents:
    from datasets import load_dataset

    repo, _, config = name.partition(":")
    try:
        rows = load_dataset(repo, config or None, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, LookupError) as err:
        raise TextError(f"the data set {name!r}, split {split!r}, can't be opened: {err}") from err
    provenance = {"kind": "hub", "name": name, "split": split, "revision": revision}
    return _of_dataset(rows, column, provenance)


def _of_dataset(dataset: Any, column: str, provenance: dict[str, Any] | None = None) -> Documents:
    names = dataset.column_names  # None if a streamed data set does not know them
    if names is not None and column not in names:
        raise TextError(f"this data set has no column {column!r}; it has {', '.join(names)}.")
    known = provenance or {
        "kind": "dataset",
        "name": str(getattr(dataset.info, "dataset_name", None) or ""),
        "split": str(dataset.split or ""),
        "fingerprint": getattr(dataset, "_fingerprint", None),
    }

    def read() -> Iterator[Any]:
        # else images and the like would be decoded with each row
        rows = dataset.select_columns([column]) if names is not None else dataset
        for row in rows:
            yield _plain(row[column])

    count = len(dataset) if hasattr(dataset, "__len__") else None
    return Documents({**known, "column": column}, read, count)

"""Residual streams on disk: harvested once, read by many runs.

Room   LM, hookpoints, text -> a folder -> `cache_reader.CachedActivations`.
Format cache.json: what the rows are and, once the harvest has ended, how many.
       rows-00000000.safetensors, ...: in the order of the text. Each has a tensor [rows, d] named
       after each hookpoint, and `token_ids` [rows] int32. Its metadata has the cursor at which the
       next file's text begins, and the CRC-32 of each tensor's bytes.
How    A file appears only once it is complete, and knows where its text ends. So a resume needs
       nothing but the files: it loses only the rows not yet written, and writes none twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

from hf_switch_sae.activations.cache_files import (
    FORMAT,
    MANIFEST,
    TOKEN_IDS,
    VERSION,
    Shard,
    check_lm,
    crc32,
    lm_notes,
    read_manifest,
    shard_name,
)
from hf_switch_sae.activations.harvest import Harvest, Pass
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.errors import StoreError
from hf_switch_sae.files import (
    disk_errors_as_store_errors,
    locked,
    remove_leftovers,
    write_json,
    written_whole,
)
from hf_switch_sae.ops.precision import name_of
from hf_switch_sae.processes import shows_progress
from hf_switch_sae.text.contexts import Cursor
from hf_switch_sae.text.documents import read_documents


def cache_activations(
    lm: nn.Module,
    hookpoints: int | str | Sequence[int | str],
    dataset: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    settings: ActivationSettings | None = None,
    *,
    column: str = "text",
    split: str = "train",
    revision: str | None = None,
    lm_revision: str | None = None,
    shard_bytes: int = 64 << 20,
    max_rows: int | None = None,
    max_bytes: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Harvest a data set's residual streams into a folder, or continue such a harvest.

    After an interruption the same call continues with the very next row. So does a call with
    larger limits.

    Args:
        lm: in eval mode; see `LiveActivations`.
        hookpoints: layers, hookpoints or module paths; one pass reads them all.
        dataset: anything that `text.read_documents` takes.
        folder: a new folder, or a cache that was begun with the same arguments.
        tokenizer: the model's; not needed for documents of token ids.
        settings: how text becomes rows; `dtype` is "bfloat16" here by default.
        column, split, revision: of the data set, see `text.read_documents`.
        lm_revision: the commit that the LM was loaded from, to note in the cache.
        shard_bytes: the rough size of each file, and the most that an interruption can lose.
        max_rows: stop after the pass of the LM that reaches so many rows.
        max_bytes: stop before the files take more than this.
        progress: whether to show a bar on stderr; by default only if that is a terminal.

    Returns:
        The folder, for `CachedActivations`.

    Raises:
        AttachError, HookpointError, TextError: see `LiveActivations`.
        StoreError: the cache is damaged or of something else, or the disk is full.
    """
    documents = read_documents(dataset, column=column, split=split, revision=revision)
    harvest = Harvest(lm, hookpoints, documents, tokenizer, settings)
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file, and a cache is a folder.")
    # two writers would both continue at the same row
    with locked(path / ".lock", wait=False):
        remove_leftovers(path)
        writer = _Writer(harvest, path, lm_revision, shard_bytes)
        writer.write(max_rows, max_bytes, progress)
    return path


class _Writer:
    """Adds files to a cache until the text ends or a limit is reached."""

    def __init__(
        self, harvest: Harvest, folder: Path, lm_revision: str | None, shard_bytes: int
    ) -> None:
        self._harvest, self._folder = harvest, folder
        self._dtype: torch.dtype = getattr(torch, harvest.settings.dtype or "bfloat16")
        widths = harvest.hidden_size.values()
        self._row_bytes: int = sum(width * self._dtype.itemsize for width in widths) + 4  # its id
        self._shard_rows = max(1, shard_bytes // self._row_bytes)
        made = {
            "format": FORMAT,
            "version": VERSION,
            "lm": lm_notes(harvest.lm, lm_revision),
            # through JSON, so that it compares to what was read back
            **json.loads(json.dumps(harvest.identity())),
            "tokens_per_pass": harvest.tokens_per_pass,
            "dtype": name_of(self._dtype),
            "outlier_norm": harvest.policy.outlier_norm,
        }
        found = read_manifest(folder)
        if found is None:
            self._check_empty()
            self._manifest = made
            self._save()
        else:
            check_lm(folder, found["lm"], harvest.lm, lm_revision)
            self._check_same(found, made)
            self._manifest = found
            # all rows of a cache are chosen by the same bounds, so the first ones measured stay
            harvest.set_outlier_norm(found["outlier_norm"])
        self._shards = Shard.all_in(folder)
        self._rows = sum(shard.rows for shard in self._shards)
        self._bytes = sum(shard.path.stat().st_size for shard in self._shards)

    def write(self, max_rows: int | None, max_bytes: int | None, progress: bool | None) -> None:
        """Write files until a limit or the text's end, then note that the cache is complete."""
        start = self._shards[-1].end if self._shards else Cursor()
        harvest = self._harvest
        stop = None
        # the bar counts rows toward the limit that comes first, if there is one
        rows_to_come = [n for n in (max_rows, max_bytes and max_bytes // self._row_bytes) if n]
        bar = _Bar(min(rows_to_come, default=None), harvest.documents.count, progress)
        with bar, closing(harvest.passes(harvest.contexts(start, epochs=1))) as passes:
            bar.at(self._rows, start)
            held: list[Pass] = []
            count = 0
            while stop is None:
                # limits are looked at before each pass, so a resumed harvest may be done at once
                if max_rows is not None and self._rows + count >= max_rows:
                    stop = "max_rows"
                elif max_bytes is not None and self._bytes_after(count) > max_bytes:
                    stop = "max_bytes"
                elif (found := next(passes, None)) is None:
                    stop = "text"
                else:
                    held.append(self._kept(found))
                    count += len(found.token_ids)
                    bar.at(self._rows + count, found.end)
                # at the end, a shorter file takes the rest
                if count >= self._shard_rows or (stop and count):
                    self._append(held)
                    held, count = [], 0
        if not self._shards:
            raise StoreError(
                f"max_bytes={max_bytes} or max_rows={max_rows} leaves no room for a pass of the "
                f"language model ({harvest.tokens_per_pass:,} tokens of {self._row_bytes:,} bytes)."
            )
        self._manifest["complete"] = {
            "shards": len(self._shards),
            "rows": self._rows,
            "bytes": self._bytes,
            "contexts": self._shards[-1].end.context,
            "stopped_by": stop,
        }
        self._save()

    def _kept(self, found: Pass) -> Pass:
        """A pass's rows on the CPU in the file's dtype, so that nothing larger is held."""
        rows = {name: rows.to("cpu", self._dtype) for name, rows in found.rows.items()}
        return Pass(rows, found.token_ids, found.end)

    def _bytes_after(self, count: int) -> int:
        """Bytes of all files if the next one held `count` rows and one more pass."""
        header = 2048 + 256 * len(self._harvest.hookpoints)  # more than it takes
        return self._bytes + header + (count + self._harvest.tokens_per_pass) * self._row_bytes

    def _append(self, held: list[Pass]) -> None:
        """Write the next file from the passes that are held."""
        tensors = {
            name: torch.cat([each.rows[name] for each in held]) for name in self._harvest.hookpoints
        }
        tensors[TOKEN_IDS] = torch.cat([each.token_ids for each in held]).int()
        notes = {
            "format": FORMAT,
            "end": json.dumps(held[-1].end.to_dict()),
            "crc32": json.dumps({name: crc32(tensor) for name, tensor in tensors.items()}),
        }
        # in memory, as safetensors' own writing to a file is neither whole nor synced
        data = safetensors.torch.save(tensors, notes)
        path = self._folder / shard_name(len(self._shards))
        with written_whole(path) as file:
            file.write(data)
        self._shards.append(Shard(path, len(tensors[TOKEN_IDS]), held[-1].end, {}))
        self._rows += self._shards[-1].rows
        self._bytes += len(data)

    def _save(self) -> None:
        path = self._folder / MANIFEST
        with disk_errors_as_store_errors(path):
            write_json(path, self._manifest, indent=1)

    def _check_empty(self) -> None:
        # hidden files are ours: the lock, and what a killed writer left
        others = [path.name for path in self._folder.iterdir() if not path.name.startswith(".")]
        if others:
            raise StoreError(
                f"{self._folder} holds other things ({', '.join(sorted(others)[:3])}): harvest "
                "into a new folder."
            )

    def _check_same(self, found: dict[str, Any], made: dict[str, Any]) -> None:
        # the model was compared by its weights, and bounds are taken over from the cache
        other = [
            name
            for name in made
            if name not in ("lm", "outlier_norm") and found.get(name) != made[name]
        ]
        if found["lm"]["dtype"] != made["lm"]["dtype"]:
            other.append("the language model's dtype")
        if other:
            raise StoreError(
                f"{self._folder} is a cache of something else: {', '.join(other)} differ. Harvest "
                "into another folder, or with what it was begun with."
            )


class _Bar:
    """A progress bar: rows toward a limit if there is one, else documents."""

    def __init__(self, rows: int | None, documents: int | None, progress: bool | None) -> None:
        disable = not shows_progress(progress)
        self._in_rows = rows is not None
        self._bar = tqdm(
            total=rows if self._in_rows else documents,
            unit="token" if self._in_rows else "doc",
            disable=disable,
        )
        self._begin: tuple[float, int] | None = None  # when and with how many rows it began

    def at(self, rows: int, cursor: Cursor) -> None:
        """Show how far the harvest has come."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = (now, rows)
            # what an earlier run has done counts toward the end, but not toward the speed
            self._bar.initial = rows if self._in_rows else cursor.document
        self._bar.update((rows if self._in_rows else cursor.document) - self._bar.n)
        since, before = self._begin
        if now > since:
            self._bar.set_postfix_str(f"{(rows - before) / (now - since):,.0f} tokens/s")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

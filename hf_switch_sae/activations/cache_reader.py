"""Reads back what `cache_activations` has written: mapped into memory, checked, shuffled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_switch_sae.activations.cache_files import Shard, check_lm, crc32, damaged, read_manifest
from hf_switch_sae.activations.shuffle import default_buffer_bytes
from hf_switch_sae.activations.stored import StoredActivations
from hf_switch_sae.errors import HookpointError, StoreError
from hf_switch_sae.lm.hookpoints import resolve
from hf_switch_sae.lm.names import hookpoint_of


class CachedActivations(StoredActivations):
    """Activations from a folder that `cache_activations` has written.

    Files are mapped into memory and copied a group at a time. The first time a file is read, its
    checksums are verified. Several runs may read one cache at once.

    Args:
        folder: the cache's folder.
        hookpoints: which of the cache's hookpoints, by name, or as layers or module paths of `lm`;
            all by default.
        lm: the language model that the SAE is for, to check that the cache is of it.
        lm_revision: its commit, to check likewise.
        buffer_bytes: memory for shuffling, at most; see `shuffle.default_buffer_bytes`.
        seed: decides the order of rows.

    Raises:
        StoreError: there is no cache, or it is unfinished, damaged or of another format.
        BaseModelError: the cache is of another language model or revision.
        HookpointError: the cache lacks a hookpoint.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        hookpoints: int | str | Sequence[int | str] | None = None,
        *,
        lm: nn.Module | None = None,
        lm_revision: str | None = None,
        buffer_bytes: int | None = None,
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise StoreError(f"{self.folder} is no cache of activations: there is no cache.json.")
        if lm is not None:
            check_lm(self.folder, manifest["lm"], lm, lm_revision)
        elif lm_revision not in (None, manifest["lm"]["revision"]):
            raise StoreError(
                f"{self.folder} is of revision {manifest['lm']['revision']}, not of {lm_revision}."
            )
        self.manifest = manifest
        """The content of cache.json."""
        self.hookpoints = self._names_of(hookpoints, lm)
        self.hidden_size = {name: manifest["hidden_size"][name] for name in self.hookpoints}
        self._shards = self._checked_shards(manifest)
        self._verified: set[int] = set()

        # rows of all chosen hookpoints are held together, so the buffer is divided by their sum
        itemsize = getattr(torch, manifest["dtype"]).itemsize
        self._row_bytes = sum(self.hidden_size.values()) * itemsize
        room = buffer_bytes or default_buffer_bytes(torch.device("cpu"))
        super().__init__(
            [shard.rows for shard in self._shards], max(1, room // self._row_bytes), seed
        )
        if not self.num_rows:
            raise StoreError(f"{self.folder} holds no rows.")

    @property
    def policy(self) -> dict[str, Any]:
        """See `Activations.policy`; it was noted when the cache was harvested."""
        norms = self.manifest["outlier_norm"]
        own = {name: norms[name] for name in self.hookpoints if name in norms}
        return {**self.manifest["policy"], "outlier_norm": own}

    def estimate(self) -> dict[str, Any]:
        """See `Activations.estimate`."""
        found = super().estimate()
        return {
            **found,
            "buffer_bytes": found["buffer_rows"] * self._row_bytes,
            "files": len(self._shards),
            "bytes_on_disk": sum(shard.path.stat().st_size for shard in self._shards),
        }

    def _names_of(
        self, wanted: int | str | Sequence[int | str] | None, lm: nn.Module | None
    ) -> tuple[str, ...]:
        """The names, as the cache has them, of the hookpoints that are asked for."""
        there = tuple(self.manifest["hookpoints"])
        if wanted is None:
            return there
        names = []
        for at in [wanted] if isinstance(wanted, int | str) else wanted:
            # a name is taken as it is; a layer or module path needs the model to be resolved
            name = at if at in there else None
            if name is None and lm is not None:
                name = resolve(lm, at).name
            elif name is None and isinstance(at, int):
                name = hookpoint_of(at)
            if name not in there:
                raise HookpointError(
                    f"{self.folder} has no activations of {at}; it has {', '.join(there)}."
                )
            names.append(str(name))
        return tuple(dict.fromkeys(names))

    def _checked_shards(self, manifest: Mapping[str, Any]) -> list[Shard]:
        complete = manifest.get("complete")
        if complete is None:
            raise StoreError(
                f"{self.folder} is unfinished: its harvest was stopped. Run the same harvest again "
                "and it goes on, or with a max_rows of what is there."
            )
        # files beyond those that `complete` counts are of a harvest that went on and was stopped
        shards = Shard.all_in(self.folder)
        rows = sum(shard.rows for shard in shards)
        if len(shards) < complete["shards"] or rows < complete["rows"]:
            raise StoreError(
                f"{self.folder} lacks files: {complete['shards']} with {complete['rows']:,} rows "
                f"were written, and {len(shards)} with {rows:,} are there. Put them back, or run "
                "the same harvest again: it computes what is missing at the end."
            )
        return shards[: complete["shards"]]

    def _room(self, rows: int) -> dict[str, Tensor]:
        dtype = getattr(torch, self.manifest["dtype"])
        widths = self.hidden_size.items()
        return {n: torch.empty(rows, d, dtype=dtype, device="cpu") for n, d in widths}

    def _load(
        self, pieces: Sequence[int], into: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        rows = sum(self._piece_rows[piece] for piece in pieces)
        memory = self._room(rows) if into is None else into
        found = {name: tensor[:rows] for name, tensor in memory.items()}
        at = 0
        for piece in pieces:
            shard = self._shards[piece]
            try:
                with safe_open(shard.path, "pt") as file:
                    for name, whole in found.items():
                        part = whole[at : at + shard.rows]
                        # the checksum is taken of the copy: what is trained on is what is checked
                        part.copy_(file.get_tensor(name))
                        if piece not in self._verified and crc32(part) != shard.checksums[name]:
                            raise damaged(shard.path, f"the checksum of {name} is wrong")
            except (SafetensorError, OSError, RuntimeError, KeyError) as err:
                if isinstance(err, StoreError):
                    raise
                raise damaged(shard.path, str(err)) from err
            self._verified.add(piece)
            at += shard.rows
        return found

    def _identity(self) -> dict[str, Any]:
        return {
            "hookpoints": list(self.hookpoints),
            "rows": [shard.rows for shard in self._shards],
            "checksums": [shard.checksums[self.hookpoints[0]] for shard in self._shards],
        }

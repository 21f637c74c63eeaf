"""Residual streams that `cache_activations` harvested, read back: mapped, checked, shuffled."""

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

    Files are mapped into memory and copied a group at a time; each is checked against its
    checksums the first time. Several runs may read one cache at once.

    Args:
        folder: of the cache.
        hookpoints: which of the cache's places, by name, or layers and module paths of `lm`; all by
            default.
        lm: the language model that the SAE is for: checked to be the cache's.
        lm_revision: its commit, likewise.
        buffer_bytes: most memory for shuffling; see `shuffle.default_buffer_bytes`.
        seed: of the order of rows.

    Raises:
        StoreError: no cache, an unfinished or damaged one, or one of another format.
        BaseModelError: a cache of another language model or revision.
        HookpointError: a place that the cache does not have.
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
        """What cache.json says."""
        self.hookpoints = self._places(manifest, hookpoints, lm)
        self.hidden_size = {name: manifest["hidden_size"][name] for name in self.hookpoints}
        self._shards = self._checked_shards(manifest)
        self._verified: set[int] = set()
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
        """See `Activations.policy`; as it was when the cache was harvested."""
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

    def _places(
        self,
        manifest: Mapping[str, Any],
        wanted: int | str | Sequence[int | str] | None,
        lm: nn.Module | None,
    ) -> tuple[str, ...]:
        there = tuple(manifest["hookpoints"])
        if wanted is None:
            return there
        places = [wanted] if isinstance(wanted, int | str) else wanted
        names = []
        for at in places:
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
        return {n: torch.empty(rows, d, dtype=dtype) for n, d in self.hidden_size.items()}

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

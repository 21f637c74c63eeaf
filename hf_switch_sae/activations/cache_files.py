"""The files of an activation cache: names, manifest, checksums.

cache.json                      what the rows are; `complete` once the harvest has ended
rows-<number>.safetensors       rows of every hookpoint, and their token ids
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_switch_sae.errors import BaseModelError, StoreError
from hf_switch_sae.lm.config import config_of, name_without_path
from hf_switch_sae.lm.fingerprint import check_base_model, fingerprint
from hf_switch_sae.lm.hookpoints import language_model
from hf_switch_sae.ops.precision import name_of
from hf_switch_sae.text.contexts import Cursor

FORMAT, VERSION = "hf_switch_sae activations", 1
MANIFEST = "cache.json"
TOKEN_IDS = "token_ids"
_REQUIRED = ("lm", "hookpoints", "hidden_size", "dtype", "policy", "outlier_norm")


@dataclass(frozen=True)
class Shard:
    """A file of rows, as its header describes it."""

    path: Path
    rows: int
    end: Cursor
    """Where the text of the next file begins."""
    checksums: dict[str, int]
    """Tensor's name -> CRC-32 of its bytes."""

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read a file's header.

        Raises:
            StoreError: the file is damaged, or not part of a cache.
        """
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                rows = file.get_slice(TOKEN_IDS).get_shape()[0]
            return cls(path, rows, Cursor(**json.loads(notes["end"])), json.loads(notes["crc32"]))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as err:
            raise damaged(path, str(err)) from err

    @classmethod
    def all_in(cls, folder: Path) -> list[Shard]:
        """Every file of a cache, in order.

        Raises:
            StoreError: a file is damaged or missing.
        """
        # rows after a gap would be harvested again by a resume, and be there twice
        paths = sorted(folder.glob("rows-*.safetensors"))
        for number, path in enumerate(paths):
            if path.name != shard_name(number):
                raise StoreError(
                    f"{folder / shard_name(number)} is missing, and {path.name} is there: put it "
                    f"back, or delete {path.name} and those after it and harvest again."
                )
        return [cls.open(path) for path in paths]


def shard_name(number: int) -> str:
    """The name of a cache's file number `number`, counted from 0."""
    return f"rows-{number:08d}.safetensors"


def damaged(path: Path, why: str) -> StoreError:
    """The error for a file that can't be read."""
    return StoreError(
        f"{path} is damaged: {why.splitlines()[0][:200] if why else 'unreadable'}. Delete it and "
        "the files after it, and harvest again: what is before it is kept."
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of cache.json; None if there is no such file.

    Raises:
        StoreError: the file is damaged, or of another format or version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise StoreError(f"{path} can't be read ({err}); it is no cache's, or damaged.") from err
    # the format first: what another program has written need not have a version
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StoreError(f"{path} is not of a cache of activations.")
    if found.get("version") != VERSION:
        raise StoreError(
            f"{folder} is a cache of version {found.get('version')}; this package reads version "
            f"{VERSION}. Harvest it again, or use the package that made it."
        )
    if lacking := [name for name in _REQUIRED if name not in found]:
        raise StoreError(f"{path} is damaged: it does not say {', '.join(lacking)}.")
    return found


def check_lm(folder: Path, noted: dict[str, Any], lm: nn.Module, revision: str | None) -> None:
    """Raise BaseModelError if a cache is known to be of another model or revision."""
    try:
        check_base_model(lm, noted["name"] or None, noted["fingerprint"])
    except BaseModelError as err:
        raise BaseModelError(
            f"{folder} holds activations of another language model "
            f"({noted['name'] or 'without a name'}) than the one given: weights or sizes differ. "
            "Harvest into another folder."
        ) from err
    if None not in (revision, noted["revision"]) and revision != noted["revision"]:
        raise BaseModelError(
            f"{folder} holds activations of revision {noted['revision']} of {noted['name']}, not "
            f"of {revision}. Harvest into another folder."
        )


def lm_notes(lm: nn.Module, revision: str | None) -> dict[str, Any]:
    """JSON-able: what a cache notes about its language model."""
    model = language_model(lm)  # what is around it, such as DDP, has neither name nor dtype
    return {
        "name": name_without_path(getattr(config_of(model), "_name_or_path", "")),
        "revision": revision,
        "dtype": name_of(getattr(model, "dtype", None)),
        "fingerprint": fingerprint(model),
    }


def crc32(tensor: Tensor) -> int:
    """CRC-32 of a CPU tensor's bytes."""
    data: Any = tensor.contiguous().view(torch.uint8).numpy()
    return int(zlib.crc32(data))

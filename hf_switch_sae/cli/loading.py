"""What a command is given by name -> what it works on: an SAE, a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.store import FeatureStore


def split_address(address: str) -> tuple[str, str]:
    """The name and the subfolder of `folder`, `org/repo`, or either with `:subfolder`."""
    # a path that exists may have a colon of its own
    if Path(address).exists() or ":" not in address:
        return address, ""
    name, _, subfolder = address.rpartition(":")
    return name, subfolder


def load_sae(name: str, subfolder: str) -> SwitchSAE:
    """The SAE at an address, on a GPU if there is one.

    Raises:
        SwitchSAEError: there is none.
    """
    try:
        sae = SwitchSAE.from_pretrained(name, subfolder=subfolder)
    except OSError as err:
        place = f"{name}, subfolder {subfolder}" if subfolder else name
        raise SwitchSAEError(f"no SAE at {place}: {err}") from err
    torch.nn.Module.to(sae, "cuda" if torch.cuda.is_available() else "cpu")
    return sae


def load_tokenizer(store: FeatureStore, name: str | None, gguf_file: str | None) -> Any:
    """The tokenizer of a name, by default the one that a store names.

    Args:
        store: of recorded features.
        name: Hub id or folder.
        gguf_file: a GGUF file in there, that holds the tokenizer.

    Raises:
        SwitchSAEError: the store names none, or there is none at that address.
    """
    known = name or (store.provenance.tokenizer or {}).get("name")
    if not known:
        raise SwitchSAEError("the store names no tokenizer: give one with --tokenizer.")
    where = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(known, **where)
    except (OSError, ValueError) as err:
        raise SwitchSAEError(
            f"no tokenizer at {known}: give one with --tokenizer ({err})."
        ) from err

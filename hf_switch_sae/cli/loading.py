"""What commands are given by name -> what they work on: an SAE, an address, a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.sae.model import SwitchSAE


def split_address(address: str) -> tuple[str, str]:
    """`folder` or `org/repo`, either with `:subfolder` -> it and the subfolder."""
    if Path(address).exists() or ":" not in address:
        return address, ""
    name, _, subfolder = address.rpartition(":")
    return name, subfolder


def load_sae(name: str, subfolder: str) -> SwitchSAE:
    """An SAE that a command names, on a GPU if there is one."""
    try:
        sae = SwitchSAE.from_pretrained(name, subfolder=subfolder)
    except OSError as err:
        place = f"{name}, subfolder {subfolder}" if subfolder else name
        raise SwitchSAEError(f"no SAE at {place}: {err}") from err
    torch.nn.Module.to(sae, "cuda" if torch.cuda.is_available() else "cpu")
    return sae

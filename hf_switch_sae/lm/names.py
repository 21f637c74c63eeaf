"""The grammar of hookpoints, `layers.<i>.<site>`: parsed and written here alone.

Layers count from 0. The sites are resid_pre (what a block is given) and resid_post (what it
returns). A place within a block has a module path instead: `model.layers.7.mlp.resid_post`.
"""

from __future__ import annotations

import re
from typing import Literal, cast, get_args

Site = Literal["resid_pre", "resid_post"]
SITES: tuple[Site, ...] = get_args(Site)
_GRAMMAR = re.compile(rf"layers\.(\d+)\.({'|'.join(SITES)})")


def layer_of(hookpoint: str | None) -> tuple[int, Site] | None:
    """(7, "resid_post") of `layers.7.resid_post`; None for a place within a block."""
    match = _GRAMMAR.fullmatch(hookpoint or "")
    return (int(match[1]), cast(Site, match[2])) if match else None


def layer_named(at: int | str) -> int | None:
    """7 of 7, "7", `layers.7` and `layers.7.resid_post`; None for a module path."""
    match = re.fullmatch(rf"(?:layers\.)?(\d+)(?:\.(?:{'|'.join(SITES)}))?", str(at))
    return int(match[1]) if match else None


def hookpoint_of(layer: int | str, site: Site = "resid_post") -> str:
    """`layers.7.resid_post` of 7."""
    return f"layers.{layer}.{site}"

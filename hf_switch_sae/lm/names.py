"""The grammar of hookpoints, "layers.N.resid_pre" and "layers.N.resid_post": parse and write."""

from __future__ import annotations

import re


def layer_of(hookpoint: str | None) -> tuple[int, str] | None:
    """(7, "resid_post") of `layers.7.resid_post`; None for a place within a block."""
    match = re.fullmatch(r"layers\.(\d+)\.(resid_pre|resid_post)", hookpoint or "")
    return (int(match[1]), match[2]) if match else None

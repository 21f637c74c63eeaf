"""Other projects' names for places in a language model -> ours, or None if we can't tell.

Only the ends of a residual block mean the same in every architecture. A name for a part of a block,
such as `hook_mlp_out`, does not say which module that is, so the user is asked for it.
"""

from __future__ import annotations

import re
from typing import cast

from hf_switch_sae.lm.names import Site, hookpoint_of, layer_of


def from_transformer_lens(name: object) -> str | None:
    """`blocks.7.hook_resid_post` -> `layers.7.resid_post`; resid_pre likewise."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post)", str(name))
    return hookpoint_of(match[1], cast(Site, match[2])) if match else None


def to_transformer_lens(hookpoint: str | None) -> str | None:
    """`layers.7.resid_post` -> `blocks.7.hook_resid_post`."""
    found = layer_of(hookpoint)
    return f"blocks.{found[0]}.hook_{found[1]}" if found else None


def from_module_path(name: object) -> str | None:
    """`model.layers.7.output` -> `layers.7.resid_post`; with neither side, the output is meant."""
    match = re.fullmatch(r"([A-Za-z_][\w.]*?)(?:\.(input|output))?", str(name))
    if not match:
        return None
    site: Site = "resid_pre" if match[2] == "input" else "resid_post"
    # by the path's end: multimodal models nest it deeper, as model.language_model.layers.7
    block = re.fullmatch(r"(?:[\w.]*\.)?(?:layers|h)\.(\d+)", match[1])
    return hookpoint_of(block[1], site) if block else f"{match[1]}.{site}"


def from_base_module(name: str) -> str | None:
    """sparsify's names, modules of the base model: `layers.7`, `h.3` or `layers.7.mlp`."""
    # a folder may be called anything: only a number or an embedding makes it a module
    return from_module_path(name) if re.search(r"\.\d+(\.|$)|embed", name) else None


def layer_in(address: str, pattern: str) -> int | None:
    """The number that `pattern` finds in an address; None if it finds none, or several."""
    found = set(re.findall(pattern, address))
    return int(found.pop()) if len(found) == 1 else None

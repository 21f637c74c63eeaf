"""The names of a release's files, and which SAEs a folder holds.

<release>
├── README.md                       the card
├── recipes/<name>.json             edits
└── layers.15.resid_post/           one SAE: config.json, model.safetensors, metrics.json, ...
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_switch_sae.errors import HubError, SwitchSAEError

WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
"""How files of weights end, ours and those of other projects."""
LLAMA_SCOPE_WEIGHTS = "checkpoints/final.safetensors"
"""Where Llama Scope's weights lie, seen from the folder that is their SAE's."""
FIGURES = "figures"
"""The folder that figures are drawn in."""


def recipe_path(name: str) -> str:
    """Where a release keeps a recipe; raises HubError for what can't be a file's name."""
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise HubError(f"{name!r} is no name for a recipe: letters, digits, '-', '_' and '.' only.")
    return f"recipes/{name}.json"


def saes_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Subfolder ("" for itself) -> config, of every SAE of ours in a release, in order of path."""
    found = {}
    for file in sorted(folder.rglob("config.json")):
        if in_checkpoint(file.relative_to(folder)):
            continue
        config = read_json(file)
        if config.get("model_type") == "switch_sae":
            place = file.parent.relative_to(folder).as_posix()
            found["" if place == "." else place] = config
    return found


def in_checkpoint(path: Path) -> bool:
    """Whether a path within a run's folder is of a checkpoint: no part of what is released."""
    return any(re.fullmatch(r"checkpoint-\d+", part) for part in path.parts)


def read_json(file: Path) -> dict[str, Any]:
    """What is in a file; {} if it is not there, or holds no object.

    Raises:
        SwitchSAEError: it is no JSON.
    """
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise SwitchSAEError(f"{file} is no JSON: {err}") from None
    return value if isinstance(value, dict) else {}

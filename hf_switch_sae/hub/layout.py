"""The names of a release's files, and which SAEs a folder holds.

    <release>
    ├── README.md                     the card
    ├── recipes/<name>.json           edits
    ├── comparison.json, figures/     SAEs measured side by side
    └── layers.15.resid_post/         one SAE
        ├── config.json, model.safetensors
        ├── training.json             how it was trained
        ├── metrics.json              what it loses
        ├── features.json             a few words on each feature
        └── geometry.json, geometry.parquet, figures/

Room   Everything that writes a release, or reads one, takes the names from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_switch_sae.errors import HubError, SwitchSAEError

# over all SAEs of a release
CARD = "README.md"
RECIPES = "recipes"
COMPARISON = "comparison.json"
FIGURES = "figures"

# beside each SAE
CONFIG = "config.json"
NOTES = "training.json"
METRICS = "metrics.json"
DESCRIPTIONS = "features.json"
GEOMETRY = "geometry.json"
GEOMETRY_TABLE = "geometry.parquet"

WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
"""The endings of weight files, ours and those of other projects."""
LLAMA_SCOPE_WEIGHTS = "checkpoints/final.safetensors"
"""Where Llama Scope keeps its weights, relative to the folder of the SAE."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""The name of a folder with a checkpoint; the number is the step."""
_MODEL_TYPE = "switch_sae"


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of an SAE of ours, not of another project's."""
    return config.get("model_type") == _MODEL_TYPE


def recipe_path(name: str) -> str:
    """Where a release keeps a recipe; raises HubError if the name can't be a file's name."""
    # no dot in front: a push leaves hidden files out
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise HubError(f"{name!r} is no name for a recipe: letters, digits, '-', '_' and '.' only.")
    return f"{RECIPES}/{name}.json"


def saes_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Subfolder ("" for the folder itself) -> config, of every SAE of ours, ordered by path."""
    found = {}
    for file in sorted(folder.rglob(CONFIG)):
        # relative, as the user may have named a checkpoint itself as the folder
        if in_checkpoint(file.relative_to(folder)):
            continue
        config = read_json(file)
        if is_ours(config):
            place = file.parent.relative_to(folder).as_posix()
            found["" if place == "." else place] = config
    return found


def in_checkpoint(path: Path) -> bool:
    """Whether a path within a run's folder belongs to a checkpoint, which is not released."""
    return any(CHECKPOINT.fullmatch(part) for part in path.parts)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file, or something else in it.

    Raises:
        SwitchSAEError: the file is not JSON.
    """
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise SwitchSAEError(f"{file} is no JSON: {err}") from None
    return value if isinstance(value, dict) else {}

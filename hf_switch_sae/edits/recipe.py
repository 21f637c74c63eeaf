"""Edits together with the SAE they are meant for, in a file that is published beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_switch_sae.edits.kinds import Edit, edit_from_dict
from hf_switch_sae.errors import EditError
from hf_switch_sae.files import write_json
from hf_switch_sae.sae.config import SwitchSAEConfig


@dataclass(frozen=True)
class Recipe:
    """Edits with the SAE they are meant for, saved as a JSON file of a few lines.

    Args:
        sae: Hub id or folder of the SAE.
        edits: in any order.
        revision: commit of the SAE's repository.
        hookpoint: where to edit, if not at the SAE's own hookpoint.
    """

    sae: str
    edits: tuple[Edit, ...]
    revision: str | None = None
    hookpoint: str | None = None

    @classmethod
    def of(cls, config: SwitchSAEConfig, *edits: Edit) -> Recipe:
        """Edits for a loaded SAE with this config, pinned to the commit it was loaded at.

        Raises:
            EditError: the SAE was made here, so it has no address.
        """
        # the Hub if it came from there, else the folder it was loaded from
        source = config.source or {}
        name = source.get("repo") or config._name_or_path or source.get("folder")
        if not name:
            raise EditError("this SAE has no address: name one, Recipe(sae=..., edits=...).")
        return cls(name, edits, source.get("revision"), config.hookpoint)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able, without fields that are not set."""
        named = {"sae": self.sae, "revision": self.revision, "hookpoint": self.hookpoint}
        return {
            **{k: v for k, v in named.items() if v is not None},
            "edits": [edit.to_dict() for edit in self.edits],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; a file that is there already is replaced."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            EditError: the file is not a recipe, or one of its edits is malformed.
        """
        # whatever a malformed file raises becomes one error that names it
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise TypeError(f"it holds a {type(data).__name__}")
            edits = tuple(edit_from_dict(edit) for edit in data.pop("edits"))
            return cls(edits=edits, **data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as err:
            raise EditError(
                f"{path} is not a recipe ({err}); it needs at least 'sae' and 'edits'."
            ) from None

    def diff(self, other: Recipe) -> list[str]:
        """The lines in which two recipes differ: "- " for this one's, "+ " for the other's."""
        here, there = _lines(self), _lines(other)
        return [f"- {line}" for line in here if line not in there] + [
            f"+ {line}" for line in there if line not in here
        ]


def _lines(recipe: Recipe) -> list[str]:
    data = recipe.to_dict()
    edits = data.pop("edits")
    # an edit a line, so that `diff` shows just those that changed
    return [f"{name}: {value}" for name, value in data.items()] + [
        json.dumps(edit) for edit in edits
    ]

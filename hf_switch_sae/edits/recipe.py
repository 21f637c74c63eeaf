"""Edits together with the SAE they are meant for: a file that is kept and published beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_switch_sae.edits.kinds import Edit, edit_from_dict
from hf_switch_sae.errors import EditError
from hf_switch_sae.files import written_beside
from hf_switch_sae.sae.config import SwitchSAEConfig


@dataclass(frozen=True)
class Recipe:
    """Edits with the SAE they are meant for: a JSON of a few lines, published next to the SAE.

    Args:
        sae: Hub id or folder of the SAE.
        edits: in any order.
        revision: commit of the SAE's repository.
        hookpoint: the place, if it is not the SAE's own.
    """

    sae: str
    edits: tuple[Edit, ...]
    revision: str | None = None
    hookpoint: str | None = None

    @classmethod
    def of(cls, config: SwitchSAEConfig, *edits: Edit) -> Recipe:
        """Edits for a loaded SAE, pinned to the commit it was loaded at; `config` is the SAE's.

        Raises:
            EditError: the SAE was made or loaded here, so it has no address to name.
        """
        source = config.source or {}
        name = source.get("repo") or config._name_or_path or source.get("folder")
        if not name:
            raise EditError("this SAE has no address: name one, Recipe(sae=..., edits=...).")
        return cls(name, edits, source.get("revision"), config.hookpoint)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without what is not set."""
        named = {"sae": self.sae, "revision": self.revision, "hookpoint": self.hookpoint}
        return {
            **{k: v for k, v in named.items() if v is not None},
            "edits": [edit.to_dict() for edit in self.edits],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; a file that is there already is replaced."""
        with written_beside(Path(path)) as beside:
            beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            EditError: not a recipe, or an edit that is not one.
        """
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
        """What tells this recipe from another, one line each: "- " only here, "+ " only there."""
        here, there = _lines(self), _lines(other)
        return [f"- {line}" for line in here if line not in there] + [
            f"+ {line}" for line in there if line not in here
        ]


def _lines(recipe: Recipe) -> list[str]:
    data = recipe.to_dict()
    edits = data.pop("edits")
    return [f"{name}: {value}" for name, value in data.items()] + [
        json.dumps(edit) for edit in edits
    ]

"""What a store was made from, in store.json; compared before anything is added to the store.

Format A JSON object: `format`, `version`, and the fields of `Provenance` by name. Readers refuse
       another version and ignore fields they don't know. For a data set of files, `dataset.files`
       lists the `name`, `bytes` and `sha256` of each.
Beware Once store.json is written, only `dataset.files` ever changes: it grows, under a lock, by
       files recorded after those already listed, and never shrinks. It holds no counts: those come
       from the list of shards and from index.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_switch_sae.errors import StoreError
from hf_switch_sae.files import (
    disk_errors_as_store_errors,
    locked,
    write_json,
    write_once,
    written_whole,
)
from hf_switch_sae.store.rows import RowLayout

FORMAT, VERSION = "hf_switch_sae feature store", 1
FILE = "store.json"
_CARD = """---
configs:
- config_name: tokens
  default: true
  data_files: tokens/*.parquet
- config_name: postings
  data_files: index/*/postings-*.parquet
---
# Feature activations

Sparse activations of a Switch SAE, token by token, written by
hf_switch_sae. `store.json` says of which SAE, language
model and text. `ids` count within the token's `expert` where there is such a column: the feature is
`expert * {features_per_expert} + id`. `load_dataset(folder, "tokens")` reads the tokens, and
`load_dataset(folder, "postings")` the inverted index, in which `token_row` is the row in `tokens`.
`act` is that row's own where `exact` is true, else the smallest of some tokens with acts alike.
"""
# Not compared: the same thing may have another name or lie elsewhere.
_NAMES = {"sae": ("name", "revision"), "lm": ("name", "revision"), "tokenizer": ("name",)}


@dataclass(frozen=True)
class Provenance:
    """What the rows of a store were made from."""

    num_features: int
    num_experts: int
    num_experts_per_token: int
    k: int | None
    hookpoint: str
    """Where the SAE reads."""
    sae: dict[str, Any] = field(default_factory=dict)
    """`name`, `revision`, and `weights`: the SHA-256 of the weights that encode."""
    lm: dict[str, Any] = field(default_factory=dict)
    """`name`, `revision` if it is known, and `fingerprint`: a SHA-256 of sampled weights."""
    tokenizer: dict[str, Any] | None = None
    """`name` and `sha256`; None if the token ids came from elsewhere."""
    dataset: dict[str, Any] | None = None
    """Where the documents came from; None for tokens recorded in sessions."""
    text: dict[str, Any] = field(default_factory=dict)
    """How documents became tokens: context, special tokens, size of a shard."""

    @property
    def layout(self) -> RowLayout:
        """How the store writes feature ids."""
        return RowLayout(self.num_features, self.num_experts, self.num_experts_per_token)

    def differences(self, other: Provenance) -> list[str]:
        """How rows of `other` differ in origin from those of this, one line each; names aside."""
        found = []
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            names = _NAMES.get(each.name, ())
            if isinstance(mine, dict) and isinstance(theirs, dict):
                found += [
                    f"{each.name} {key}: {mine.get(key)!r} there, {theirs.get(key)!r} now"
                    for key in sorted({*mine, *theirs} - {*names, "files"})
                    if mine.get(key) != theirs.get(key)
                ]
                old, new = mine.get("files", []), theirs.get("files", [])
                if new[: len(old)] != old:  # else documents would get other numbers
                    found.append(f"{each.name} files: {old!r} there, {new!r} now")
            elif mine != theirs:
                found.append(f"{each.name}: {mine!r} there, {theirs!r} now")
        return found

    def create_or_extend(self, store: Path) -> None:
        """Make the folder a store of this, or list the new files if it already is one.

        Raises:
            StoreError: the folder is a store of something else, holds other things, or can't be
                written.
        """
        if not (store / FILE).exists():
            if store.exists() and (not store.is_dir() or _holds_other_things(store)):
                raise StoreError(
                    f"{store} is not a store, and not empty: give a folder that is new or empty."
                )
            # before store.json: once that is there, nobody writes the card
            if not (store / "README.md").exists():  # or the user's own
                card = _CARD.replace("{features_per_expert}", str(self.layout.features_per_expert))
                with written_whole(store / "README.md") as file:
                    file.write(card.encode())
            text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2)
            with disk_errors_as_store_errors(store / FILE):
                # several processes may create the store at once: the first wins, the others compare
                write_once(store / FILE, f"{text}\n".encode())
        self.check(store)
        if len(self._files) > len(Provenance.read(store)._files):
            with locked(store / ".lock", wait=True):
                self._extend(store)

    @property
    def _files(self) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = (self.dataset or {}).get("files", [])
        return files

    def _extend(self, store: Path) -> None:
        """List the new files in store.json; writers with the same list write the same bytes."""
        self.check(store)  # again: another writer may have listed other files in the meantime
        data = json.loads((store / FILE).read_bytes())
        listed = data["dataset"]["files"]
        listed += self._files[len(listed) :]
        with disk_errors_as_store_errors(store / FILE):
            write_json(store / FILE, data)

    def check(self, store: Path) -> None:
        """StoreError unless the store at this folder was made from the same."""
        if found := Provenance.read(store).differences(self):
            raise StoreError(
                f"{store} was made from something else, so nothing was added to it: "
                f"{'; '.join(found)}. Record to another folder."
            )

    @classmethod
    def read(cls, store: Path) -> Provenance:
        """Read the provenance of the store at this folder.

        Raises:
            StoreError: there is no store, it is damaged, or of another version.
        """
        path = store / FILE
        try:
            data = json.loads(path.read_bytes())
            name, version = data["format"], data["version"]
        except FileNotFoundError:
            raise StoreError(
                f"{store} is no store of recorded features: no {FILE} there."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise StoreError(f"{path} is damaged or no store's ({err}).") from err
        if name != FORMAT:
            raise StoreError(f"{path} is of the format {name!r}, not {FORMAT!r}.")
        if version != VERSION:
            raise StoreError(
                f"{store} has format version {version}, and this package reads version {VERSION}: "
                "use the hf_switch_sae that wrote it, or record it again."
            )
        known = {each.name for each in fields(cls)}
        try:
            return cls(**{key: value for key, value in data.items() if key in known})
        except TypeError as err:
            raise StoreError(f"{path} lacks what every store has ({err}).") from err


def _holds_other_things(store: Path) -> bool:
    # a lock, a README and what a killed process left don't make it somebody's folder
    return any(
        path.name not in ("README.md", ".lock") and not path.name.startswith(".tmp-")
        for path in store.iterdir()
    )

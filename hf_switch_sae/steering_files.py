"""A recipe -> the steering files of other programs: lm-eval's `steered` model, llama.cpp.

    export_recipe(recipe, sae, "steer.pt")      lm_eval --model steered --model_args steer_path=...
    export_recipe(recipe, sae, "steer.csv")     the same, naming a feature of a published SAE
    export_recipe(recipe, sae, "steer.gguf")    llama-cli --control-vector steer.gguf

All of them add one fixed vector to every token, so only a recipe that does the same is exported:
`Steer` without scope. The vector is the very delta that an attached session adds.

Beware llama.cpp adds `direction.<i>` to what block i puts out, from 0, and has none for block 0.
       lm-eval names a module of the base model, and of several rows of a CSV at one place it keeps
       only the last.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hf_switch_sae.deltas import PreparedEdits
from hf_switch_sae.edits import Steer
from hf_switch_sae.errors import EditError
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.positions import Tokens
from hf_switch_sae.recipe import Recipe


def steering_vector(recipe: Recipe, sae: SwitchSAE) -> Tensor:
    """[hidden_size] float32: what the recipe adds to every token.

    Raises:
        EditError: an edit that is not the same for every token, named; or no edits.
    """
    if not recipe.edits:
        raise EditError("the recipe has no edits, so there is nothing to export.")
    for edit in recipe.edits:
        if not isinstance(edit, Steer):
            raise EditError(
                f"{type(edit).__name__} depends on what a token's features are, and a steering "
                "file adds one fixed vector to all; only Steer can be exported."
            )
        scope = {"rows": edit.rows, "when": edit.when, "positions": edit.positions}
        for name, value in scope.items():
            if value is not None and not (isinstance(value, str) and value == "all"):
                raise EditError(
                    f"{name}={value} limits the edit to some tokens, and a steering file adds one "
                    f"fixed vector to all; leave {name} out to export it."
                )
    one = torch.zeros(1, 1, dtype=torch.int64, device=sae.device)
    token = Tokens.at(one, one == 0, one[0])
    delta, _ = PreparedEdits(sae, recipe.edits).delta(None, token)
    vector: Tensor = delta[0, 0].detach().float().cpu()
    return vector


def export_recipe(
    recipe: Recipe,
    sae: SwitchSAE,
    path: str | os.PathLike[str],
    sparse_model: str | None = None,
    sae_id: str | None = None,
) -> None:
    """Write a steering file; its ending says which: .pt, .csv (both lm-eval) or .gguf (llama.cpp).

    Args:
        recipe: `Steer` edits without scope.
        sae: the SAE they are meant for.
        path: where to; written beside it and renamed into place.
        sparse_model: of a .csv: the repository or folder that sparsify loads the SAE from, its
            hookpoint's folder left out; or with `sae_id` the release that SAELens does.
        sae_id: of a .csv: the SAE's id in a SAELens release.

    Raises:
        EditError: edits, a place or a file name that can't be exported; nothing is written then.
        ImportError: .gguf without the package `gguf`.
    """
    path = Path(path)
    place = recipe.hookpoint or sae.config.hookpoint
    if path.suffix in (".pt", ".pth"):
        module = _module(place)
        _beside(path, lambda file: _write_pt(file, module, steering_vector(recipe, sae)))
    elif path.suffix == ".csv":
        row = _csv_row(recipe, sae, _module(place), sparse_model, sae_id)
        _beside(path, lambda file: _write_csv(file, row))
    elif path.suffix == ".gguf":
        block, vector = _block_after(place), steering_vector(recipe, sae)
        hint = str((sae.config.base_model_fingerprint or {}).get("model_type") or "")
        _beside(path, lambda file: _write_gguf(file, block, vector, hint))
    else:
        raise EditError(f"{path.name}: a steering file ends in .pt, .csv or .gguf.")


def _module(place: str | None) -> str:
    """What lm-eval looks for: a module of the base model whose output is the place."""
    if place is None or not place.endswith(".resid_post"):
        raise EditError(f"lm-eval adds to what a module puts out; {place} is not such a place.")
    return place.removesuffix(".resid_post")


def _block_after(place: str | None) -> int:
    """The block after which llama.cpp has to add."""
    match = re.fullmatch(r"layers\.(\d+)\.resid_(pre|post)", place or "")
    block = int(match[1]) - (match[2] == "pre") if match else -1
    if block < 1:
        raise EditError(
            f"llama.cpp adds a control vector after a block, from block 1 on; {place} is not such "
            "a place."
        )
    return block


def _csv_row(
    recipe: Recipe, sae: SwitchSAE, module: str, sparse_model: str | None, sae_id: str | None
) -> dict[str, object]:
    vector, edits = steering_vector(recipe, sae), recipe.edits
    if len(edits) != 1 or len(edits[0].features or ()) != 1:  # type: ignore[arg-type]
        raise EditError(
            "lm-eval's CSV has one feature a place; this recipe has several. Write a .pt instead."
        )
    source = sae.config.source or {}
    source = source.get("taken_from") or source  # ours is no repository that sparsify can load
    if sparse_model is None and source.get("format") == "sparsify" and source.get("repo"):
        sparse_model = str(source["repo"])
        module = str(source.get("path") or module)
    if sparse_model is None:
        raise EditError(
            "lm-eval's CSV names an SAE that sparsify or SAELens loads: export this one with "
            "format='sparsify' or 'saelens' and pass sparse_model=, or write a .pt instead."
        )
    (feature,) = edits[0].features  # type: ignore[misc]
    direction = sae.decoder_rows(feature)[0].detach().float().cpu()
    coefficient = float(vector @ direction / (direction @ direction))
    return {
        "loader": "sae_lens" if sae_id else "sparsify",
        "action": "add",
        "sparse_model": sparse_model,
        "hookpoint": module,
        "feature_index": feature,
        "steering_coefficient": coefficient,
        "sae_id": sae_id or "",
        "description": "",
    }


def _write_csv(file: Path, row: dict[str, object]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(row))
        writer.writeheader()
        writer.writerow(row)


def _write_pt(file: Path, module: str, vector: Tensor) -> None:
    steer = {"steering_vector": vector, "steering_coefficient": 1.0, "action": "add", "bias": None}
    torch.save({module: steer}, file)


def _write_gguf(file: Path, block: int, vector: Tensor, hint: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("writing a .gguf needs the package gguf: pip install gguf")
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor(f"direction.{block}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _beside(path: Path, write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        write(Path(folder) / path.name)
        (Path(folder) / path.name).replace(path)

"""A recipe -> the steering files of other programs: lm-eval's `steered` model, llama.cpp.

    export_recipe(recipe, sae, "steer.pt")      lm_eval --model steered --model_args steer_path=...
    export_recipe(recipe, sae, "steer.csv")     the same, naming a feature of a published SAE
    export_recipe(recipe, sae, "steer.gguf")    llama-cli --control-vector steer.gguf

All of them add one fixed vector to every token, so a recipe can be exported only if it does the
same: `Steer` without scope. The vector is the very delta that an attached session adds.

Beware llama.cpp adds `direction.<i>` to the output of block i, from 0, and has none for block 0.
       lm-eval names a module of the base model (`h.8` in GPT-2); of several CSV rows for one place
       it keeps only the last.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.edits.kinds import Steer
from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import EditError
from hf_switch_sae.files import written_beside
from hf_switch_sae.formats.hookpoint_names import from_base_module
from hf_switch_sae.lm.fingerprint import block_path
from hf_switch_sae.lm.names import layer_of
from hf_switch_sae.lm.positions import Tokens
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.model import SwitchSAE


def steering_vector(recipe: Recipe, sae: SwitchSAE) -> Tensor:
    """What the recipe adds to every token, [hidden_size], float32.

    Raises:
        EditError: there are no edits, or one is not the same for every token.
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
    # the delta of any one token, which is that of all
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
    module: str | None = None,
) -> None:
    """Write a steering file: .pt or .csv for lm-eval, .gguf for llama.cpp.

    Args:
        recipe: `Steer` edits without scope.
        sae: the SAE they are meant for.
        path: where to write; its ending says which kind.
        sparse_model: for a .csv, where the SAE is loaded from: the repository or folder for
            sparsify, without the hookpoint's folder; with `sae_id`, the release for SAELens.
        sae_id: for a .csv, the SAE's id in a SAELens release.
        module: for a .pt or .csv, the module of the base model whose output is steered, such as
            `h.8`; by default from the SAE's fingerprint of its language model.

    Raises:
        EditError: edits, a place or a file name that can't be exported; nothing is written then.
        ImportError: a .gguf, and the package `gguf` is not installed.
    """
    path = Path(path)
    place = recipe.hookpoint or sae.config.hookpoint
    # everything that can fail comes before the file is opened
    if path.suffix in (".pt", ".pth"):
        vector, at = steering_vector(recipe, sae), module or _module(place, sae.config)
        with written_beside(path) as beside:
            _write_pt(beside, at, vector)
    elif path.suffix == ".csv":
        row = _csv_row(recipe, sae, module, sparse_model, sae_id)
        with written_beside(path) as beside:
            _write_csv(beside, row)
    elif path.suffix == ".gguf":
        block, vector = _block_after(place), steering_vector(recipe, sae)
        hint = str((sae.config.base_model_fingerprint or {}).get("model_type") or "")
        with written_beside(path) as beside:
            _write_gguf(beside, block, vector, hint)
    else:
        raise EditError(f"{path.name}: a steering file ends in .pt, .csv or .gguf.")


def _module(place: str | None, config: SwitchSAEConfig) -> str:
    """The module of the base model whose output is the place: what lm-eval looks for."""
    if place is None or not place.endswith(".resid_post"):
        raise EditError(
            f"lm-eval adds to what a module puts out, and {place} is no such place: pass module=, "
            "one of the base model whose output it is."
        )
    # layers.<i> is called what the fingerprint calls the block
    path, layer = place.removesuffix(".resid_post"), layer_of(place)
    block = block_path(config.base_model_fingerprint, layer[0] if layer else 0)
    if block is not None and layer is not None:
        return block
    if block is not None:  # a path within the whole model: cut what comes before the base model's
        blocks = re.escape(block.removesuffix(".0"))
        if found := re.search(rf"(?:^|\.)({blocks}\.\d+(?:\..*)?)$", path):
            return found[1]
    origin = _origin(config)  # sparsify names its folders by the module
    name = str(origin.get("path") or origin.get("folder")).rpartition("/")[2]
    if origin.get("format") == "sparsify" and from_base_module(name) == place:
        return name
    raise EditError(
        f"the SAE's config does not tell what {path} is called within the base model: pass "
        "module=, e.g. module='h.8' (GPT-2) or 'layers.8' (Llama)."
    )


def _origin(config: SwitchSAEConfig) -> dict[str, Any]:
    source = config.source or {}
    origin: dict[str, Any] = source.get("taken_from") or source
    return origin


def _block_after(place: str | None) -> int:
    """The block to whose output llama.cpp has to add."""
    found = layer_of(place)
    # what block i is given is what block i - 1 put out
    block = found[0] - (found[1] == "resid_pre") if found else -1
    if block < 1:
        raise EditError(
            f"llama.cpp adds a control vector after a block, from block 1 on; {place} is not such "
            "a place."
        )
    return block


def _csv_row(
    recipe: Recipe,
    sae: SwitchSAE,
    module: str | None,
    sparse_model: str | None,
    sae_id: str | None,
) -> dict[str, object]:
    vector, edits = steering_vector(recipe, sae), recipe.edits
    if len(edits) != 1 or len(edits[0].features or ()) != 1:  # type: ignore[arg-type]
        raise EditError(
            "lm-eval's CSV has one feature a place; this recipe has several. Write a .pt instead."
        )
    # sparsify can't load a repository of ours, only the one that the SAE was taken from
    origin = _origin(sae.config)
    if sparse_model is None and origin.get("format") == "sparsify" and origin.get("repo"):
        sparse_model = str(origin["repo"])
        module = module or origin.get("path")
    if sparse_model is None:
        raise EditError(
            "lm-eval's CSV names an SAE that sparsify or SAELens loads: export this one with "
            "format='sparsify' or 'saelens' and pass sparse_model=, or write a .pt instead."
        )
    # lm-eval adds coefficient * decoder row, and its rows need not have length 1
    (feature,) = edits[0].features  # type: ignore[misc]
    direction = sae.decoder_rows(feature)[0].detach().float().cpu()
    coefficient = float(vector @ direction / (direction @ direction))
    return {
        "loader": "sae_lens" if sae_id else "sparsify",
        "action": "add",
        "sparse_model": sparse_model,
        "hookpoint": module or _module(recipe.hookpoint or sae.config.hookpoint, sae.config),
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
    with file.open("wb") as out:  # by its path torch would name what is inside after the file
        torch.save({module: steer}, out)


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

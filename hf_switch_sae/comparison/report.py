"""A cache of activations, held-out rows and SAEs -> comparison.json.

Every SAE is measured on the same rows: a row is left out for all if its norm is over the bound of
any. Two caches make it: one to train on, one of other text of the same model and place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_switch_sae.comparison.claims import claims_of, comparisons_of
from hf_switch_sae.comparison.plan import Planned, label_of
from hf_switch_sae.comparison.runs import Runs, open_rows
from hf_switch_sae.errors import ConfigError, HookpointError, TrainingError, WidthError
from hf_switch_sae.evaluation.heldout import RowSums, measure_held_out
from hf_switch_sae.files import written_beside
from hf_switch_sae.hub.layout import COMPARISON, NOTES
from hf_switch_sae.processes import alone
from hf_switch_sae.sae.flops import flops_per_token, parameter_count
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training import CachedActivations, SwitchSAETrainingArguments

FORMAT = 1
_BATCH = 2048
_PREDICTIONS = {"ce_clean", "ce_spliced", "ce_ablated", "ce_zero", "kl", "ce_tokens"}
_PREDICTIONS |= {"ce_recovered", "ce_recovered_zero"}
_DEFAULT_SEED = next(f.default for f in fields(SwitchSAETrainingArguments) if f.name == "seed")


def compare(
    cache: str | os.PathLike[str],
    held_out: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    train: Sequence[Planned] = (),
    saes: Mapping[str, SwitchSAE] | None = None,
    hookpoint: str | None = None,
    device: str | torch.device | None = None,
    command: str | None = None,
    more: Callable[[dict[str, SwitchSAE]], dict[str, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Train SAEs that are not there yet, measure all on the same held-out rows, say who is better.

    Args:
        cache: folder of `cache_activations`, to train on.
        held_out: another, of other text.
        folder: of the comparison: each SAE that it trains lies in a subfolder of its name, and
            `comparison.json`. What is there already is not trained again; a run that was
            interrupted goes on from its last checkpoint.
        train: see `plan`.
        saes: others to measure, by name.
        hookpoint: of the caches' places, if they have several.
        device: to measure on; a GPU if there is one.
        command: what was typed.
        more: gives figures of the predictions, by SAE, as `evaluate` does.

    Returns:
        What comparison.json says: `measured_on`, `command`, `saes` (one entry for each, with its
        figures), `comparisons` (see `comparison.pairs`) and `claims`.

    Raises:
        ConfigError, TrainingError: nothing to compare, a run that makes no sense, or a folder that
            holds another run's SAE; before the first run.
        StoreError, HookpointError, WidthError: caches and SAEs that do not fit together.
    """
    path = Path(folder)
    loaded = dict(saes or {})
    if not train and not loaded:
        raise ConfigError("there is nothing to compare: give runs to train, or SAEs.")
    rows, test = open_rows(Path(cache), hookpoint), open_rows(Path(held_out), hookpoint)
    _check_rows(rows, test)
    (place,) = rows.hookpoints
    for name, sae in loaded.items():
        _check_sae(name, sae, place, rows.hidden_size[place], {each.name for each in train})

    def opened_rows(seed: int) -> CachedActivations:
        return open_rows(Path(cache), place, seed)

    trained = Runs(list(train), opened_rows, _known(rows), path, command).train()
    notes = {name: _read(folder / NOTES) for name, folder in trained.items()}
    notes |= {name: _notes_of(sae) for name, sae in loaded.items()}
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    seeds = {each.name: each.seed for each in train}
    opened = {name: SwitchSAE.from_pretrained(folder) for name, folder in trained.items()} | loaded
    figures = _measure(opened, test, where)
    on = _measured_on(test, rows)
    if more is not None:
        for name, found in more(opened).items():
            figures[name] |= {key: value for key, value in found.items() if key in _PREDICTIONS}
            on["predictions"] = found["measured_on"]
    entries = [
        _entry(name, sae, notes[name], seeds.get(name), figures[name])
        for name, sae in opened.items()
    ]
    return _write(path, entries, on, command)


def _known(rows: CachedActivations) -> dict[str, Any]:
    """Fields of an SAE's config that the place gives."""
    (place,) = rows.hookpoints
    lm = rows.manifest["lm"]
    known = {
        "hidden_size": rows.hidden_size[place],
        "hookpoint": place,
        "base_model": lm["name"] or None,
        "base_model_revision": lm["revision"],
        "base_model_fingerprint": lm["fingerprint"],
    }
    return {name: value for name, value in known.items() if value is not None}


def _check_rows(rows: CachedActivations, test: CachedActivations) -> None:
    """Raise unless the second cache is of other rows of the first's model and place."""
    if len(rows.hookpoints) > 1:
        raise HookpointError(
            f"{rows.folder} has activations of {', '.join(rows.hookpoints)}: choose one place."
        )
    if rows.hookpoints != test.hookpoints or rows.hidden_size != test.hidden_size:
        raise WidthError(
            f"{rows.folder} has activations of {rows.hidden_size}, {test.folder} of "
            f"{test.hidden_size}: harvest both at the same place of one model."
        )
    fingerprints = [each.manifest["lm"]["fingerprint"] for each in (rows, test)]
    if fingerprints[0] != fingerprints[1]:
        raise TrainingError(
            f"{test.folder} is of another language model than {rows.folder}: harvest both from one."
        )
    same = [each.state_dict()["identity"]["checksums"] for each in (rows, test)]
    if set(same[0]) & set(same[1]):
        raise TrainingError(
            f"{test.folder} holds rows of {rows.folder}: what is trained on can't be held out. "
            "Harvest other text."
        )


def _check_sae(name: str, sae: SwitchSAE, place: str, width: int, taken: set[str]) -> None:
    if name in taken:
        raise ConfigError(f"an SAE and a run are both named {name}: give one another name.")
    if sae.config.hookpoint not in (None, place):
        raise HookpointError(f"{name} reads {sae.config.hookpoint}; the rows are of {place}.")
    if sae.config.hidden_size != width:
        raise WidthError(
            f"{name} has hidden_size={sae.config.hidden_size}; the rows are {width} wide."
        )


@torch.no_grad()
def _measure(
    saes: Mapping[str, SwitchSAE], test: CachedActivations, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Figures of each, one after another, so that one is on the device at a time."""
    bound = min(float(sae.outlier_norm) for sae in saes.values())
    found = {}
    for name, sae in saes.items():
        before = sae.config.hookpoint, sae.device
        sae.config.hookpoint = before[0] or test.hookpoints[0]
        nn.Module.to(sae, device)
        sae.train(False)
        sums: dict[str, RowSums] = {}
        figures = measure_held_out({name: sae}, test, _BATCH, 0, 1, alone, sums, bound)
        found[name] = {**figures[name], "density": sums[name].density(alone)}
        nn.Module.to(sae, before[1])
    return found


def _entry(
    name: str,
    sae: SwitchSAE,
    notes: Mapping[str, Any],
    seed: int | None,
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """Of comparison.json."""
    config = sae.config
    tokens = int(figures["tokens"])
    if seed is None and notes:
        seed = notes["arguments"].get("seed", _DEFAULT_SEED)  # noted where it is not the default
    return {
        "name": name,
        "label": label_of(config),
        "family": "switch" if config.num_experts > 1 else config.activation,
        "num_experts": config.num_experts,
        "num_features": config.num_features,
        "features_per_expert": config.features_per_expert,
        "k": config.k,
        "activation": config.activation,
        "parameters": parameter_count(config),
        "flops_per_token": flops_per_token(config, config.k or figures["l0"]).to_dict(),
        "train_tokens": notes.get("tokens"),
        "seed": seed,
        **{name: value for name, value in figures.items() if name != "tokens"},
        "tokens": tokens,
    }


def _measured_on(test: CachedActivations, rows: CachedActivations) -> dict[str, Any]:
    (place,) = test.hookpoints
    lm = rows.manifest["lm"]
    return {
        "rows": test.num_rows,
        "hookpoint": place,
        "base_model": lm["name"] or None,
        "base_model_revision": lm["revision"],
        "policy": test.policy,
        "cache": test.folder.resolve().name,
        "dtype": test.manifest["dtype"],
        "trained_on": {"cache": rows.folder.resolve().name, "rows": rows.num_rows},
    }


def _write(
    folder: Path, entries: list[dict[str, Any]], on: dict[str, Any], command: str | None
) -> dict[str, Any]:
    compared = comparisons_of(entries)
    found = {
        "format": FORMAT,
        "measured_on": on,
        "command": command,
        "saes": entries,
        "comparisons": compared,
        "claims": claims_of(entries, compared),
    }
    with written_beside(folder / COMPARISON) as beside:
        beside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _notes_of(sae: SwitchSAE) -> dict[str, Any]:
    """What training noted beside an SAE of a folder here, itself or in the place's subfolder."""
    source = Path(str(sae.config._name_or_path or ""))
    return _read(source / NOTES) or _read(source / str(sae.config.hookpoint) / NOTES)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

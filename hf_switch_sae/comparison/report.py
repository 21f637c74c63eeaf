"""Two caches of activations, and SAEs -> comparison.json.

Room   One cache to train on, and one of other text, of the same model and hookpoint, to measure on.
How    Every SAE is measured on the same rows: a row is left out for all of them if its norm is over
       the bound of any.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_switch_sae.comparison.claims import claims_of, comparisons_of
from hf_switch_sae.comparison.plan import Planned, label_of
from hf_switch_sae.comparison.runs import Runs
from hf_switch_sae.errors import ConfigError, HookpointError, TrainingError, WidthError
from hf_switch_sae.evaluation.heldout import RowSums, measure_held_out
from hf_switch_sae.files import write_json
from hf_switch_sae.hub.layout import COMPARISON, NOTES, read_json
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
    extra_measurements: Callable[[dict[str, SwitchSAE]], dict[str, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Train SAEs, measure them all on the same held-out rows, and say which are better.

    Args:
        cache: folder of a cache of activations to train on, see `cache_activations`.
        held_out: folder of another one, of other text, to measure on.
        folder: where comparison.json goes, and a subfolder for each SAE that is trained. An SAE
            that is there already is not trained again, and an interrupted run continues from its
            last checkpoint.
        train: the runs, from `plan`.
        saes: finished SAEs to measure as well, by name.
        hookpoint: which one, if the caches have several.
        device: to measure on; by default a GPU if there is one.
        command: the command line to note.
        extra_measurements: a function from the SAEs by name to further figures by name, such as
            `lambda saes: evaluate(saes, lm, texts, tokenizer)` for what predictions lose.

    Returns:
        The content of comparison.json: `measured_on`, `command`, `saes` (an entry for each, with
        its figures), `comparisons` (see `claims.comparisons_of`) and `claims`.

    Raises:
        ConfigError, TrainingError: there is nothing to compare, a run's arguments do not fit
            together, or a folder holds another run's SAE.
        StoreError, HookpointError, WidthError: caches and SAEs do not fit together.
    """
    loaded = dict(saes or {})
    if not train and not loaded:
        raise ConfigError("there is nothing to compare: give runs to train, or SAEs.")
    # all is checked before the first run, which may take hours
    rows, test = (CachedActivations(each, hookpoint) for each in (cache, held_out))
    _check_rows(rows, test)
    _check_saes(loaded, rows, {each.name for each in train})

    def opened_rows(seed: int) -> CachedActivations:
        return CachedActivations(cache, rows.hookpoints, seed=seed)  # each run has its own cursor

    trained = Runs(list(train), opened_rows, _known(rows), Path(folder), command).train()
    opened = {name: SwitchSAE.from_pretrained(place) for name, place in trained.items()} | loaded
    figures = _measure(opened, test, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on = _measured_on(test, rows)
    if extra_measurements is not None:
        for name, found in extra_measurements(opened).items():
            # they bring fvu and the like of their own, measured on other rows
            figures[name] |= {key: value for key, value in found.items() if key in _PREDICTIONS}
            on["predictions"] = found["measured_on"]
    seeds = {each.name: each.seed for each in train}
    entries = [_entry(name, sae, seeds.get(name), figures[name]) for name, sae in opened.items()]
    return _write(Path(folder), entries, on, command)


def _known(rows: CachedActivations) -> dict[str, Any]:
    """The fields of an SAE's config that the rows decide."""
    (hookpoint,) = rows.hookpoints
    lm = rows.manifest["lm"]
    known = {
        "hidden_size": rows.hidden_size[hookpoint],
        "hookpoint": hookpoint,
        "base_model": lm["name"] or None,
        "base_model_revision": lm["revision"],
        "base_model_fingerprint": lm["fingerprint"],
    }
    return {name: value for name, value in known.items() if value is not None}


def _check_rows(rows: CachedActivations, test: CachedActivations) -> None:
    """Raise unless the caches hold different rows of one model and hookpoint."""
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
    # equal checksums are equal rows, so the caches share text
    same = [each.state_dict()["identity"]["checksums"] for each in (rows, test)]
    if set(same[0]) & set(same[1]):
        raise TrainingError(
            f"{test.folder} holds rows of {rows.folder}: what is trained on can't be held out. "
            "Harvest other text."
        )


def _check_saes(saes: Mapping[str, SwitchSAE], rows: CachedActivations, taken: set[str]) -> None:
    """Raise unless finished SAEs fit the rows, and have names of their own."""
    ((hookpoint, width),) = rows.hidden_size.items()
    for name, sae in saes.items():
        if name in taken:
            raise ConfigError(f"an SAE and a run are both named {name}: give one another name.")
        if sae.config.hookpoint not in (None, hookpoint):
            raise HookpointError(
                f"{name} reads {sae.config.hookpoint}; the rows are of {hookpoint}."
            )
        if sae.config.hidden_size != width:
            raise WidthError(
                f"{name} has hidden_size={sae.config.hidden_size}; the rows are {width} wide."
            )


@torch.no_grad()
def _measure(
    saes: Mapping[str, SwitchSAE], test: CachedActivations, device: str | torch.device
) -> dict[str, dict[str, Any]]:
    """The figures of each SAE, one after another, so that only one is on the device at a time."""
    # a row that one SAE leaves alone would not be a fair test of the others
    bound = min(float(sae.outlier_norm) for sae in saes.values())
    found = {}
    for name, sae in saes.items():
        device_before = sae.device
        # rows are looked up by hookpoint, which a foreign SAE may not name
        sae.config.hookpoint = sae.config.hookpoint or test.hookpoints[0]
        nn.Module.to(sae, device)
        sae.train(False)
        sums: dict[str, RowSums] = {}
        figures = measure_held_out({name: sae}, test, _BATCH, 0, 1, alone, sums, bound)
        found[name] = {**figures[name], "density": sums[name].density(alone)}
        nn.Module.to(sae, device_before)
    return found


def _entry(
    name: str,
    sae: SwitchSAE,
    seed: int | None,
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """An SAE's entry in comparison.json."""
    config, notes = sae.config, _notes_of(sae)
    tokens = int(figures["tokens"])
    if seed is None and notes:
        # training notes only those arguments that are not the default
        seed = notes["arguments"].get("seed", _DEFAULT_SEED)
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
        # without a k, as many features are decoded as were active on average
        "flops_per_token": flops_per_token(config, config.k or figures["l0"]).to_dict(),
        "train_tokens": notes.get("tokens"),
        "seed": seed,
        **{name: value for name, value in figures.items() if name != "tokens"},
        "tokens": tokens,
    }


def _measured_on(test: CachedActivations, rows: CachedActivations) -> dict[str, Any]:
    (hookpoint,) = test.hookpoints
    lm = rows.manifest["lm"]
    return {
        "rows": test.num_rows,
        "hookpoint": hookpoint,
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
    write_json(folder / COMPARISON, found)
    return found


def _notes_of(sae: SwitchSAE) -> dict[str, Any]:
    """What training noted beside an SAE, if that was loaded from a folder; {} otherwise."""
    source = Path(str(sae.config._name_or_path or ""))
    # the folder may be the SAE's own, or that of the release around it
    return read_json(source / NOTES) or read_json(source / str(sae.config.hookpoint) / NOTES)

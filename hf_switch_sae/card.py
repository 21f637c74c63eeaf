"""config.json and metrics.json of a release -> its README.md, from a Jinja template.

    ---                                   front matter: what is missing is filled in
    <!-- hf-switch-sae:begin -->          written anew each time
    <!-- hf-switch-sae:end -->
    anything else                         a person's, left alone

A README without the two marks is a person's from top to bottom.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_switch_sae.errors import SwitchSAEError

BEGIN, END = "<!-- hf-switch-sae:begin -->", "<!-- hf-switch-sae:end -->"
TAGS = ("sparse-autoencoder", "sae", "switch-sae", "mechanistic-interpretability")


def saes_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Subfolder ("" for itself) -> config, of every SAE of ours in a release, in order of path."""
    found = {}
    for file in sorted(folder.rglob("config.json")):
        if in_checkpoint(file.relative_to(folder)):
            continue
        config = _json(file)
        if config.get("model_type") == "switch_sae":
            place = file.parent.relative_to(folder).as_posix()
            found["" if place == "." else place] = config
    return found


def in_checkpoint(path: Path) -> bool:
    """Whether a path within a run's folder is of a checkpoint: no part of what is released."""
    return any(re.fullmatch(r"checkpoint-\d+", part) for part in path.parts)


def render_card(folder: str | Path, repo_id: str) -> str:
    """The README.md of a release: written anew, or what there is with its marked part renewed.

    Args:
        folder: the release; metrics are read from `metrics.json` beside each config, or else from
            the config; how it was trained from `training.json`.
        repo_id: what the snippet loads.

    Raises:
        SwitchSAEError: no SAE in the folder, or a front matter that is no YAML.
    """
    folder = Path(folder)
    saes = saes_in(folder)
    if not saes:
        raise SwitchSAEError(f"there is no SAE of ours in {folder}: no config.json of one.")
    readme = folder / "README.md"
    old = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if old and BEGIN not in old:
        return old
    metrics = {place: _metrics(folder / place, config) for place, config in saes.items()}
    told = {place: _read(folder / place / "metrics.json") for place in saes}
    runs = {place: _read(folder / place / "training.json") for place in saes}
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_switch_sae", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("card.md.jinja")
    body = template.render(
        repo_id=repo_id,
        saes=saes,
        metrics=metrics,
        measured_on={place: each.get("measured_on") for place, each in told.items()},
        runs=runs,
        first=next(iter(saes)),
    )
    part = f"{BEGIN}\n{body.strip()}\n{END}"
    if not old:
        content = f"{part}\n"
    else:
        kept = re.sub(r"\A---\n.*?\n---\n", "", old, flags=re.DOTALL)
        content = re.sub(f"{BEGIN}.*?{END}", lambda _: part, kept, flags=re.DOTALL)
    return f"---\n{_data(repo_id, saes, metrics, old).to_yaml()}\n---\n{content}"


def _data(
    repo_id: str, saes: dict[str, dict[str, Any]], metrics: dict[str, Any], old: str
) -> ModelCardData:
    """The front matter: a person's entries, else ours; the results always ours."""
    bases = sorted({config["base_model"] for config in saes.values() if config.get("base_model")})
    ours: dict[str, Any] = {
        "library_name": "hf_switch_sae",
        "pipeline_tag": "feature-extraction",
        "tags": list(TAGS),
        "base_model": bases[0] if len(bases) == 1 else bases or None,
        "base_model_relation": "adapter" if bases else None,
    }
    try:
        data = ModelCard(old, ignore_metadata_errors=False).data if old else ModelCardData()
    except (ValueError, yaml.YAMLError) as err:
        raise SwitchSAEError(f"the front matter of README.md is damaged: {err}") from err
    theirs: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    theirs.pop("model-index", None)
    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="text",
            dataset_name=config.get("hookpoint") or place or "text",
            metric_type=name,
            metric_value=value,
        )
        for place, config in saes.items()
        for name, value in metrics[place].items()
        if name in ("fvu", "l0", "ce_recovered")
    ]
    entries: dict[str, Any] = {**ours, **theirs}
    if results:
        entries |= {"model_name": theirs.get("model_name") or repo_id, "eval_results": results}
    return ModelCardData(**{name: value for name, value in entries.items() if value is not None})


def _metrics(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    held = _read(folder / "metrics.json") or config.get("metrics") or {}
    return {
        name: value
        for name, value in held.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _read(file: Path) -> dict[str, Any]:
    return _json(file) if file.exists() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as err:
        raise SwitchSAEError(f"{file} is no JSON: {err}") from None
    return value if isinstance(value, dict) else {}

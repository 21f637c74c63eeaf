"""The files of a release -> its card, README.md, from a Jinja template.

    ---                                   front matter: only what is missing is filled in
    <!-- hf-switch-sae:begin -->          between the marks: written anew each time
    <!-- hf-switch-sae:end -->
    anything else                         written by a person, and left alone

Room   `facts` reads the files, this file writes the card.
Beware A README without the two marks was written by a person, and nothing in it is changed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.files import written_beside
from hf_switch_sae.hub.layout import CARD
from hf_switch_sae.release.facts import CAPTIONS, Facts, facts_of, facts_over_all

BEGIN, END = "<!-- hf-switch-sae:begin -->", "<!-- hf-switch-sae:end -->"
TAGS = ("sparse-autoencoder", "sae", "switch-sae", "mechanistic-interpretability")
_COMPARISON_FIGURES = ("flops_fvu", "l0_fvu", "l0_ce_recovered")
_GEOMETRY_FIGURES = ("duplicates", "similarity", "alignment", "maps")
_SAE_FIGURES = ("training", "load", "density")


def render_card(folder: str | Path, repo_id: str, license_id: str | None = None) -> str:
    """The README.md of a release: a new one, or the one that is there with its marked part renewed.

    Args:
        folder: the release.
        repo_id: the Hub id that the snippet loads.
        license_id: as the Hub names it, such as apache-2.0; by default as the front matter has it.

    Raises:
        SwitchSAEError: there is no SAE in the folder, or a file is damaged.
    """
    folder = Path(folder)
    saes = facts_of(folder)
    if not saes:
        raise SwitchSAEError(f"there is no SAE of ours in {folder}: no config.json of one.")
    old = _text(folder)
    if old and BEGIN not in old:
        return old
    data = _data(repo_id, saes, old, license_id)
    body = _template().render(
        repo_id=repo_id,
        saes=saes,
        over_all=facts_over_all(folder),
        first=next(iter(saes)),
        captions=CAPTIONS,
        comparison_figures=_COMPARISON_FIGURES,
        geometry_figures=_GEOMETRY_FIGURES,
        sae_figures=_SAE_FIGURES,
        license_id=data.license,
    )
    # what a template leaves out leaves empty lines behind
    body = re.sub(r"\n{3,}", "\n\n", body.strip())
    part = f"{BEGIN}\n{body}\n{END}"
    if not old:
        content = f"{part}\n"
    else:
        # the front matter is already in `data`, merged with ours
        kept = re.sub(r"\A---\n.*?\n---\n", "", old, flags=re.DOTALL)
        # a function, as backslashes in a replacement string are escapes
        content = re.sub(f"{BEGIN}.*?{END}", lambda _: part, kept, flags=re.DOTALL)
    return f"---\n{data.to_yaml()}\n---\n{content}"


def known_repo_id(folder: str | Path) -> str:
    """The Hub id in a release's card, or else the folder's name."""
    return _front_matter(_text(Path(folder))).model_name or Path(folder).resolve().name


def is_a_persons(folder: str | Path) -> bool:
    """Whether a person wrote a release's README: it is there, and has no marks of ours."""
    text = _text(Path(folder))
    return bool(text) and BEGIN not in text


def _text(folder: Path) -> str:
    readme = folder / CARD
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_switch_sae.release", "templates"),
        # a misspelled name is an error, not a gap in the card
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": lambda value: "-" if value is None else f"{100 * value:.3g} %",
        "short": lambda value: "-" if value is None else f"{value:.4g}",
        "count": lambda value: "-" if value is None else f"{value:,.0f}",
    }
    return environment.get_template("card.md.jinja")


def _front_matter(text: str) -> ModelCardData:
    try:
        data: Any = ModelCard(text, ignore_metadata_errors=False).data if text else None
    except (ValueError, yaml.YAMLError) as err:
        raise SwitchSAEError(f"the front matter of README.md is damaged: {err}") from err
    return data or ModelCardData()


def _data(repo_id: str, saes: dict[str, Facts], old: str, license_id: str | None) -> ModelCardData:
    """The front matter: entries that are there stay, but for the results, which are ours."""
    bases = sorted({each.config["base_model"] for each in saes.values() if _has_base(each)})
    ours: dict[str, Any] = {
        "library_name": "hf_switch_sae",
        "pipeline_tag": "feature-extraction",
        "tags": list(TAGS),
        "base_model": bases[0] if len(bases) == 1 else bases or None,
        "base_model_relation": "adapter" if bases else None,
    }
    theirs: dict[str, Any] = _front_matter(old).to_dict()  # type: ignore[no-untyped-call]
    # the Hub's name for the results; they are made anew below
    theirs.pop("model-index", None)
    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="text",
            dataset_name=each.config.get("hookpoint") or place or "text",
            metric_type=name,
            metric_value=value,
        )
        for place, each in saes.items()
        for name, value in each.metrics.items()
        if name in ("fvu", "l0", "ce_recovered")
    ]
    # theirs last, so that what a person entered stays
    entries: dict[str, Any] = {**ours, **theirs}
    if license_id is not None:
        entries["license"] = license_id
    # results need a model's name, and take the place of any that are there
    if results:
        entries |= {"model_name": theirs.get("model_name") or repo_id, "eval_results": results}
    return ModelCardData(**{name: value for name, value in entries.items() if value is not None})


def _has_base(each: Facts) -> bool:
    return bool(each.config.get("base_model"))


def write_card(folder: Path, repo_id: str, license_id: str | None = None) -> None:
    """Write or renew the README.md of a release; see `render_card`."""
    card, readme = render_card(folder, repo_id, license_id), folder / CARD
    if readme.exists() and readme.read_text(encoding="utf-8") == card:
        return
    with written_beside(readme) as beside:
        beside.write_text(card, encoding="utf-8")

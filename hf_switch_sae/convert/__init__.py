"""Checkpoints of other projects -> `SwitchSAE`, and back: one small file a format.

    sae = SwitchSAE.from_pretrained("EleutherAI/sae-pythia-70m-32k", subfolder="layers.3")
    convert("google/gemma-scope-2b-pt-res", "folder", subfolder="layer_20/width_16k/average_l0_71")
    export(sae, "folder", format="saelens")

Beside these two, `from hf_switch_sae.convert import FORMATS, EXPORTS, Given` tells what can be
read, written and passed.

A conversion is exact or refused. Nothing is guessed: what the files don't tell is an error that
names the argument to pass. Every conversion can be held against its format's own arithmetic,
written out by hand on the file's own tensors (`parity`).

Beware `hf_switch_sae.convert` is the function, and hides this package: `hf_switch_sae.convert.X`
       is an AttributeError where `from hf_switch_sae.convert import X` works.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn

from hf_switch_sae.convert.foreign import GIVEN, Foreign, Given
from hf_switch_sae.convert.parity import Parity, parity
from hf_switch_sae.convert.registry import (
    EXPORTS,
    FORMATS,
    format_of,
    other_kind,
    recognize,
    weight_folders,
    writer_of,
)
from hf_switch_sae.convert.source import Source, check_inside, open_source
from hf_switch_sae.errors import ConversionError, HubError
from hf_switch_sae.files import written_beside
from hf_switch_sae.model import SwitchSAE

__all__ = ["EXPORTS", "FORMATS", "Conversion", "Given", "Parity", "convert", "export", "parity"]

_SOURCE_KEYWORDS = (
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; prints as a few lines."""

    sae: SwitchSAE
    parity: Parity
    """The SAE against the format's formula on random vectors."""
    live: Any = None
    """`Preflight` on the language model's own stream; None if no model was given."""

    def __str__(self) -> str:
        c = self.sae.config
        k = "" if c.k is None else f", k = {c.k}"
        what = f"{c.num_features} features in {c.num_experts} expert(s), {c.activation}{k}"
        lines = [f"{c.hookpoint}: {what}", str(self.parity)]
        return "\n".join(lines if self.live is None else [*lines, str(self.live)])


def convert(
    name: str | Path,
    folder: str | Path | None = None,
    *,
    format: str | None = None,
    lm: nn.Module | None = None,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Conversion:
    """Take over a checkpoint of another project.

    Args:
        name: a local folder or file, or a Hub repository.
        folder: where to save the SAE, which must not be there yet; None: nowhere.
        format: one of FORMATS; by default it is told by the files.
        lm: the language model, to measure FVU and L0 on live text, given as `inputs`.
        inputs: keywords of the model's forward, as a tokenizer returns them.
        options: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`,
            `local_files_only`, and the fields of `Given`: `k`, `layer`, `hookpoint`, ...

    Raises:
        ConversionError: no format that is known, one that can't be taken over exactly, something
            missing, wrong or malicious in it, or a folder that is there already. Nothing is
            written then.
        HubError: the repository can't be read.
        TypeError: an option that does not exist.
    """
    if folder is not None and Path(folder).exists():
        raise ConversionError(f"{folder} is there already; name a folder that is not.")
    if (lm is None) != (inputs is None):
        raise ConversionError("to measure on live text pass both lm= and inputs=.")
    foreign = _read(name, format, options)
    sae = foreign.build()
    found = parity(sae, foreign)
    if not found.holds:
        raise ConversionError(f"{name}: {found}; it was not written.")
    live = None
    if lm is not None and inputs is not None:
        with sae.attach(lm) as session:
            live = session.preflight(inputs)
    if folder is not None:
        with written_beside(Path(folder)) as beside:
            sae.save_pretrained(beside)
    return Conversion(sae, found, live)


def export(sae: SwitchSAE, folder: str | Path, format: str) -> tuple[str, ...]:
    """Write an SAE for another project.

    Args:
        sae: the SAE; its weights are written in float32.
        folder: where to; it must not be there yet.
        format: one of EXPORTS.

    Returns:
        What a user should know, one sentence each; mostly nothing.

    Raises:
        ConversionError: the format can't hold it exactly, or the folder is there already. Nothing
            is written then.
    """
    write, folder = writer_of(format), Path(folder)
    if folder.exists():
        raise ConversionError(f"{folder} is there already; name a folder that is not.")
    with written_beside(folder) as beside:
        return write(sae, beside)


def _read(name: str | Path, format: str | None, options: Mapping[str, Any]) -> Foreign:
    unknown = options.keys() - GIVEN - set(_SOURCE_KEYWORDS)
    if unknown:
        raise TypeError(f"convert() has no option {sorted(unknown)[0]!r}.")
    where = {n: v for n, v in options.items() if n in _SOURCE_KEYWORDS and v is not None}
    source = open_source(name, **where)
    given = Given(**{n: v for n, v in options.items() if n in GIVEN})
    return format_of(source, format).read(source, given)


def _load_foreign(name: str, kwargs: dict[str, Any], error: Exception) -> Any:
    """What `SwitchSAE.from_pretrained` does when there is no SAE of our own at an address.

    The converted SAE is saved to a temporary folder and loaded from it, so that every argument of
    `from_pretrained` means the same as ever; the folder goes when the SAE does.

    Raises:
        ConversionError: a known format, but it can't be taken over.
        The error given: there is nothing that is known, or it can't be reached.
    """
    where = {n: kwargs[n] for n in _SOURCE_KEYWORDS if kwargs.get(n) is not None}
    check_inside(where.get("subfolder", ""), "subfolder")
    try:
        source = open_source(name, **where)
    except (ConversionError, HubError):
        raise _said_plainly(name, error) from None
    found = recognize(source)
    if found is None:
        if isinstance(error, OSError):
            raise OSError(
                f"{error}{_hint(source, open_source(name, **where, whole=True))}"
            ) from error
        raise error
    foreign = found.read(source, Given(**{n: v for n, v in kwargs.items() if n in GIVEN}))
    _log.warning("%s is in the format of %s; converted.", source.where, found.name)
    folder = tempfile.mkdtemp(prefix="hf-switch-sae-")
    try:
        foreign.build().save_pretrained(folder)
        mine = {*_SOURCE_KEYWORDS, *GIVEN, "pretrained_model_name_or_path"}
        rest = {n: v for n, v in kwargs.items() if n not in mine}
        result = SwitchSAE.from_pretrained(folder, **rest)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sae = result[0] if isinstance(result, tuple) else result
    sae.config._name_or_path = name
    weakref.finalize(sae, shutil.rmtree, folder, ignore_errors=True)
    return result


def _said_plainly(name: str, error: Exception) -> Exception:
    """The error, but of a path that can't be a repository's name that there is no such folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return OSError(f"there is no folder {name}, and a repository can't be called that.")
    return error


def _hint(source: Source, whole: Source) -> str:
    """What could have been asked for at an address without an SAE, as a sentence."""
    if reason := other_kind(source):
        return f" It looks like {reason}, which can't be taken over."
    folders = weight_folders(whole)
    if not folders:
        return ""
    return (
        f" There is no SAE under subfolder={source.subfolder!r}; there are: {', '.join(folders)}."
    )


def _pin_revision(result: Any, name: str, kwargs: Mapping[str, Any]) -> None:
    """Record the commit an SAE of our own was loaded at, so that everything saved carries it.

    What the SAE was converted from is kept beside it, as "taken_from".
    """
    if Path(name).exists():
        return
    subfolder = kwargs.get("subfolder") or ""
    file = f"{subfolder}/config.json" if subfolder else "config.json"
    # transformers does not tell which commit it loaded, but the cache has it in the file's path
    cached = try_to_load_from_cache(
        name, file, kwargs.get("cache_dir"), kwargs.get("revision") or "main"
    )
    if isinstance(cached, str):
        commit = Path(cached).parents[len(Path(file).parts) - 1].name
        config = (result[0] if isinstance(result, tuple) else result).config
        here = {"repo": name, "revision": commit, "path": subfolder}
        known = {**here, "taken_from": _origin(config.source or {}, name)}
        config.source = {key: value for key, value in known.items() if value}


def _origin(source: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Where an SAE loaded from repository `name` first came from; None: from there."""
    if "taken_from" in source:
        origin: Mapping[str, Any] | None = source["taken_from"]
        return origin
    return source if "format" in source or source.get("repo") != name else None


SwitchSAE._load_foreign = _load_foreign
SwitchSAE._pin_revision = _pin_revision

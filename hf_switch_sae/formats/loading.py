"""What `SwitchSAE.from_pretrained` does with other people's SAEs, and loading a whole release.

Room   `hf_switch_sae/__init__.py` hands `load_foreign` and `pin_revision` to `SwitchSAE`, which
       lies on a lower floor.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_switch_sae.errors import ConversionError, HubError
from hf_switch_sae.formats.checkpoint import GIVEN, Given
from hf_switch_sae.formats.registry import other_kind, recognize
from hf_switch_sae.hub.layout import CONFIG
from hf_switch_sae.hub.source import (
    SOURCE_KEYWORDS,
    Source,
    check_inside,
    listed_folders,
    open_source,
)
from hf_switch_sae.sae.model import SwitchSAE

_log = logging.getLogger(__name__)


def load_foreign(name: str, kwargs: dict[str, Any], error: Exception) -> Any:
    """Load another project's SAE, where `from_pretrained` found none of ours.

    Args:
        name: as given to `from_pretrained`.
        kwargs: all else that was given to it.
        error: the error that it met.

    Returns:
        What `from_pretrained` returns.

    Raises:
        ConversionError: the format is known, but the SAE can't be taken over.
        The error given: nothing there is in a known format, or it can't be reached.
    """
    where = {n: kwargs[n] for n in SOURCE_KEYWORDS if kwargs.get(n) is not None}
    # not within the try below, which would hide that the path climbs out
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
    checkpoint = found.read(source, Given(**{n: v for n, v in kwargs.items() if n in GIVEN}))
    _log.warning("%s is in the format of %s; converted.", source.where, found.NAME)

    # saved and loaded again, so that every argument of from_pretrained means what it always does
    folder = tempfile.mkdtemp(prefix="hf-switch-sae-")
    try:
        checkpoint.build().save_pretrained(folder)
        mine = {*SOURCE_KEYWORDS, *GIVEN, "pretrained_model_name_or_path"}
        rest = {n: v for n, v in kwargs.items() if n not in mine}
        result = SwitchSAE.from_pretrained(folder, **rest)
    except BaseException:
        # Ctrl+C, too, must not leave gigabytes in the temporary folder
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sae = result[0] if isinstance(result, tuple) else result
    # else the temporary folder's name would stand there
    sae.config._name_or_path = name
    # its weights may be mapped from the folder, so that goes only when the SAE does
    weakref.finalize(sae, shutil.rmtree, folder, ignore_errors=True)
    return result


def _said_plainly(name: str, error: Exception) -> Exception:
    """The error; if the name can't be a repository's, one that says there is no such folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return OSError(f"there is no folder {name}, and a repository can't be called that.")
    return error


def _hint(source: Source, whole: Source) -> str:
    """A sentence on what there is at an address that has no SAE; "" if nothing is known."""
    if reason := other_kind(source):
        return f" It looks like {reason}, which can't be taken over."
    there = listed_folders(whole)
    if not there:
        return ""
    return f" There is no SAE under subfolder={source.subfolder!r}; there are: {there}."


def pin_revision(result: Any, name: str, kwargs: Mapping[str, Any]) -> None:
    """Record in an SAE's config the commit it was loaded at, so that whatever is saved carries it.

    What the SAE was converted from stays beside it, as "taken_from".

    Args:
        result: what `from_pretrained` returns.
        name, kwargs: what it was given.
    """
    if Path(name).exists():
        return
    subfolder = kwargs.get("subfolder") or ""
    file = f"{subfolder}/{CONFIG}" if subfolder else CONFIG
    # transformers does not tell which commit it loaded, but the cache has it in the file's path
    cached = try_to_load_from_cache(
        name, file, kwargs.get("cache_dir"), kwargs.get("revision") or "main"
    )
    if isinstance(cached, str):
        # it ends in snapshots/<commit>/<subfolder>/config.json
        commit = Path(cached).parents[len(Path(file).parts) - 1].name
        config = (result[0] if isinstance(result, tuple) else result).config
        here = {"repo": name, "revision": commit, "path": subfolder}
        known = {**here, "taken_from": _converted_from(config.source or {}, name)}
        config.source = {key: value for key, value in known.items() if value}


def _converted_from(source: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What an SAE in repository `name` was converted from; None if it was made there."""
    if "taken_from" in source:
        origin: Mapping[str, Any] | None = source["taken_from"]
        return origin
    return source if "format" in source or source.get("repo") != name else None


def load_all(name: str | Path, revision: str | None = None, **options: Any) -> dict[str, SwitchSAE]:
    """Every SAE of a release, by subfolder ("" for the top folder), all of one commit.

    Args:
        name: a local folder or a Hub repository, of ours or of another project.
        revision: branch, tag or commit.
        options: other arguments of `SwitchSAE.from_pretrained`.

    Raises:
        HubError: there is no SAE, or the repository can't be read.
    """
    known = ("token", "cache_dir", "local_files_only")
    where = {key: options[key] for key in known if key in options}
    source = open_source(name, revision=revision, **where)
    folders = source.folders()
    if not folders:
        raise HubError(f"there is no SAE in {name}: no weights in it.")
    # the commit that was listed: a push in between must not mix two releases
    commit = {} if source.revision is None else {"revision": source.revision}
    return {
        folder: SwitchSAE.from_pretrained(name, subfolder=folder, **commit, **options)
        for folder in folders
    }

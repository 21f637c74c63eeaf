"""The formats there are, and which of them a source is in: asked in order, by its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats import (
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    scale_sae,
    sparsify,
)
from hf_switch_sae.formats import switch_sae as switch_reference
from hf_switch_sae.formats.checkpoint import Foreign, Given
from hf_switch_sae.hub.layout import CONFIG, is_ours
from hf_switch_sae.hub.source import Source, listed_folders
from hf_switch_sae.sae.model import SwitchSAE

# dictionary_learning is known by its file's name alone, so those who share it come before
_READERS: tuple[ModuleType, ...] = (
    saelens,
    sparsify,
    gemma_scope,
    llama_scope,
    qwen_scope,
    switch_reference,
    scale_sae,
    dictionary_learning,
    goodfire,
    openai,
)
FORMATS = tuple(module.NAME for module in _READERS)
"""What can be read, by name."""
_BY_NAME = dict(zip(FORMATS, _READERS, strict=True))
EXPORTS = tuple(name for name, module in _BY_NAME.items() if hasattr(module, "write"))
"""What can be written."""

# in no format that can be taken over: a file that gives it away, and why
_KNOWN_OTHERS = {
    "latest_ckpt.safetensors": "a temporal SAE, whose features depend on earlier tokens",
    "config.yaml": "a transcoder or cross-layer transcoder, which writes elsewhere than it reads",
}


@dataclass(frozen=True)
class Format:
    """A format and its reader."""

    name: str
    read: Callable[[Source, Given], Foreign]


def recognize(source: Source) -> Format | None:
    """The format of a source by its files, or None."""
    for module in _READERS:
        if module.recognizes(source):
            return Format(module.NAME, module.read)
    return None


def other_kind(source: Source) -> str | None:
    """What a source looks like, of kinds that no SwitchSAE can be; None if unknown."""
    return next((what for file, what in _KNOWN_OTHERS.items() if file in source.files), None)


def format_of(source: Source, name: str | None = None) -> Format:
    """The format of a source, by name or else by its files.

    Raises:
        ConversionError: no format has such files, or there is none of that name.
    """
    if name is not None and name not in _BY_NAME:
        raise ConversionError(f"no format {name!r}; there are {', '.join(FORMATS)}.")
    found = Format(name, _BY_NAME[name].read) if name else recognize(source)
    if found is not None:
        return found
    if what := other_kind(source):
        raise ConversionError(f"{source.where} looks like {what}; it can't be taken over.")
    if is_ours(source.json(CONFIG)):
        raise ConversionError(
            f"{source.where} is no other project's: SwitchSAE.from_pretrained loads it as it is, "
            "and export() hands it on."
        )
    folders = listed_folders(source)
    there = f"There are weights in: {folders}. Pass one of them as subfolder=."
    raise ConversionError(
        f"{source.where} is in none of the known formats ({', '.join(FORMATS)}). "
        f"{there if folders else 'Its files: ' + (', '.join(source.files[:8]) or 'none') + '.'}"
    )


def writer_of(name: str) -> Callable[[SwitchSAE, Path], tuple[str, ...]]:
    """The function that writes a format.

    Raises:
        ConversionError: there is no such format, or it is only read.
    """
    if name not in EXPORTS:
        raise ConversionError(f"can't export to {name!r}; there are {', '.join(EXPORTS)}.")
    writer: Callable[[SwitchSAE, Path], tuple[str, ...]] = _BY_NAME[name].write
    return writer

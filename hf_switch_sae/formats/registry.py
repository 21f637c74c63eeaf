"""The formats there are, and which of them a source is in.

Room   To add a format, write its file with what `Reader` asks for, and add it to `_READERS`. If it
       also has what `Writer` asks for, add it to `_WRITERS` too.
Beware Formats are asked in the order of `_READERS`, by the files of the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

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
    switch_sae,
)
from hf_switch_sae.formats.checkpoint import Checkpoint, Given
from hf_switch_sae.hub.layout import CONFIG, is_ours
from hf_switch_sae.hub.source import Source, listed_folders
from hf_switch_sae.sae.model import SwitchSAE


class Reader(Protocol):
    """What the file of a format defines, in this order."""

    @property
    def NAME(self) -> str:
        """The format, as users and provenance call it."""
        ...

    def recognizes(self, source: Source) -> bool:
        """Whether a source is in this format."""
        ...

    def read(self, source: Source, given: Given) -> Checkpoint:
        """The checkpoint in our layout; raises ConversionError if that can't be exact."""
        ...


class Writer(Reader, Protocol):
    """A format that we also write."""

    def write(self, sae: SwitchSAE, folder: Path) -> tuple[str, ...]:
        """Write a new folder; returns what a user should know, a sentence each."""
        ...


# dictionary_learning is known by its file's name alone, so those that share it come before it
_READERS: tuple[Reader, ...] = (
    saelens,
    sparsify,
    gemma_scope,
    llama_scope,
    qwen_scope,
    switch_sae,
    scale_sae,
    dictionary_learning,
    # these two look into a .pt file of any name, which takes a request, so they come last
    goodfire,
    openai,
)
_WRITERS: tuple[Writer, ...] = (saelens, sparsify, switch_sae, dictionary_learning)
FORMATS = tuple(reader.NAME for reader in _READERS)
"""Names of the formats that can be read."""
EXPORTS = tuple(writer.NAME for writer in _WRITERS)
"""Names of the formats that can be written."""

# files that give away a kind of SAE that no SwitchSAE can be, and why not
_KNOWN_OTHERS = {
    "latest_ckpt.safetensors": "a temporal SAE, whose features depend on earlier tokens",
    "config.yaml": "a transcoder or cross-layer transcoder, which writes elsewhere than it reads",
}


def recognize(source: Source) -> Reader | None:
    """The reader for a source, told by its files; None if no format has such files."""
    return next((reader for reader in _READERS if reader.recognizes(source)), None)


def other_kind(source: Source) -> str | None:
    """What a source looks like, of the kinds that no SwitchSAE can be; None if unknown."""
    return next((what for file, what in _KNOWN_OTHERS.items() if file in source.files), None)


def reader_of(source: Source, name: str | None = None) -> Reader:
    """The reader for a source, by the format's name or else by the source's files.

    Raises:
        ConversionError: no format has such files, or there is none of that name.
    """
    if name is not None:
        if name not in FORMATS:
            raise ConversionError(f"no format {name!r}; there are {', '.join(FORMATS)}.")
        # taken at the user's word: the reader says itself what it misses
        return _READERS[FORMATS.index(name)]
    found = recognize(source)
    if found is not None:
        return found

    # no format: say what the source is instead, or where to look
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


def writer_of(name: str) -> Writer:
    """The writer of a format.

    Raises:
        ConversionError: there is no such format, or it can only be read.
    """
    if name not in EXPORTS:
        raise ConversionError(f"can't export to {name!r}; there are {', '.join(EXPORTS)}.")
    return _WRITERS[EXPORTS.index(name)]

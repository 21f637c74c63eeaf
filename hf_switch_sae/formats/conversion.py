"""Checkpoints of other projects -> `SwitchSAE`, and back.

A conversion is exact or refused. Nothing is guessed: if the files leave something open, the error
names the argument to pass. Every conversion is checked against its format's own arithmetic, which
each reader writes out by hand on the file's own tensors (`parity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.files import written_beside
from hf_switch_sae.formats.checkpoint import GIVEN, Checkpoint, Given
from hf_switch_sae.formats.parity import Parity, parity
from hf_switch_sae.formats.registry import reader_of, writer_of
from hf_switch_sae.hub.source import SOURCE_KEYWORDS, open_source
from hf_switch_sae.sae.model import SwitchSAE


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
        folder: where to save the SAE, which must not be there yet; None to save it nowhere.
        format: one of FORMATS; by default the files tell.
        lm: the language model, to measure FVU and L0 on the text in `inputs`.
        inputs: keywords of the model's forward, as a tokenizer returns them.
        options: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`,
            `local_files_only`, and the fields of `Given`: `k`, `layer`, `hookpoint`, ...

    Raises:
        ConversionError: the format is not known, or can't be taken over exactly; something in the
            checkpoint is missing, wrong or malicious; or the folder is there already. Nothing is
            written then.
        HubError: the repository can't be read.
        TypeError: an option that does not exist.
    """
    # checked first: found out at the end, it would have cost a download of gigabytes
    if folder is not None and Path(folder).exists():
        raise ConversionError(f"{folder} is there already; name a folder that is not.")
    if (lm is None) != (inputs is None):
        raise ConversionError("to measure on live text pass both lm= and inputs=.")

    checkpoint = _read(name, format, options)
    sae = checkpoint.build()
    found = parity(sae, checkpoint)
    if not found.holds:
        raise ConversionError(f"{name}: {found}; it was not written.")

    # measured before anything is saved, as a language model that does not fit raises
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
        folder: where to write; it must not be there yet.
        format: one of EXPORTS.

    Returns:
        What a user should know, one sentence each; mostly nothing.

    Raises:
        ConversionError: the format can't hold the SAE exactly, or the folder is there already.
            Nothing is written then.
    """
    writer, folder = writer_of(format), Path(folder)
    if folder.exists():
        raise ConversionError(f"{folder} is there already; name a folder that is not.")
    with written_beside(folder) as beside:
        return writer.write(sae, beside)


def _read(name: str | Path, format: str | None, options: Mapping[str, Any]) -> Checkpoint:
    # a misspelled k= must not go unnoticed, with the files' own k in its place
    unknown = options.keys() - GIVEN - set(SOURCE_KEYWORDS)
    if unknown:
        raise TypeError(f"convert() has no option {sorted(unknown)[0]!r}.")
    where = {n: v for n, v in options.items() if n in SOURCE_KEYWORDS and v is not None}
    source = open_source(name, **where)
    given = Given(**{n: v for n, v in options.items() if n in GIVEN})
    return reader_of(source, format).read(source, given)

"""`hf-switch-sae convert`: take over an SAE of another project, or write one of ours for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from hf_switch_sae.cli.options import GgufFile, Revision
from hf_switch_sae.errors import ConversionError, HubError, TextError
from hf_switch_sae.formats import EXPORTS, FORMATS
from hf_switch_sae.formats import convert as convert_checkpoint
from hf_switch_sae.formats import export as export_sae
from hf_switch_sae.formats.registry import writer_of
from hf_switch_sae.hub.layout import CONFIG, is_ours
from hf_switch_sae.hub.source import open_source
from hf_switch_sae.lm.loading import load_lm
from hf_switch_sae.sae.model import SwitchSAE


def convert(
    source: Annotated[str, typer.Argument(help="Hub id, folder or file of the SAE.")],
    folder: Annotated[Path, typer.Argument(help="Where to save it; must not be there yet.")],
    to: Annotated[
        str | None, typer.Option(help=f"Write it for another project: {', '.join(EXPORTS)}.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help=f"Its format, if its files mislead: {', '.join(FORMATS)}.")
    ] = None,
    subfolder: Annotated[str, typer.Option(help="Folder or single file within it.")] = "",
    revision: Revision = None,
    k: Annotated[int | None, typer.Option(help="Features per token.")] = None,
    layer: Annotated[int | None, typer.Option(help="Block of the language model, from 0.")] = None,
    hookpoint: Annotated[
        str | None, typer.Option(help="Where it reads and writes, such as layers.7.resid_post.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the language model.")] = None,
    heaviside: Annotated[
        bool | None, typer.Option(help="The router's probability is no part of activations.")
    ] = None,
    experts_per_token: Annotated[
        int | None, typer.Option(help="For a Scale-SAE: experts that encode a token.")
    ] = None,
    input_scale: Annotated[
        float | None, typer.Option(help="What the residual stream is multiplied by.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Threshold of a BatchTopK SAE.")] = None,
    dict_class: Annotated[
        str | None, typer.Option(help="For dictionary_learning: the class.")
    ] = None,
    lm: Annotated[
        str | None, typer.Option(help="A language model to measure FVU with, on --text.")
    ] = None,
    gguf_file: GgufFile = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file; its first 512 tokens are used.")
    ] = None,
) -> None:
    """Take over an SAE of another project, or write one for it.

    What is taken over is checked against its format's own formula.
    """
    given: dict[str, Any] = {
        **{"k": k, "layer": layer, "hookpoint": hookpoint, "base_model": base_model},
        **{"heaviside": heaviside, "experts_per_token": experts_per_token},
        **{"input_scale": input_scale, "threshold": threshold, "dict_class": dict_class},
    }
    where: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    if to is not None:
        only_without_to = {"--format": format, "--lm": lm, "--gguf-file": gguf_file, "--text": text}
        if asked := [option for option, value in only_without_to.items() if value is not None]:
            raise typer.BadParameter(f"{', '.join(asked)} can't go together with --to.")
        writer_of(to)  # an unknown format is an error before anything is fetched
        for note in export_sae(_load(source, where, given), folder, to):
            print(note)
        return

    live = _live(lm, gguf_file, text)
    print(convert_checkpoint(source, folder, format=format, **live, **where, **given))


def _load(name: str, where: dict[str, Any], given: dict[str, Any]) -> SwitchSAE:
    """An SAE of ours, or of another project, with what the user tells of it."""
    # what was not typed must not override what the files say
    known = {option: value for option, value in given.items() if value is not None}
    if known and is_ours(open_source(name, **where).json(CONFIG)):
        options = ", ".join(f"--{option.replace('_', '-')}" for option in known)
        raise typer.BadParameter(f"{name} tells all of this in its config: leave {options} out.")
    try:
        return SwitchSAE.from_pretrained(name, **where, **known)
    # it is an OSError as well, but its message needs nothing added
    except HubError:
        raise
    except (OSError, SafetensorError) as err:
        raise ConversionError(f"no SAE at {name}: {err}") from err


def _live(lm: str | None, gguf_file: str | None, text: Path | None) -> dict[str, Any]:
    """`lm` and `inputs` of `convert`; nothing if no language model is named."""
    if (lm is None) != (text is None):
        raise typer.BadParameter("--lm and --text go together: a model, and ordinary text for it.")
    if lm is None or text is None:
        if gguf_file is not None:
            raise typer.BadParameter("--gguf-file is of the language model: give --lm and --text.")
        return {}
    # before the model is loaded, which takes longer to fail
    try:
        written = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise TextError(f"{text} can't be read as text: {err}") from err
    model, tokenizer = load_lm(lm, "auto", "cpu", gguf_file=gguf_file)
    inputs = tokenizer(written, return_tensors="pt", truncation=True, max_length=512)
    return {"lm": model, "inputs": inputs}

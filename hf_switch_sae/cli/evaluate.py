"""`hf-switch-sae eval`: what a finished SAE loses, measured on text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator

from hf_switch_sae.cli.loading import load_sae, split_address
from hf_switch_sae.cli.options import (
    AllowMismatch,
    Boundary,
    Column,
    ContextLength,
    Dataset,
    DeviceMap,
    GgufFile,
    LmAddress,
    LmDtype,
    LmRevision,
    SaeAddress,
    Split,
    Subfolder,
    TokensPerPass,
)
from hf_switch_sae.cli.tables import print_table
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.evaluation.evaluate import shown_digits, write_metrics
from hf_switch_sae.hub.layout import METRICS
from hf_switch_sae.lm.loading import has_head, load_lm
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import ActivationSettings, evaluate


def evaluate_sae(
    sae: SaeAddress,
    lm: LmAddress,
    dataset: Dataset,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Another SAE to measure in the same pass, as SAE or SAE:subfolder."),
    ] = None,
    subfolder: Subfolder = "",
    column: Column = "text",
    split: Split = "train",
    context: ContextLength = 256,
    packing: Annotated[
        str,
        typer.Option(help="packed: documents joined and cut; windows: each by itself; or auto."),
    ] = "auto",
    boundary: Boundary = "auto",
    skip_special: Annotated[bool, typer.Option(help="Leave out special tokens.")] = True,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many tokens.")
    ] = None,
    tokens_per_pass: TokensPerPass = None,
    lm_dtype: LmDtype = "auto",
    device_map: DeviceMap = None,
    revision: LmRevision = None,
    gguf_file: GgufFile = None,
    allow_mismatch: AllowMismatch = False,
    write: Annotated[
        bool, typer.Option("--write", help=f"Store the figures as {METRICS} in the SAE's folder.")
    ] = False,
) -> None:
    """Measure what an SAE loses on held-out text.

    That is FVU, L0, the share of dead features, CE recovered and KL.
    """
    # addresses are checked before anything is loaded
    named = _addresses(sae, subfolder, also or [], write)
    process = Accelerator(cpu=not torch.accelerator.is_available())  # joins those of a launcher
    settings = ActivationSettings(
        context=context,
        packing=packing,  # type: ignore[arg-type]
        boundary=boundary,
        skip_special=skip_special,
        tokens_per_pass=tokens_per_pass,
    )
    saes = {name: load_sae(*address) for name, address in named.items()}
    places = [at for each in saes.values() if (at := each.config.hookpoint) is not None]
    documents = read_documents(dataset, column=column, split=split)

    # a model without its head would get a random one, and with it wrong predictions
    with_head = gguf_file is not None or has_head(lm, revision)
    model, tokenizer = load_lm(
        lm, lm_dtype, device_map, revision, with_head, gguf_file=gguf_file, places=places or None
    )
    options: dict[str, Any] = {"max_tokens": max_tokens, "allow_mismatch": allow_mismatch}
    found = evaluate(saes, model, documents, tokenizer, settings, **options)
    if process.is_main_process:
        _show(found, write)
    process.end_training()


def _show(found: dict[str, dict[str, Any]], write: bool) -> None:
    """Print the figures with the digits they are stored with, and store them if asked to."""
    shown = {
        name: write_metrics(Path(name), figures) if write else shown_digits(figures)
        for name, figures in found.items()
    }
    _print_figures(shown)
    for name in found if write else ():
        print(f"stored in {Path(name) / METRICS}", file=sys.stderr)


def _addresses(
    sae: str, subfolder: str, also: list[str], write: bool
) -> dict[str, tuple[str, str]]:
    """Folder of each SAE -> its address and subfolder.

    Raises:
        SwitchSAEError: an SAE is given twice, or there is no folder to write to.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, below in [(sae, subfolder), *(split_address(each) for each in also)]:
        folder = Path(name) / below
        if write and not folder.is_dir():
            raise SwitchSAEError(
                f"{name} is no folder here, so nothing can be stored in it: pull it."
            )
        if str(folder) in found:
            raise SwitchSAEError(f"the SAE {folder} is given twice.")
        # the key is also where `_show` stores the figures
        found[str(folder)] = (name, below)
    return found


def _print_figures(shown: dict[str, dict[str, Any]]) -> None:
    """Print a table with a column for each SAE, and what the figures were measured on."""
    # not every SAE has every figure: those of one expert have no routing
    names = [name for each in shown.values() for name in each]
    rows = [
        [name, *(str(each.get(name, "")) for each in shown.values())]
        for name in dict.fromkeys(names)
        if name not in ("measured_on", "density")
    ]
    print_table(rows, ["", *(Path(name).name for name in shown)] if len(shown) > 1 else ())

    # the first speaks for all: one pass over one text
    on = next(iter(shown.values()))["measured_on"]
    bound = "none" if on["outlier_norm"] is None else f"norms over {on['outlier_norm']:.5g}"
    files = ", ".join(file["name"] for file in on["dataset"].get("files", ()))
    text = files or on["dataset"].get("name") or "a list of texts"
    contexts = f"{on['contexts']} contexts of {on['context']} tokens of {text}"
    print(f"at {on['hookpoint']}, {contexts}; outliers: {bound}")

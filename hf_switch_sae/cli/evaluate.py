"""`hf-switch-sae eval`: what a finished SAE loses, measured on text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator

from hf_switch_sae.cli.loading import load_sae, split_address
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.evaluation.evaluate import shown_digits, write_metrics
from hf_switch_sae.hub.layout import METRICS
from hf_switch_sae.lm.loading import has_head, load_lm
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import ActivationSettings, evaluate


def evaluate_sae(
    sae: Annotated[str, typer.Argument(help="Hub id or folder of the SAE.")],
    lm: Annotated[str, typer.Argument(help="Hub id or folder of its language model.")],
    dataset: Annotated[
        str,
        typer.Argument(help="Held-out text: a .txt, .md, .jsonl or .parquet file, or a Hub id."),
    ],
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Another SAE of that place, in the same pass: folder or Hub id, :subfolder."
        ),
    ] = None,
    subfolder: Annotated[str, typer.Option(help="Where the SAE lies in its repository.")] = "",
    column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    context: Annotated[int, typer.Option(min=1, help="Tokens the model sees at once.")] = 256,
    packing: Annotated[
        str, typer.Option(help="packed: documents joined and cut; windows: each by itself; auto.")
    ] = "auto",
    boundary: Annotated[
        str, typer.Option(help="Between documents: auto, bos, eos, none or a token's text.")
    ] = "auto",
    skip_special: Annotated[bool, typer.Option(help="Leave out special tokens.")] = True,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    tokens_per_pass: Annotated[int | None, typer.Option(min=1, help="Of the model.")] = None,
    lm_dtype: Annotated[str, typer.Option(help="Of the language model.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="Where its weights go.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the language model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in LM's folder.")] = None,
    allow_mismatch: Annotated[
        bool, typer.Option(help="Accept another language model than the SAE's.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help=f"Store the figures as {METRICS} in the SAE's folder.")
    ] = False,
) -> None:
    """Measure FVU, L0, dead share, CE recovered and KL of an SAE on held-out text."""
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
    places = {each.config.hookpoint for each in saes.values()} - {None}
    documents = read_documents(dataset, column=column, split=split)
    model, tokenizer = load_lm(
        lm,
        lm_dtype,
        device_map,
        revision,
        with_head=gguf_file is not None or has_head(lm, revision),
        gguf_file=gguf_file,
        places=[str(place) for place in places] or None,
    )
    options: dict[str, Any] = {"max_tokens": max_tokens, "allow_mismatch": allow_mismatch}
    found = evaluate(saes, model, documents, tokenizer, settings, **options)
    if process.is_main_process:
        _show(found, write)
    process.end_training()


def _show(found: dict[str, dict[str, Any]], write: bool) -> None:
    """Print the figures, as they are stored if they are to be."""
    shown = {
        name: write_metrics(Path(name), figures) if write else shown_digits(figures)
        for name, figures in found.items()
    }
    print(table(shown))
    for name in found if write else ():
        print(f"stored in {Path(name) / METRICS}", file=sys.stderr)


def _addresses(
    sae: str, subfolder: str, also: list[str], write: bool
) -> dict[str, tuple[str, str]]:
    """Where each SAE would lie -> its address and subfolder; checked before anything is loaded."""
    found: dict[str, tuple[str, str]] = {}
    for name, below in [(sae, subfolder), *(split_address(each) for each in also)]:
        folder = Path(name) / below
        if write and not folder.is_dir():
            raise SwitchSAEError(
                f"{name} is no folder here, so nothing can be stored in it: pull it."
            )
        if str(folder) in found:
            raise SwitchSAEError(f"the SAE {folder} is given twice.")
        found[str(folder)] = (name, below)
    return found


def table(shown: dict[str, dict[str, Any]]) -> str:
    """Figures by SAE, one a line, and what they were measured on."""
    first = next(iter(shown.values()))
    on = first["measured_on"]
    names = [name for each in shown.values() for name in each]
    rows = [
        [name, *(str(each.get(name, "")) for each in shown.values())]
        for name in dict.fromkeys(names)
        if name not in ("measured_on", "density")
    ]
    if len(shown) > 1:
        rows.insert(0, ["", *(Path(name).name for name in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    bound = "none" if on["outlier_norm"] is None else f"norms over {on['outlier_norm']:.5g}"
    files = ", ".join(file["name"] for file in on["dataset"].get("files", ()))
    text = files or on["dataset"].get("name") or "a list of texts"
    said = f"{on['contexts']} contexts of {on['context']} tokens of {text}; outliers: {bound}"
    return "\n".join([*lines, f"at {on['hookpoint']}, {said}"])

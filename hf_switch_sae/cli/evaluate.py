"""`hf-switch-sae eval`: what a finished SAE loses, measured on text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_switch_sae.cli.language_model import has_head, load_lm
from hf_switch_sae.cli.record import load_sae
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.text import read_documents
from hf_switch_sae.training import ActivationSettings, evaluate
from hf_switch_sae.training.evaluation import METRICS, shown_digits, write_metrics


def evaluate_sae(
    sae: Annotated[str, typer.Argument(help="Hub id or folder of the SAE.")],
    lm: Annotated[str, typer.Argument(help="Hub id or folder of its language model.")],
    dataset: Annotated[
        str,
        typer.Argument(help="Held-out text: a .txt, .md, .jsonl or .parquet file, or a Hub id."),
    ],
    subfolder: Annotated[str, typer.Option(help="Where the SAE lies in its repository.")] = "",
    column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    context: Annotated[int, typer.Option(min=1, help="Tokens the model sees at once.")] = 256,
    boundary: Annotated[
        str, typer.Option(help="Between documents: auto, bos, eos, none or a token's text.")
    ] = "auto",
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
    folder = Path(sae) / subfolder
    if write and not folder.is_dir():
        raise SwitchSAEError(f"{sae} is no folder here, so nothing can be stored in it: pull it.")
    switch_sae = load_sae(sae, subfolder)
    place = switch_sae.config.hookpoint
    documents = read_documents(dataset, column=column, split=split)
    model, tokenizer = load_lm(
        lm,
        lm_dtype,
        device_map,
        revision,
        with_head=gguf_file is not None or has_head(lm, revision),
        gguf_file=gguf_file,
        places=None if place is None else [place],
    )
    found = evaluate(
        switch_sae,
        model,
        documents,
        tokenizer,
        ActivationSettings(context=context, boundary=boundary, tokens_per_pass=tokens_per_pass),
        max_tokens=max_tokens,
        allow_mismatch=allow_mismatch,
    )
    shown = write_metrics(folder, found) if write else shown_digits(found)
    print(table(shown))
    if write:
        print(f"stored in {folder / METRICS}", file=sys.stderr)


def table(shown: dict[str, Any]) -> str:
    """Figures, one a line, and what they were measured on."""
    on = shown["measured_on"]
    figures = {name: value for name, value in shown.items() if name != "measured_on"}
    width = max(map(len, figures))
    lines = [f"{name:<{width}}  {value}" for name, value in figures.items()]
    bound = "none" if on["outlier_norm"] is None else f"norms over {on['outlier_norm']:.5g}"
    files = ", ".join(file["name"] for file in on["dataset"].get("files", ()))
    text = files or on["dataset"].get("name") or "a list of texts"
    said = f"{on['contexts']} contexts of {on['context']} tokens of {text}; outliers: {bound}"
    return "\n".join([*lines, f"at {on['hookpoint']}, {said}"])

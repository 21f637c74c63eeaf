"""`hf-switch-sae calibrate`: measure how strongly and how often features fire, for any SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.cli.loading import load_sae
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.lm.loading import load_lm
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import ActivationSettings, calibrate
from hf_switch_sae.training.checkpoints import begin, move_files


def calibrate_sae(
    sae: Annotated[str, typer.Argument(help="Hub id or folder of the SAE, converted ones too.")],
    lm: Annotated[str, typer.Argument(help="Hub id or folder of its language model.")],
    dataset: Annotated[
        str, typer.Argument(help="A .txt, .md, .jsonl or .parquet file, a folder, or a Hub id.")
    ],
    output_dir: Annotated[
        Path | None, typer.Option(help="Where to save it; by default the SAE's own folder.")
    ] = None,
    subfolder: Annotated[str, typer.Option(help="Where the SAE lies in its repository.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Tokens to measure on.")] = 65536,
    column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    context: Annotated[int, typer.Option(min=1, help="Tokens the model sees at once.")] = 256,
    boundary: Annotated[
        str, typer.Option(help="Between documents: auto, bos, eos, none or a token's text.")
    ] = "auto",
    lm_dtype: Annotated[str, typer.Option(help="Of the language model.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="Where its weights go.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the language model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in LM's folder.")] = None,
) -> None:
    """Measure an SAE's statistics on text, and save it with them: edits rest on these."""
    folder = Path(sae) / subfolder
    if output_dir is None and not folder.is_dir():
        raise SwitchSAEError(f"{sae} is no folder here: say where to save it, with --output-dir.")
    switch_sae = load_sae(sae, subfolder)
    place = switch_sae.config.hookpoint
    if place is None:
        raise SwitchSAEError(
            f"the config of {sae} has no hookpoint: it was not converted with one."
        )
    model, tokenizer = load_lm(
        lm,
        lm_dtype,
        device_map,
        revision,
        with_head=gguf_file is not None,
        gguf_file=gguf_file,
        places=[place],
    )
    settings = ActivationSettings(context=context, boundary=boundary)
    documents = read_documents(dataset, column=column, split=split)
    calibrate(switch_sae, model, documents, tokenizer, rows, settings)
    target = output_dir or folder
    partial = begin(target)
    switch_sae.save_pretrained(partial)
    move_files(partial, target)
    print(
        f"{target}: {int(switch_sae.statistics_tokens):,} tokens; "
        f"{float((switch_sae.feature_rate == 0).float().mean()):.1%} of "
        f"{switch_sae.config.num_features:,} features never fired; median norm "
        f"{float(switch_sae.residual_norm):.4g}"
    )

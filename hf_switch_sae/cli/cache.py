"""`hf-switch-sae cache`: residual streams of a corpus, on disk, for many trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.activations.cache_reader import CachedActivations
from hf_switch_sae.activations.cache_writer import cache_activations
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.lm.loading import load_lm


def cache(
    lm: Annotated[str, typer.Argument(help="Hub id or folder of the language model.")],
    dataset: Annotated[
        str, typer.Argument(help="A .txt, .md, .jsonl or .parquet file, a folder, or a Hub id.")
    ],
    to: Annotated[Path, typer.Option(help="Folder of the cache, new or to go on with.")],
    layer: Annotated[
        list[str], typer.Option(help="Layer, hookpoint or module path; several times for several.")
    ],
    column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    context: Annotated[int, typer.Option(min=1, help="Tokens the model sees at once.")] = 256,
    boundary: Annotated[
        str, typer.Option(help="Between documents: auto, bos, eos, none or a token's text.")
    ] = "auto",
    outlier_factor: Annotated[
        float, typer.Option(help="Leave out tokens of so many times the median norm; 0: none.")
    ] = 6.0,
    tokens_per_pass: Annotated[int | None, typer.Option(min=1, help="Of the model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop at about so many.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Most that files take.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the rows: bfloat16 or float32.")] = "bfloat16",
    lm_dtype: Annotated[str, typer.Option(help="Of the language model.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="Where its weights go.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the language model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in LM's folder.")] = None,
) -> None:
    """Harvest the residual streams of a corpus for training; goes on where it was."""
    places = [int(place) if place.isdecimal() else place for place in layer]
    model, tokenizer = load_lm(
        lm,
        lm_dtype,
        device_map,
        revision,
        with_head=gguf_file is not None,
        gguf_file=gguf_file,
        places=places,
    )
    folder = cache_activations(
        model,
        places,
        dataset,
        to,
        tokenizer,
        ActivationSettings(
            context=context,
            boundary=boundary,
            outlier_factor=outlier_factor or None,
            tokens_per_pass=tokens_per_pass,
            dtype=dtype,
        ),
        column=column,
        split=split,
        lm_revision=revision,
        max_rows=max_tokens,
        max_bytes=max_bytes,
    )
    found = CachedActivations(folder)
    size = found.estimate()["bytes_on_disk"]
    print(
        f"{folder}: {found.num_rows:,} tokens at {', '.join(found.hookpoints)}; {size:,} bytes; "
        f"stopped by {found.manifest['complete']['stopped_by']}"
    )

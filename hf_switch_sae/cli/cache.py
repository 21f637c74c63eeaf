"""`hf-switch-sae cache`: the residual streams of a corpus, on disk, to train from many times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.activations.cache_reader import CachedActivations
from hf_switch_sae.activations.cache_writer import cache_activations
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.cli.options import (
    Boundary,
    Column,
    ContextLength,
    Dataset,
    DeviceMap,
    GgufFile,
    LmAddress,
    LmDtype,
    LmRevision,
    Split,
    TokensPerPass,
)
from hf_switch_sae.lm.loading import load_lm


def cache(
    lm: LmAddress,
    dataset: Dataset,
    to: Annotated[Path, typer.Option(help="Folder of the cache, new or to continue.")],
    layer: Annotated[
        list[str], typer.Option(help="Layer, hookpoint or module path; repeat it for several.")
    ],
    column: Column = "text",
    split: Split = "train",
    context: ContextLength = 256,
    boundary: Boundary = "auto",
    outlier_factor: Annotated[
        float,
        typer.Option(help="Leave out tokens over so many times the median norm; 0: none."),
    ] = 6.0,
    tokens_per_pass: TokensPerPass = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after about so many tokens.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes that the cache may take on disk.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the rows: bfloat16 or float32.")
    ] = "bfloat16",
    lm_dtype: LmDtype = "auto",
    device_map: DeviceMap = None,
    revision: LmRevision = None,
    gguf_file: GgufFile = None,
) -> None:
    """Store the residual streams of a corpus, for training.

    What is in the cache already is not computed again.
    """
    # only the blocks up to the deepest hookpoint are loaded; a GGUF file is always loaded whole
    places = [int(place) if place.isdecimal() else place for place in layer]
    whole = gguf_file is not None
    model, tokenizer = load_lm(
        lm, lm_dtype, device_map, revision, whole, gguf_file=gguf_file, places=places
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
    _show(folder)


def _show(folder: Path) -> None:
    """Print what a cache holds."""
    found = CachedActivations(folder)
    size = found.estimate()["bytes_on_disk"]
    print(
        f"{folder}: {found.num_rows:,} tokens at {', '.join(found.hookpoints)}; {size:,} bytes; "
        f"stopped by {found.manifest['complete']['stopped_by']}"
    )

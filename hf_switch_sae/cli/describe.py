"""`hf-switch-sae describe`: a few words on each feature of an SAE, from a store of its features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.cli.loading import load_tokenizer
from hf_switch_sae.cli.options import Tokenizer, TokenizerGguf
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.hub.layout import CONFIG, DESCRIPTIONS
from hf_switch_sae.store import FeatureStore
from hf_switch_sae.store.descriptions import describe, write_descriptions


def describe_features(
    store: Annotated[Path, typer.Argument(help="Folder of the store: see record.")],
    sae: Annotated[Path, typer.Argument(help="Folder of the SAE that was recorded.")],
    tokenizer: Tokenizer = None,
    gguf_file: TokenizerGguf = None,
    strongest: Annotated[
        int, typer.Option(min=1, help="Tokens to look at for each feature, the strongest.")
    ] = 12,
    words: Annotated[int, typer.Option(min=1, help="Most words to keep for each feature.")] = 4,
) -> None:
    """Find the words that each feature fires on most strongly.

    Writes features.json beside the SAE.
    """
    if not (sae / CONFIG).exists():
        raise SwitchSAEError(f"there is no SAE in {sae}: no {CONFIG}.")
    opened = FeatureStore(store)
    table = describe(opened, load_tokenizer(opened, tokenizer, gguf_file), strongest, words)
    write_descriptions(table, sae / DESCRIPTIONS)
    print(f"{sae / DESCRIPTIONS}: {len(table):,} of {opened.num_features:,} features")

"""`hf-switch-sae describe`: a few words on each feature of an SAE, from a store of its features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.hub.layout import CONFIG, DESCRIPTIONS
from hf_switch_sae.store import FeatureStore
from hf_switch_sae.store.descriptions import describe, write_descriptions


def describe_features(
    store: Annotated[Path, typer.Argument(help="Folder of the store: see record.")],
    sae: Annotated[Path, typer.Argument(help="Folder of the SAE that was recorded.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or folder; the store's own by default.")
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="A GGUF file in the tokenizer's folder.")
    ] = None,
    strongest: Annotated[int, typer.Option(min=1, help="Tokens looked at, a feature.")] = 12,
    words: Annotated[int, typer.Option(min=1, help="Words kept, at most.")] = 4,
) -> None:
    """Write features.json beside an SAE: the words each feature is strongest on."""
    if not (sae / CONFIG).exists():
        raise SwitchSAEError(f"there is no SAE in {sae}: no {CONFIG}.")
    opened = FeatureStore(store)
    name = tokenizer or (opened.provenance.tokenizer or {}).get("name")
    if not name:
        raise SwitchSAEError("the store names no tokenizer: give one with --tokenizer.")
    where = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        known = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError) as err:
        raise SwitchSAEError(f"no tokenizer at {name}: {err}") from err
    table = describe(opened, known, strongest, words)
    write_descriptions(table, sae / DESCRIPTIONS)
    print(f"{sae / DESCRIPTIONS}: {len(table):,} of {opened.num_features:,} features")

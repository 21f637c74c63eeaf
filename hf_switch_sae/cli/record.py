"""`hf-switch-sae record`: features of a corpus, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.cli.loading import load_sae
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.lm.loading import load_lm
from hf_switch_sae.processes import rank_and_world
from hf_switch_sae.sessions.record_corpus import record
from hf_switch_sae.store import FeatureStore


def record_corpus(
    sae: Annotated[str, typer.Argument(help="Hub id or folder of the SAE.")],
    dataset: Annotated[
        str, typer.Argument(help="A .txt, .md, .jsonl or .parquet file, a folder, or a Hub id.")
    ],
    store: Annotated[Path, typer.Argument(help="Folder of the store, new or to go on with.")],
    lm: Annotated[
        str | None, typer.Option(help="Hub id or folder of the language model; the SAE's own.")
    ] = None,
    subfolder: Annotated[str, typer.Option(help="Where the SAE lies in its repository.")] = "",
    at: Annotated[str | None, typer.Option(help="The place; the SAE's own by default.")] = None,
    column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    context: Annotated[int, typer.Option(min=1, help="Tokens the model sees at once.")] = 512,
    prefix: Annotated[str, typer.Option(help="Text before each window, not recorded.")] = "",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = 4096,
    max_documents: Annotated[int | None, typer.Option(min=0, help="Stop after so many.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Stop after the file (see --shard-tokens) that reaches so many."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(min=0, help="Budget for tokens/.")] = None,
    shard_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a file, about; recording stops between files.")
    ] = 1 << 17,
    dtype: Annotated[str, typer.Option(help="Of the language model.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="Where its weights go.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the language model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in LM's folder.")] = None,
    index: Annotated[bool, typer.Option(help="Build the index, if not under a launcher.")] = True,
    allow_mismatch: Annotated[
        bool, typer.Option(help="Accept another language model than the SAE's.")
    ] = False,
) -> None:
    """Record which features are active on every token of a corpus; goes on where it was."""
    switch_sae = load_sae(sae, subfolder)
    name = lm or switch_sae.config.base_model
    if name is None:
        raise SwitchSAEError("the SAE's config names no language model: give one with --lm.")
    _, world = rank_and_world()
    model, tokenizer = load_lm(name, dtype, device_map, revision, gguf_file=gguf_file)
    found = record(
        model,
        switch_sae,
        dataset,
        store,
        tokenizer=tokenizer,
        at=at,
        column=column,
        split=split,
        context=context,
        prefix=tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else (),
        batch_tokens=batch_tokens,
        max_documents=max_documents,
        max_tokens=max_tokens,
        max_bytes=max_bytes,
        shard_tokens=shard_tokens,
        lm_revision=revision,
        allow_mismatch=allow_mismatch,
    )
    assert isinstance(found, FeatureStore)
    # the process of a launcher that ends first sees only a part of what there will be
    alone = world == 1
    if index and alone and found.shards:
        found.index()
    used = found.disk_usage()
    print(
        f"{store}: {found.num_tokens:,} tokens of documents 0 to "
        f"{found.shards[-1].last if found.shards else 0:,}; {used['tokens']:,} bytes of tokens, "
        f"{used['index']:,} of index"
    )
    if index and not alone:
        print(
            "not indexed, as other processes may still record: when all have ended, run "
            f"python -c \"from hf_switch_sae import FeatureStore; FeatureStore('{store}').index()\""
        )

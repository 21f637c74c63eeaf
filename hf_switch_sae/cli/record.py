"""`hf-switch-sae record`: the features of a corpus, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.cli.loading import load_sae
from hf_switch_sae.cli.options import (
    AllowMismatch,
    Column,
    ContextLength,
    Dataset,
    DeviceMap,
    GgufFile,
    LmDtype,
    LmRevision,
    SaeAddress,
    Split,
    Subfolder,
)
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.lm.loading import load_lm
from hf_switch_sae.processes import rank_and_world
from hf_switch_sae.sessions.record_corpus import record


def record_corpus(
    sae: SaeAddress,
    dataset: Dataset,
    store: Annotated[Path, typer.Argument(help="Folder of the store, new or to continue.")],
    lm: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the language model; by default the SAE's own."),
    ] = None,
    subfolder: Subfolder = "",
    at: Annotated[str | None, typer.Option(help="Hookpoint; by default the SAE's own.")] = None,
    column: Column = "text",
    split: Split = "train",
    context: ContextLength = 512,
    prefix: Annotated[str, typer.Option(help="Text before each window, not recorded.")] = "",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a forward pass.")] = 4096,
    max_documents: Annotated[
        int | None, typer.Option(min=0, help="Stop after so many documents.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Stop after the file (see --shard-tokens) that reaches so many."),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes that the tokens may take on disk.")
    ] = None,
    shard_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in a file, about; recording stops between files.")
    ] = 1 << 17,
    dtype: LmDtype = "auto",
    device_map: DeviceMap = None,
    revision: LmRevision = None,
    gguf_file: GgufFile = None,
    index: Annotated[bool, typer.Option(help="Build the index; not done under a launcher.")] = True,
    allow_mismatch: AllowMismatch = False,
) -> None:
    """Record which features fire on every token of a corpus.

    What is in the store already is not recorded again.
    """
    switch_sae = load_sae(sae, subfolder)
    # the language model that the SAE was made for, unless another is named
    name = lm or switch_sae.config.base_model
    if name is None:
        raise SwitchSAEError("the SAE's config names no language model: give one with --lm.")
    # now, as a launcher's variables that contradict each other are an error
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
    # of several processes, the first to end sees only a part of what there will be
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
            "not indexed, as other processes may still be recording: when all have ended, run "
            f"python -c \"from hf_switch_sae import FeatureStore; FeatureStore('{store}').index()\""
        )

"""`hf-switch-sae calibrate`: measure how strongly and how often features fire, for any SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_switch_sae.cli.loading import load_sae
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
    SaeAddress,
    Split,
    Subfolder,
)
from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.lm.loading import load_lm
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import ActivationSettings, calibrate
from hf_switch_sae.training.checkpoints import begin, move_files


def calibrate_sae(
    sae: SaeAddress,
    lm: LmAddress,
    dataset: Dataset,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where to save it; by default the SAE's own folder.")
    ] = None,
    subfolder: Subfolder = "",
    rows: Annotated[int, typer.Option(min=1, help="Tokens to measure on.")] = 65536,
    column: Column = "text",
    split: Split = "train",
    context: ContextLength = 256,
    boundary: Boundary = "auto",
    lm_dtype: LmDtype = "auto",
    device_map: DeviceMap = None,
    revision: LmRevision = None,
    gguf_file: GgufFile = None,
) -> None:
    """Measure how strongly and how often an SAE's features fire.

    The SAE is saved with these statistics, which edits take as their unit.
    """
    folder = Path(sae) / subfolder
    # asked now, not after minutes of measuring
    if output_dir is None and not folder.is_dir():
        raise SwitchSAEError(f"{sae} is no folder here: say where to save it, with --output-dir.")
    switch_sae = load_sae(sae, subfolder)
    place = switch_sae.config.hookpoint
    if place is None:
        raise SwitchSAEError(
            f"the config of {sae} has no hookpoint: it was not converted with one."
        )
    # only the blocks up to the hookpoint, but a GGUF file is always loaded whole
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

    # whole or not at all, as the SAE may be replaced by its calibrated self
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

"""The end of a run: features' strengths measured, and what the SAE came from written beside it.

<hookpoint>/config.json, model.safetensors     the SAE
<hookpoint>/training.json                      policy, arguments, steps, tokens, versions
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.training.activations import Activations
from hf_switch_sae.training.harvest import ActivationSettings
from hf_switch_sae.training.setup import activations_for

NOTES = "training.json"
_BATCH = 4096
_PRIVATE = ("output_dir", "logging_dir", "hub_", "push_", "local_rank", "use_cpu", "disable_tqdm")
_FOLLOWS = {"accelerator_config", "report_to", "run_name", "debug", "resume_from_checkpoint"}


def calibrate(
    sae: SwitchSAE,
    lm: nn.Module | None,
    dataset: Any,
    tokenizer: Any = None,
    rows: int = 65536,
    settings: ActivationSettings | None = None,
) -> SwitchSAE:
    """Measure an SAE's statistics on a language model and text, as at the end of a training run.

    Args:
        sae: changed in place (`SwitchSAE.calibrate`); its `outlier_norm` too, if it has none.
        lm: the language model; None with `Activations`.
        dataset: texts, or what else `text.read_documents` takes, or `Activations`.
        tokenizer: the model's.
        rows: how many to measure on.
        settings: how text becomes rows.

    Returns:
        The SAE.

    Raises:
        HookpointError, WidthError, TextError: the SAE, model and text don't fit.
    """
    activations = activations_for({"": sae}, dataset, lm, tokenizer, settings)
    place = str(sae.config.hookpoint)
    if torch.isinf(sae.outlier_norm):
        bound = activations.policy["outlier_norm"].get(place)
        if bound is not None:
            sae.outlier_norm.fill_(bound)
    calibrate_on(sae, activations.sample(rows)[place])
    return sae


def calibrate_on(sae: SwitchSAE, rows: Tensor) -> None:
    """`SwitchSAE.calibrate` on rows [n, d] in batches; reduced dtypes are left as they are."""
    sae.calibrate(part.to(sae.device) for part in torch.split(rows, _BATCH))


def write_notes(
    folder: Path, sae: SwitchSAE, activations: Activations, run: dict[str, Any]
) -> None:
    """Write what an SAE came from beside it."""
    notes = {
        "hookpoint": sae.config.hookpoint,
        "base_model": sae.config.base_model,
        "policy": activations.policy,
        **run,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    text = json.dumps(notes, indent=2, default=str) + "\n"
    (folder / NOTES).write_text(text, encoding="utf-8")


def arguments_of(args: Any) -> dict[str, Any]:
    """Those of a run that differ from their defaults, without folders, hosts and tokens."""
    # a second instance, for its defaults, would reset the accelerator
    default = {
        each.name: each.default_factory() if callable(each.default_factory) else each.default
        for each in fields(args)
        if each.init
    }
    return {
        name: value
        for name, value in args.to_dict().items()
        if name in default and value != default[name] and name not in _FOLLOWS
        if not name.startswith(_PRIVATE)
    }


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """To the digits that are worth writing down."""
    return {name: float(f"{value:.5g}") for name, value in figures.items()}

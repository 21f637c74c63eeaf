"""Measures an SAE's statistics, such as each feature's strength, on text or rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.activations.live import activations_for
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.sae.model import SwitchSAE

_BATCH = 4096  # rows at once


def calibrate(
    sae: SwitchSAE,
    lm: nn.Module | None,
    dataset: Any,
    tokenizer: Any = None,
    rows: int = 65536,
    settings: ActivationSettings | None = None,
) -> SwitchSAE:
    """Measure an SAE's statistics on a language model and text, as the end of training does.

    Args:
        sae: changed in place (`SwitchSAE.calibrate`), including its `outlier_norm` if it has none.
        lm: the language model; None if `dataset` is `Activations`.
        dataset: anything that `text.read_documents` takes, or `Activations`.
        tokenizer: the model's.
        rows: how many rows to measure on.
        settings: how text becomes rows.

    Returns:
        The same SAE.

    Raises:
        HookpointError, WidthError, TextError: SAE, model and text do not fit together.
    """
    hookpoint = str(sae.config.hookpoint)
    readers = {"": (hookpoint, sae.config.hidden_size)}
    activations = activations_for(readers, dataset, lm, tokenizer, settings)
    # before measuring, so that outliers are left out
    if torch.isinf(sae.outlier_norm):
        bound = activations.policy["outlier_norm"].get(hookpoint)
        if bound is not None:
            sae.outlier_norm.fill_(bound)
    calibrate_on(sae, activations.sample(rows)[hookpoint])
    return sae


def calibrate_on(sae: SwitchSAE, rows: Tensor) -> None:
    """`SwitchSAE.calibrate` on rows [n, d], in batches."""
    sae.calibrate(part.to(sae.device) for part in torch.split(rows, _BATCH))

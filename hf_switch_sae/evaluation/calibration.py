"""The end of a run: features' strengths measured, and what the SAE came from written beside it.

<hookpoint>/config.json, model.safetensors     the SAE
<hookpoint>/training.json                      policy, arguments, steps, tokens, versions
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.activations.live import activations_for
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.sae.model import SwitchSAE

_BATCH = 4096


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
    place = str(sae.config.hookpoint)
    readers = {"": (place, sae.config.hidden_size)}
    activations = activations_for(readers, dataset, lm, tokenizer, settings)
    if torch.isinf(sae.outlier_norm):
        bound = activations.policy["outlier_norm"].get(place)
        if bound is not None:
            sae.outlier_norm.fill_(bound)
    calibrate_on(sae, activations.sample(rows)[place])
    return sae


def calibrate_on(sae: SwitchSAE, rows: Tensor) -> None:
    """`SwitchSAE.calibrate` on rows [n, d] in batches; reduced dtypes are left as they are."""
    sae.calibrate(part.to(sae.device) for part in torch.split(rows, _BATCH))

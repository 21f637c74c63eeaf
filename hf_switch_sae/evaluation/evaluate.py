"""Finished SAEs on held-out text -> the figures of metrics.json, and what they were measured on.

    fvu, mse, cosine, l0, dead_share    on the rows that the token policy keeps (`RowSums`)
    expert_load, routing_entropy        how evenly the experts are used
    fvu_all_tokens, outlier_tokens      including the tokens whose norm the policy would leave out
    density                             how many features are active how often
    ce_clean, ce_spliced                nats per token, of the predictions made at those rows: by
                                        the model as it is, and with the SAE spliced in (`attach`)
    ce_ablated, ce_zero                 likewise, with the stream replaced by a mean, or by 0
    ce_recovered                        (ablated - spliced) / (ablated - clean)
    ce_recovered_zero                   (zero - spliced) / (zero - clean), as others report it: it
                                        is larger if a model without its stream is worse than chance
    kl                                  KL divergence of the spliced predictions from the clean ones

How    Only what the SAE reads is replaced: outliers stay in the stream, as when it is attached. The
       mean is that of the text's first rows, so it is the same for every SAE of the hookpoint.
       Several SAEs share one pass of the model as it is; a token that is an outlier for one of them
       is left out for all. Processes that torch.distributed joins share the contexts, and each
       gets the figures of all.
Beware Cross entropy and KL are measured only for causal models with a head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from torch import nn

from hf_switch_sae.activations.harvest import Harvest
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.errors import ConfigError, TrainingError, WidthError
from hf_switch_sae.evaluation.sweep import Sweep
from hf_switch_sae.files import rounded, write_json
from hf_switch_sae.hub.layout import CONFIG, METRICS
from hf_switch_sae.lm.config import vocabulary_size
from hf_switch_sae.lm.fingerprint import check_base_model
from hf_switch_sae.lm.hookpoints import resolve, unwrap
from hf_switch_sae.processes import shows_progress
from hf_switch_sae.sae.model import SwitchSAE

_LOGITS_A_PASS = 1 << 26  # tokens times vocabulary; at most three such tensors are held at once


@overload
def evaluate(
    sae: SwitchSAE,
    lm: nn.Module,
    dataset: Any,
    tokenizer: Any = None,
    settings: ActivationSettings | None = None,
    *,
    max_tokens: int | None = None,
    allow_mismatch: bool = False,
    alone: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]: ...


@overload
def evaluate(
    sae: Mapping[str, SwitchSAE],
    lm: nn.Module,
    dataset: Any,
    tokenizer: Any = None,
    settings: ActivationSettings | None = None,
    *,
    max_tokens: int | None = None,
    allow_mismatch: bool = False,
    alone: bool = False,
    progress: bool | None = None,
) -> dict[str, dict[str, Any]]: ...


def evaluate(
    sae: SwitchSAE | Mapping[str, SwitchSAE],
    lm: nn.Module,
    dataset: Any,
    tokenizer: Any = None,
    settings: ActivationSettings | None = None,
    *,
    max_tokens: int | None = None,
    allow_mismatch: bool = False,
    alone: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure an SAE, or several, in one pass over text they were not trained on.

    Args:
        sae: reads at its config's hookpoint; its `outlier_norm` decides which tokens are outliers
            (none without it, see `calibrate`). Or {name: SAE}, for several of one hookpoint, all
            measured on the tokens that are an outlier for none of them.
        lm: its language model, in eval mode.
        dataset: held-out text: anything that `text.read_documents` takes.
        tokenizer: the model's.
        settings: how text becomes rows; `outlier_factor` is not used.
        max_tokens: stop before the context with which the model would have read more.
        allow_mismatch: accept another language model than the SAE's.
        alone: this process measures the whole text by itself. Otherwise every process that
            torch.distributed joins must call this, and measures a share.
        progress: whether to show a bar on stderr; by default only if that is a terminal.

    Returns:
        JSON-able figures by name (see the module's header), with `tokens` and `ce_tokens` (how many
        rows and predictions they are of), `density` (see `RowSums.density`) and `measured_on`
        (text, contexts, token policy, language model). For a mapping {name: such a dict}.

    Raises:
        ConfigError: the SAE's config has no hookpoint, or several SAEs have different ones.
        BaseModelError, WidthError, AttachError, HookpointError: SAE and model do not fit.
        TextError: the data set is empty, its texts are shorter than a context, or the tokenizer
            is another model's.
        TrainingError: max_tokens is less than one context, or no token of the text is kept.
    """
    saes = dict(sae) if isinstance(sae, Mapping) else {"": sae}
    _check_hookpoints(saes)
    if not allow_mismatch:
        for each in saes.values():
            read = resolve(lm, str(each.config.hookpoint)).module
            check_base_model(lm, each.config.base_model, each.config.base_model_fingerprint, read)
    harvest = _harvest(saes, lm, dataset, tokenizer, settings or ActivationSettings())
    if max_tokens is not None and max_tokens < harvest.settings.context:
        raise TrainingError(
            f"max_tokens={max_tokens} is less than one context of {harvest.settings.context}."
        )
    modes = {name: each.training for name, each in saes.items()}  # batch_topk depends on it
    try:
        for each in saes.values():
            each.train(False)
        found = Sweep(saes, harvest, max_tokens, alone).run(shows_progress(progress))
    finally:
        for name, each in saes.items():
            each.train(modes[name])
    return dict(found) if isinstance(sae, Mapping) else found[""]


def _check_hookpoints(saes: Mapping[str, SwitchSAE]) -> None:
    if not saes:
        raise ConfigError("there is no SAE to measure: an empty dict was given.")
    hookpoints = {name: sae.config.hookpoint for name, sae in saes.items()}
    if None in hookpoints.values():
        raise ConfigError("the SAE's config has no hookpoint: set it, such as layers.7.resid_post.")
    if len(set(hookpoints.values())) > 1:
        places = ", ".join(f"{name} at {hookpoint}" for name, hookpoint in hookpoints.items())
        raise ConfigError(f"SAEs measured together are of one place, not {places}.")


def write_metrics(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Store an SAE's figures in metrics.json and config.json in its folder.

    Returns:
        The figures as they are written, to the digits worth showing.
    """
    shown = shown_digits(found)
    # the file is edited, as saving the SAE again would rewrite its weights
    config_file = folder / CONFIG
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["metrics"] = {
        name: value for name, value in shown.items() if name not in ("measured_on", "density")
    }
    write_json(folder / METRICS, shown)
    write_json(config_file, config, sort_keys=True)  # as transformers writes it
    return shown


def shown_digits(found: dict[str, Any]) -> dict[str, Any]:
    """Figures to the digits worth showing; counts, and what is nested, stay as they are."""
    figures = {name: value for name, value in found.items() if isinstance(value, float)}
    return {**found, **rounded(figures)}


def _harvest(
    saes: Mapping[str, SwitchSAE],
    lm: nn.Module,
    dataset: Any,
    tokenizer: Any,
    settings: ActivationSettings,
) -> Harvest:
    """The harvest of the text at the SAEs' hookpoint, with their own bound on norms."""
    hookpoint = str(next(iter(saes.values())).config.hookpoint)
    # logits are the largest tensors here, so they decide how many tokens a pass may have
    vocabulary = vocabulary_size(unwrap(lm))
    if settings.tokens_per_pass is None and vocabulary:
        most = max(settings.context, min(2048, _LOGITS_A_PASS // vocabulary))
        settings = replace(settings, tokens_per_pass=most)
    # no bound of the text's own: the SAEs' bound is set below
    harvest = Harvest(lm, hookpoint, dataset, tokenizer, replace(settings, outlier_factor=None))
    name = harvest.hookpoints[0]
    for sae in saes.values():
        if harvest.hidden_size[name] != sae.config.hidden_size:
            raise WidthError(
                f"the SAE has hidden_size={sae.config.hidden_size}, and the stream at {name} is "
                f"{harvest.hidden_size[name]} wide: it is another model's, or another place's."
            )
    # the narrowest bound: then no SAE is measured on a token that it would leave alone
    bound = min(float(sae.outlier_norm) for sae in saes.values())
    if math.isfinite(bound):
        harvest.set_outlier_norm({name: bound})
    return harvest

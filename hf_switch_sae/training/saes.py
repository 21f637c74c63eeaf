"""The SAEs of a run: built to fit their places, then joined to one module.

Room   {hookpoint: rows} -> the sum of the SAEs' losses, and what to log.

Each SAE's parameters and losses are its own; together they share rows, step and schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.lm.fingerprint import base_model_fields
from hf_switch_sae.lm.hookpoints import resolve
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.fvu import WholeBatch
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sae.output import SwitchSAEOutput

MEASURED = ("loss", "fvu", "balance", "tokens", "active", "entropy")
"""What the first entries of a measure are; after them how often each expert was chosen."""


def check_loss(name: str, config: SwitchSAEConfig, rule: str) -> None:
    """Raise ConfigError if the config asks for what a loss does not have."""
    for coef in ("l1_loss_coef", "second_expert_loss_coef"):
        if rule == "published" and getattr(config, coef):
            raise ConfigError(
                f"{name} has {coef}={getattr(config, coef)}, and the published loss has no such "
                "part: set loss='relative'."
            )


class SAEsTogether(nn.Module):
    """SAEs trained over the same tokens.

    Args:
        saes: by name; `config.hookpoint` is where each reads.
        rule: "relative" or "published", see `SwitchSAETrainingArguments.loss`.
        load_balance_alpha: of the published loss.
    """

    def __init__(self, saes: Mapping[str, SwitchSAE], rule: str, load_balance_alpha: float) -> None:
        super().__init__()
        for name, sae in saes.items():
            check_loss(name, sae.config, rule)
        self.names = tuple(saes)
        self.saes = nn.ModuleList(saes.values())
        self.places = tuple(str(sae.config.hookpoint) for sae in saes.values())
        self.rule, self.load_balance_alpha = rule, load_balance_alpha

    def by_name(self) -> dict[str, SwitchSAE]:
        """The SAEs."""
        return dict(zip(self.names, self.saes, strict=True))  # type: ignore[arg-type]

    def forward(
        self,
        streams: Mapping[str, Tensor],
        wholes: Sequence[WholeBatch] | None = None,
        only_sums: bool = False,
    ) -> dict[str, Any]:
        """The loss of some rows and, detached, what to log of them.

        Args:
            streams: hookpoint -> [n, d].
            wholes: for each SAE the batch that the rows are a part of.
            only_sums: give `batch_sums` instead, one tensor for each SAE.

        Returns:
            loss: 0-d. measures: for each SAE [6 + E], see `MEASURED`. fired: for each [F] bool.
        """
        saes: dict[str, SwitchSAE] = self.by_name()
        rows = [streams[place] for place in self.places]
        if only_sums:
            return {"sums": [sae.batch_sums(x) for sae, x in zip(saes.values(), rows, strict=True)]}
        losses, measures, fired = [], [], []
        for at, (sae, x) in enumerate(zip(saes.values(), rows, strict=True)):
            whole = None if wholes is None else wholes[at]
            output = sae(x, whole_batch=whole)
            losses.append(self._loss(sae, output, whole))
            measures.append(measure_of(sae, x, output, losses[-1]))
            fired.append(fired_of(sae, output))
        return {"loss": torch.stack(losses).sum(), "measures": measures, "fired": fired}

    def _loss(self, sae: SwitchSAE, output: SwitchSAEOutput, whole: WholeBatch | None) -> Tensor:
        assert output.loss is not None
        assert output.fvu is not None
        assert output.router_aux_loss is not None
        if self.rule == "relative":
            return output.loss
        assert whole is not None
        alpha = self.load_balance_alpha * sae.config.hidden_size
        return output.fvu * (whole.deviation / whole.tokens) + alpha * output.router_aux_loss


@torch.no_grad()
def measure_of(sae: SwitchSAE, x: Tensor, output: SwitchSAEOutput, loss: Tensor) -> Tensor:
    """[6 + E] float32 of rows x [n, d]: sums that add up over parts of a batch.

    Entropy is the router's over the experts, divided by that of an even choice: 0 for one that is
    certain, 1 for one that doesn't care.
    """
    assert output.features is not None
    assert output.fvu is not None
    assert output.router_aux_loss is not None
    counts = ~sae.is_outlier(x)
    tokens = counts.sum()
    active = (output.features.acts > 0).sum()
    entropy, chosen = tokens.new_zeros(()), counts.new_zeros(0)
    if output.router_logits is not None:
        logp = output.router_logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).where(counts, 0).sum()
        entropy = entropy / math.log(sae.config.num_experts)
        ids = output.router_logits.topk(sae.config.num_experts_per_token).indices
        weight = counts.float().repeat_interleave(ids.shape[1])
        chosen = torch.zeros(sae.config.num_experts, device=ids.device)
        chosen.index_add_(0, ids.flatten(), weight)
    head = [loss.detach(), output.fvu, output.router_aux_loss, tokens, active, entropy]
    return torch.cat([torch.stack([value.detach().float() for value in head]), chosen.float()])


@torch.no_grad()
def fired_of(sae: SwitchSAE, output: SwitchSAEOutput) -> Tensor:
    """[num_features] bool, which were active."""
    assert output.features is not None
    ids, acts = output.features.ids.flatten(), output.features.acts.flatten()
    firings = torch.zeros(sae.config.num_features, dtype=torch.int32, device=ids.device)
    return firings.index_add_(0, ids, (acts > 0).int()) > 0


Given = SwitchSAEConfig | SwitchSAE


def build_saes(
    given: Given | Mapping[str, Given], lm: nn.Module | None, train_dataset: Any, seed: int
) -> dict[str, SwitchSAE]:
    """SAEs by name, in float32 or more, each knowing its place and its language model.

    Raises:
        ConfigError: a place is missing, or what is given is no SAE and no configuration.
        HookpointError: there is no such place.
    """
    several = given if isinstance(given, Mapping) else {"": given}
    if not several:
        raise ConfigError("there is no SAE to train: an empty dict was given.")
    set_seed(seed)
    saes: dict[str, SwitchSAE] = {}
    for name, each in several.items():
        if isinstance(each, SwitchSAEConfig):
            sae = SwitchSAE(_placed(each, lm, train_dataset))
        elif isinstance(each, SwitchSAE):
            _placed(each.config, lm, train_dataset)
            sae = each
            if each.dtype.itemsize < 4:
                nn.Module.float(each)
        else:
            raise ConfigError(
                f"an SAE to train is a SwitchSAEConfig or a SwitchSAE, not {type(each).__name__}."
            )
        if any(id(sae) == id(other) for other in saes.values()):
            raise ConfigError(f"the SAE {name!r} is there twice: give a copy.")
        saes[name or str(sae.config.hookpoint)] = sae
    return saes


def readers_of(saes: Mapping[str, SwitchSAE]) -> dict[str, tuple[str, int]]:
    """Name of each SAE -> (the hookpoint it reads, its hidden_size); see `activations_for`."""
    return {name: (str(s.config.hookpoint), s.config.hidden_size) for name, s in saes.items()}


def _placed(config: SwitchSAEConfig, lm: nn.Module | None, train_dataset: Any) -> SwitchSAEConfig:
    """The config with place and language model filled in."""
    if config.hookpoint is None:
        places: tuple[str, ...] = getattr(train_dataset, "hookpoints", ())
        if len(places) != 1:
            raise ConfigError(
                "the SAE's config has no hookpoint: give one, such as 'layers.7.resid_post'"
                + (f"; the activations have {', '.join(places)}." if places else ".")
            )
        config.hookpoint = str(places[0])
    if lm is not None:
        config.hookpoint = resolve(lm, config.hookpoint).name
        known = base_model_fields(lm)
        if config.base_model_fingerprint is None:
            config.base_model = config.base_model or known["base_model"]
            config.base_model_fingerprint = known["base_model_fingerprint"]
    return config

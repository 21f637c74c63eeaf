"""The SAEs of a run: built for their hookpoints, then joined into one module.

Room   {hookpoint: rows} -> the sum of the SAEs' losses, and what to log.
How    Each SAE has its own parameters and its own loss. They share rows, steps and schedule.
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
"""The first entries of a measure; after them comes how often each expert was chosen."""


def check_loss(name: str, config: SwitchSAEConfig, rule: str) -> None:
    """Raise ConfigError if a config weights a term that the loss `rule` does not have."""
    for coef in ("l1_loss_coef", "second_expert_loss_coef"):
        if rule == "published" and getattr(config, coef):
            raise ConfigError(
                f"{name} has {coef}={getattr(config, coef)}, and the published loss has no such "
                "part: set loss='relative'."
            )


class SAEsTogether(nn.Module):
    """SAEs trained over the same tokens.

    Args:
        saes: by name; each reads at its `config.hookpoint`.
        rule: "relative" or "published", see `SwitchSAETrainingArguments.loss`.
        load_balance_alpha: weight of the balance term in the published loss.

    Raises:
        ConfigError: a config weights a term that the loss does not have.
    """

    def __init__(self, saes: Mapping[str, SwitchSAE], rule: str, load_balance_alpha: float) -> None:
        super().__init__()
        for name, sae in saes.items():
            check_loss(name, sae.config, rule)
        self.names = tuple(saes)
        self.saes = nn.ModuleList(saes.values())
        self.hookpoints = tuple(str(sae.config.hookpoint) for sae in saes.values())
        self.rule, self.load_balance_alpha = rule, load_balance_alpha

    def by_name(self) -> dict[str, SwitchSAE]:
        """The SAEs by name."""
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
            wholes: for each SAE the batch that the rows are a part of; None if they are all of it.
            only_sums: return {"sums": the `batch_sums` of each SAE} instead.

        Returns:
            loss: 0-d. measures: [6 + E] for each SAE, see `MEASURED`. fired: [F] bool for each.
        """
        saes: dict[str, SwitchSAE] = self.by_name()
        rows = [streams[hookpoint] for hookpoint in self.hookpoints]
        if only_sums:
            return {"sums": [sae.batch_sums(x) for sae, x in zip(saes.values(), rows, strict=True)]}
        losses, measures, fired = [], [], []
        for at, (sae, x) in enumerate(zip(saes.values(), rows, strict=True)):
            whole = None if wholes is None else wholes[at]
            output = sae(x, whole_batch=whole)
            losses.append(self._loss(sae, output, whole))
            measures.append(measure_of(sae, x, output, losses[-1]))
            fired.append(fired_of(sae, output))
        # no parameter is in two of the losses, so their sum trains each SAE as if alone
        return {"loss": torch.stack(losses).sum(), "measures": measures, "fired": fired}

    def _loss(self, sae: SwitchSAE, output: SwitchSAEOutput, whole: WholeBatch | None) -> Tensor:
        assert output.loss is not None
        assert output.fvu is not None
        assert output.router_aux_loss is not None
        if self.rule == "relative":
            return output.loss
        assert whole is not None
        # the squared error of a token, instead of its share of the variance
        alpha = self.load_balance_alpha * sae.config.hidden_size
        return output.fvu * (whole.deviation / whole.tokens) + alpha * output.router_aux_loss


@torch.no_grad()
def measure_of(sae: SwitchSAE, x: Tensor, output: SwitchSAEOutput, loss: Tensor) -> Tensor:
    """[6 + E] float32 of rows x [n, d]: sums that add up over the parts of a batch.

    Entropy is that of the router's choice, divided by that of an even choice: 0 if it is certain, 1
    if all experts are equally likely.
    """
    assert output.features is not None
    assert output.fvu is not None
    assert output.router_aux_loss is not None
    counted = ~sae.is_outlier(x)
    tokens = counted.sum()
    active = (output.features.acts > 0).sum()
    entropy, chosen = tokens.new_zeros(()), counted.new_zeros(0)
    if output.router_logits is not None:
        logp = output.router_logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).where(counted, 0).sum()
        entropy = entropy / math.log(sae.config.num_experts)
        # how often each expert was chosen, outliers not counted
        ids = output.router_logits.topk(sae.config.num_experts_per_token).indices
        weight = counted.float().repeat_interleave(ids.shape[1])
        chosen = torch.zeros(sae.config.num_experts, dtype=torch.float32, device=ids.device)
        chosen.index_add_(0, ids.flatten(), weight)
    # one tensor, so that a log needs a single exchange between processes
    head = [loss.detach(), output.fvu, output.router_aux_loss, tokens, active, entropy]
    return torch.cat([torch.stack([value.detach().float() for value in head]), chosen.float()])


@torch.no_grad()
def fired_of(sae: SwitchSAE, output: SwitchSAEOutput) -> Tensor:
    """[num_features] bool: which features were active."""
    assert output.features is not None
    ids, acts = output.features.ids.flatten(), output.features.acts.flatten()
    # added up: an empty slot may repeat an active feature's id, and must not undo it
    firings = torch.zeros(sae.config.num_features, dtype=torch.int32, device=ids.device)
    return firings.index_add_(0, ids, (acts > 0).int()) > 0


SAEOrConfig = SwitchSAEConfig | SwitchSAE


def build_saes(
    given: SAEOrConfig | Mapping[str, SAEOrConfig],
    lm: nn.Module | None,
    train_dataset: Any,
    seed: int,
) -> dict[str, SwitchSAE]:
    """The SAEs of a run, by name, in float32 or wider.

    Args:
        given: what the trainer was given; one without a name is named by its hookpoint. The
            hookpoint, and the language model if there is one, are filled in in its config.
        lm: the language model, or None.
        train_dataset: its hookpoint is the default, if it has just one.
        seed: decides the random weights of new SAEs.

    Raises:
        ConfigError: a hookpoint is missing, or something is neither an SAE nor a config.
        HookpointError: the language model has no such hookpoint.
    """
    several = given if isinstance(given, Mapping) else {"": given}
    if not several:
        raise ConfigError("there is no SAE to train: an empty dict was given.")
    # here, so that random weights don't depend on what drew numbers before
    set_seed(seed)
    saes: dict[str, SwitchSAE] = {}
    for name, each in several.items():
        if isinstance(each, SwitchSAEConfig):
            sae = SwitchSAE(_placed(each, lm, train_dataset))
        elif isinstance(each, SwitchSAE):
            _placed(each.config, lm, train_dataset)
            sae = each
            # in 16 bits a small step would be lost to rounding
            if each.dtype.itemsize < 4:
                nn.Module.float(each)
        else:
            raise ConfigError(
                f"an SAE to train is a SwitchSAEConfig or a SwitchSAE, not {type(each).__name__}."
            )
        # one SAE under two names would be stepped twice
        if any(id(sae) == id(other) for other in saes.values()):
            raise ConfigError(f"the SAE {name!r} is there twice: give a copy.")
        saes[name or str(sae.config.hookpoint)] = sae
    return saes


def readers_of(saes: Mapping[str, SwitchSAE]) -> dict[str, tuple[str, int]]:
    """Name of each SAE -> (the hookpoint it reads, its hidden_size); see `activations_for`."""
    return {name: (str(s.config.hookpoint), s.config.hidden_size) for name, s in saes.items()}


def _placed(config: SwitchSAEConfig, lm: nn.Module | None, train_dataset: Any) -> SwitchSAEConfig:
    """The config with hookpoint and language model filled in."""
    if config.hookpoint is None:
        hookpoints: tuple[str, ...] = getattr(train_dataset, "hookpoints", ())
        if len(hookpoints) != 1:
            raise ConfigError(
                "the SAE's config has no hookpoint: give one, such as 'layers.7.resid_post'"
                + (f"; the activations have {', '.join(hookpoints)}." if hookpoints else ".")
            )
        config.hookpoint = str(hookpoints[0])
    if lm is not None:
        config.hookpoint = resolve(lm, config.hookpoint).name
        known = base_model_fields(lm)
        # an SAE that is trained further still names the model it was made for
        if config.base_model_fingerprint is None:
            config.base_model = config.base_model or known["base_model"]
            config.base_model_fingerprint = known["base_model_fingerprint"]
    return config

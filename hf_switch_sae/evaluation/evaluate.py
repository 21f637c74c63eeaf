"""Finished SAEs on held-out text -> the figures of metrics.json, and what they were measured on.

    fvu, mse, cosine, l0, dead_share    of the rows that the token policy keeps (`RowSums`)
    expert_load, routing_entropy        how evenly the experts are used
    fvu_all_tokens, outlier_tokens      with those whose norm the policy would leave out
    density                             how many features are active how often
    ce_clean, ce_spliced                nats a token, of the predictions made at those rows: as the
                                        model is, and spliced (`attach`)
    ce_ablated, ce_zero                 likewise, its stream replaced by a mean, or by 0
    ce_recovered                        (ablated - spliced) / (ablated - clean)
    ce_recovered_zero                   (zero - spliced) / (zero - clean), as others report it:
                                        larger where a model without its stream is worse than chance
    kl                                  of the spliced predictions from the clean ones

What is replaced is what the SAE reads: outliers stay in the stream, as when it is attached. The
mean is that of the first rows of the text, so that it is the same for every SAE of the place.
Several SAEs share one pass of the model as it is; tokens that one of them takes for outliers are
left out for all. Several processes that torch.distributed joins share the contexts, and each has
the figures of all.

Beware The predictions are measured of models that have them alone: causal, and with a head.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_switch_sae.activations.harvest import Harvest
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.errors import ConfigError, TrainingError, WidthError
from hf_switch_sae.evaluation.heldout import RowSums
from hf_switch_sae.files import rounded, written_beside
from hf_switch_sae.hub.layout import CONFIG, METRICS
from hf_switch_sae.lm.config import vocabulary_size
from hf_switch_sae.lm.fingerprint import check_base_model
from hf_switch_sae.lm.hookpoints import unwrap
from hf_switch_sae.lm.hooks import hook_residual
from hf_switch_sae.processes import processes
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.text.contexts import Context

_MEAN_ROWS = 16_384
_LOGITS_A_PASS = 1 << 26  # of the vocabulary times tokens: three such are held at most
_MEASURED = ("ce_clean", "ce_spliced", "ce_ablated", "ce_zero", "kl")
_ROWS_AT_ONCE = 256  # of logits, in float64


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
    """Measure SAEs on text they were not trained on, one pass over it; memory does not grow.

    Args:
        sae: with its place in the config. Its own `outlier_norm` decides what is an outlier; an SAE
            that has none (see `calibrate`) is measured on all tokens that the policy keeps. Or
            several of one place, by name, measured on the same tokens: none that is an outlier for
            one of them.
        lm: its language model, in eval mode.
        dataset: held-out texts, or what else `text.read_documents` takes.
        tokenizer: the model's.
        settings: how text becomes rows; `outlier_factor` is not used.
        max_tokens: stop before the context with which the model would have read more.
        allow_mismatch: accept another language model than the SAE's.
        alone: this process measures the whole text by itself. Without it every process that
            torch.distributed joins has to call this, and measures a share.
        progress: whether to show a bar on stderr; by default if that is a terminal.

    Returns:
        Numbers by name (see the module's header), `tokens` and `ce_tokens`: how many rows and
        predictions they are of, `density` (see `RowSums.density`), and `measured_on`: text,
        contexts, token policy, language model. JSON-able. Of several SAEs such a dict for each.

    Raises:
        ConfigError: the SAE's config has no hookpoint, or several SAEs have different ones.
        BaseModelError, WidthError, AttachError, HookpointError: SAE and model do not fit.
        TextError: an empty data set, texts shorter than a context, a tokenizer of another model.
        TrainingError: max_tokens is less than one context.
    """
    saes = dict(sae) if isinstance(sae, Mapping) else {"": sae}
    _check_places(saes)
    if not allow_mismatch:
        for each in saes.values():
            check_base_model(lm, each.config.base_model, each.config.base_model_fingerprint)
    harvest = _harvest(saes, lm, dataset, tokenizer, settings or ActivationSettings())
    if max_tokens is not None and max_tokens < harvest.settings.context:
        raise TrainingError(
            f"max_tokens={max_tokens} is less than one context of {harvest.settings.context}."
        )
    modes = {name: each.training for name, each in saes.items()}
    try:
        for each in saes.values():
            each.train(False)
        shown = sys.stderr.isatty() if progress is None else progress
        found = _Sweep(saes, harvest, max_tokens, alone).run(shown)
    finally:
        for name, each in saes.items():
            each.train(modes[name])
    return dict(found) if isinstance(sae, Mapping) else found[""]


def _check_places(saes: Mapping[str, SwitchSAE]) -> None:
    if not saes:
        raise ConfigError("there is no SAE to measure: an empty dict was given.")
    places = {name: sae.config.hookpoint for name, sae in saes.items()}
    if None in places.values():
        raise ConfigError("the SAE's config has no hookpoint: set it, such as layers.7.resid_post.")
    if len(set(places.values())) > 1:
        said = ", ".join(f"{name} at {place}" for name, place in places.items())
        raise ConfigError(f"SAEs measured together are of one place, not {said}.")


def write_metrics(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Store figures in metrics.json and config.json of an SAE's folder; returns what is written.

    Each file is written beside its place and renamed.
    """
    shown = shown_digits(found)
    config_file = folder / CONFIG
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["metrics"] = {
        name: value for name, value in shown.items() if name not in ("measured_on", "density")
    }
    texts = {
        folder / METRICS: json.dumps(shown, indent=2),
        config_file: json.dumps(config, indent=2, sort_keys=True),
    }
    for file, text in texts.items():
        with written_beside(file) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    return shown


def shown_digits(found: dict[str, Any]) -> dict[str, Any]:
    """Figures to the digits worth showing; counts stay whole."""
    figures = {name: value for name, value in found.items() if isinstance(value, float)}
    return {**found, **rounded(figures)}


def _harvest(
    saes: Mapping[str, SwitchSAE],
    lm: nn.Module,
    dataset: Any,
    tokenizer: Any,
    settings: ActivationSettings,
) -> Harvest:
    """How the text becomes rows, with the SAEs' own bound on their norm."""
    place = str(next(iter(saes.values())).config.hookpoint)
    vocabulary = vocabulary_size(unwrap(lm))
    if settings.tokens_per_pass is None and vocabulary:
        most = max(settings.context, min(2048, _LOGITS_A_PASS // vocabulary))
        settings = replace(settings, tokens_per_pass=most)
    harvest = Harvest(lm, place, dataset, tokenizer, replace(settings, outlier_factor=None))
    name = harvest.hookpoints[0]
    for sae in saes.values():
        if harvest.hidden_size[name] != sae.config.hidden_size:
            raise WidthError(
                f"the SAE has hidden_size={sae.config.hidden_size}, and the stream at {name} is "
                f"{harvest.hidden_size[name]} wide: it is another model's, or another place's."
            )
    bound = min(float(sae.outlier_norm) for sae in saes.values())
    if math.isfinite(bound):
        harvest.set_outlier_norm({name: bound})
    return harvest


class _Sweep:
    """One pass over the text."""

    def __init__(
        self,
        saes: Mapping[str, SwitchSAE],
        harvest: Harvest,
        max_tokens: int | None,
        alone: bool,
    ) -> None:
        self.saes, self.harvest, self.max_tokens = saes, harvest, max_tokens
        self.place = harvest.hookpoints[0]
        head = getattr(unwrap(harvest.lm), "get_output_embeddings", lambda: None)()
        self.predicts = harvest.causal and head is not None
        self.bound: float = harvest.policy.outlier_norm.get(self.place, math.inf)
        self.rows = {name: RowSums(sae, self.bound) for name, sae in saes.items()}
        self.sums = dict.fromkeys(("ce_clean", "ce_ablated", "ce_zero"), 0.0)
        self.spliced = {name: dict.fromkeys(("ce_spliced", "kl"), 0.0) for name in saes}
        self.contexts = self.predictions = 0
        self.rank, self.world_size, self.reduce = processes(alone)

    @torch.no_grad()
    def run(self, progress: bool) -> dict[str, dict[str, Any]]:
        mean = self._mean() if self.predicts else None
        own = islice(self._contexts(), self.rank, None, self.world_size)
        hidden = not progress or self.rank > 0
        with tqdm(total=self.max_tokens, unit="token", disable=hidden) as bar:
            while some := list(islice(own, self.harvest.contexts_per_pass)):
                self.contexts += len(some)
                self._add(some, mean)
                # the other processes are as far
                bar.update(self.world_size * sum(len(context.tokens) for context in some))
        self._add_up()
        found = {name: self._figures(name) for name in self.saes}
        if not all(figures["tokens"] for figures in found.values()):
            raise TrainingError("no token of this text is kept: there is nothing to measure on.")
        return {
            name: {**found[name], "measured_on": self._measured_on(sae)}
            for name, sae in self.saes.items()
        }

    def _add_up(self) -> None:
        """Counts and sums of predictions, over processes."""
        parts = [self.sums, *self.spliced.values()]
        flat = [self.contexts, self.predictions, *(v for each in parts for v in each.values())]
        device = next(iter(self.saes.values())).device
        contexts, predictions, *rest = self.reduce(
            torch.tensor(flat, dtype=torch.float64, device=device)
        ).tolist()
        self.contexts, self.predictions = int(contexts), int(predictions)
        for each in parts:
            for name in each:
                each[name] = rest.pop(0)

    def _contexts(self) -> Iterator[Context]:
        """All, or as many as `max_tokens` allows: whatever the size of a pass."""
        read = 0
        for context in self.harvest.contexts(epochs=1):
            read += len(context.tokens)
            if self.max_tokens is not None and read > self.max_tokens:
                return
            yield context

    def _mean(self) -> Tensor:
        """[d] float32: of the first rows, with nothing computed after the place."""
        width = self.harvest.hidden_size[self.place]
        total, count = torch.zeros(width, dtype=torch.float64), 0
        with closing(self.harvest.passes(self._contexts())) as passes:
            for found in passes:
                rows = found.rows[self.place][: _MEAN_ROWS - count]
                total += rows.double().sum(0).cpu()
                count += len(rows)
                if count >= _MEAN_ROWS:
                    break
        return (total / max(count, 1)).float()

    def _add(self, contexts: list[Context], mean: Tensor | None) -> None:
        """Measure a pass."""
        ids, mask, inputs = self.harvest.inputs(contexts)
        lm, policy, streams = self.harvest.lm, self.harvest.policy, dict[str, Tensor]()

        def keep(residual: Tensor) -> None:
            streams[self.place] = residual.clone()  # models add to it in place

        with hook_residual(lm, self.place, keep):
            clean = lm(**inputs)
        stream, allowed = streams[self.place], policy.allows(ids, mask)
        index = policy.rows(streams, allowed)
        some = stream.flatten(0, 1)[allowed.flatten().to(stream.device)]
        for sums in self.rows.values():
            sums.add(some)
        if mean is None:
            return
        follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1).flatten().bool()
        at = index.cpu()
        at = at[follows[at]]  # a context's last token predicts none of it
        target = ids.flatten()[at + 1]
        expected = _at(clean.logits, at)
        del clean
        self.sums["ce_clean"] += _scores(expected, target)[0]
        for name, sae in self.saes.items():
            with sae.attach(lm, at=self.place, splice=True, allow_mismatch=True):
                found = _scores(_at(lm(**inputs).logits, at), target, expected)
            self.spliced[name]["ce_spliced"] += found[0]
            self.spliced[name]["kl"] += found[1]
        for name, put in (("ce_ablated", mean), ("ce_zero", torch.zeros_like(mean))):
            with hook_residual(lm, self.place, self._replace_by(put)):
                self.sums[name] += _scores(_at(lm(**inputs).logits, at), target)[0]
        self.predictions += len(at)

    def _replace_by(self, put: Tensor) -> Callable[[Tensor], Tensor]:
        def replace_all(residual: Tensor) -> Tensor:
            stays = residual.float().norm(dim=-1, keepdim=True) > self.bound
            return torch.where(stays, residual, put.to(residual))

        return replace_all

    def _figures(self, name: str) -> dict[str, Any]:
        rows = self.rows[name]
        found: dict[str, Any] = {**rows.figures(self.reduce), **rows.figures_of_all(self.reduce)}
        found |= {count: int(found[count]) for count in ("tokens", "outlier_tokens")}
        if self.predictions:
            sums = {**self.sums, **self.spliced[name]}
            found |= {of: sums[of] / self.predictions for of in _MEASURED}
            clean, spliced = found["ce_clean"], found["ce_spliced"]
            for recovered, without in (
                ("ce_recovered", found["ce_ablated"]),
                ("ce_recovered_zero", found["ce_zero"]),
            ):
                if without != clean:
                    found[recovered] = (without - spliced) / (without - clean)
            found["ce_tokens"] = self.predictions
        return {**found, "density": rows.density(self.reduce)}

    def _measured_on(self, sae: SwitchSAE) -> dict[str, Any]:
        root = unwrap(self.harvest.lm)
        policy = self.harvest.policy_dict()
        del policy["outlier_factor"]
        policy["outlier_norm"] = policy["outlier_norm"].get(self.place)
        return {
            "dataset": self.harvest.documents.provenance,
            "contexts": self.contexts,
            **policy,
            "hookpoint": self.place,
            "base_model": sae.config.base_model,
            "lm_dtype": str(getattr(root, "dtype", "")).removeprefix("torch."),
            "sae_dtype": str(sae.dtype).removeprefix("torch."),
            **({"ablated_to": f"mean of the first {_MEAN_ROWS:,} rows"} if self.predicts else {}),
        }


def _at(logits: Tensor, at: Tensor) -> Tensor:
    """[n, vocabulary]: of some tokens, flattened."""
    return logits.flatten(0, 1).index_select(0, at.to(logits.device))


def _scores(logits: Tensor, target: Tensor, clean: Tensor | None = None) -> tuple[float, float]:
    """Cross entropy and KL(clean || these), nats, added up over rows; a few rows at a time."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    entropy = divergence = 0.0
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_q = logits[rows].to(wide).log_softmax(-1)
        chosen = log_q.gather(-1, target[rows, None].to(log_q.device))
        entropy -= float(chosen.sum())
        if clean is not None:
            log_p = clean[rows].to(log_q).log_softmax(-1)
            divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return entropy, divergence

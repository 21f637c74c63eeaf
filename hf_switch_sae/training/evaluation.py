"""A finished SAE on held-out text -> the figures of metrics.json, and what they were measured on.

    fvu, l0, dead_share, expert_load    of the rows that the token policy keeps (`RowSums`)
    ce_clean, ce_spliced, ce_ablated    nats a token, of the predictions made at those rows: as the
                                        model is, spliced (`attach`), its stream replaced by a mean
    ce_recovered                        (ablated - spliced) / (ablated - clean)
    kl                                  of the spliced predictions from the clean ones

What is replaced is what the SAE reads: outliers stay in the stream, as when it is attached. The
mean is that of the first rows of the text, so that it is the same for every SAE of the place.

Beware The predictions are measured of models that have them alone: causal, and with a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.attach import hook_residual
from hf_switch_sae.base_model import check_base_model
from hf_switch_sae.errors import ConfigError, TrainingError, WidthError
from hf_switch_sae.files import written_beside
from hf_switch_sae.hookpoints import unwrap
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.training.finish import rounded
from hf_switch_sae.training.harvest import ActivationSettings, Harvest, vocabulary_size
from hf_switch_sae.training.heldout import RowSums
from hf_switch_sae.training.packing import Context

METRICS = "metrics.json"
_MEAN_ROWS = 16_384
_LOGITS_A_PASS = 1 << 26  # of the vocabulary times tokens: three such are held at most
_ROWS_AT_ONCE = 256  # of logits, in float64


def evaluate(
    sae: SwitchSAE,
    lm: nn.Module,
    dataset: Any,
    tokenizer: Any = None,
    settings: ActivationSettings | None = None,
    *,
    max_tokens: int | None = None,
    allow_mismatch: bool = False,
) -> dict[str, Any]:
    """Measure an SAE on text it was not trained on, one pass over it; memory does not grow.

    Args:
        sae: with its place in the config. Its own `outlier_norm` decides what is an outlier; an SAE
            that has none (see `calibrate`) is measured on all tokens that the policy keeps.
        lm: its language model, in eval mode.
        dataset: held-out texts, or what else `text.read_documents` takes.
        tokenizer: the model's.
        settings: how text becomes rows; `outlier_factor` is not used.
        max_tokens: stop before the context with which the model would have read more.
        allow_mismatch: accept another language model than the SAE's.

    Returns:
        Numbers by name (see the module's header), `tokens` and `ce_tokens`: how many rows and
        predictions they are of, and `measured_on`: text, contexts, token policy, language model.
        JSON-able.

    Raises:
        ConfigError: the SAE's config has no hookpoint.
        BaseModelError, WidthError, AttachError, HookpointError: SAE and model do not fit.
        TextError: an empty data set, texts shorter than a context, a tokenizer of another model.
        TrainingError: max_tokens is less than one context.
    """
    place = sae.config.hookpoint
    if place is None:
        raise ConfigError("the SAE's config has no hookpoint: set it, such as layers.7.resid_post.")
    if not allow_mismatch:
        check_base_model(lm, sae.config.base_model, sae.config.base_model_fingerprint)
    harvest = _harvest(sae, lm, dataset, tokenizer, settings or ActivationSettings())
    if max_tokens is not None and max_tokens < harvest.settings.context:
        raise TrainingError(
            f"max_tokens={max_tokens} is less than one context of {harvest.settings.context}."
        )
    was_training = sae.training
    sae.train(False)
    try:
        return _Sweep(sae, harvest, max_tokens).run()
    finally:
        sae.train(was_training)


def write_metrics(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Store figures in metrics.json and config.json of an SAE's folder; returns what is written.

    Each file is written beside its place and renamed.
    """
    shown = shown_digits(found)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["metrics"] = {name: value for name, value in shown.items() if name != "measured_on"}
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
    sae: SwitchSAE, lm: nn.Module, dataset: Any, tokenizer: Any, settings: ActivationSettings
) -> Harvest:
    """How the text becomes rows, with the SAE's own bound on their norm."""
    place = str(sae.config.hookpoint)
    vocabulary = vocabulary_size(unwrap(lm))
    if settings.tokens_per_pass is None and vocabulary:
        most = max(settings.context, min(2048, _LOGITS_A_PASS // vocabulary))
        settings = replace(settings, tokens_per_pass=most)
    harvest = Harvest(lm, place, dataset, tokenizer, replace(settings, outlier_factor=None))
    name = harvest.hookpoints[0]
    if harvest.hidden_size[name] != sae.config.hidden_size:
        raise WidthError(
            f"the SAE has hidden_size={sae.config.hidden_size}, and the stream at {name} is "
            f"{harvest.hidden_size[name]} wide: it is another model's, or another place's."
        )
    if bool(sae.outlier_norm.isfinite()):
        harvest.set_outlier_norm({name: float(sae.outlier_norm)})
    return harvest


class _Sweep:
    """One pass over the text."""

    def __init__(self, sae: SwitchSAE, harvest: Harvest, max_tokens: int | None) -> None:
        self.sae, self.harvest, self.max_tokens = sae, harvest, max_tokens
        self.place = harvest.hookpoints[0]
        head = getattr(unwrap(harvest.lm), "get_output_embeddings", lambda: None)()
        self.predicts = harvest.causal and head is not None
        self.rows = RowSums(sae)
        self.sums = dict.fromkeys(("ce_clean", "ce_spliced", "ce_ablated", "kl"), 0.0)
        self.contexts = self.predictions = 0

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        mean = self._mean() if self.predicts else None
        contexts = self._contexts()
        while some := list(islice(contexts, self.harvest.contexts_per_pass)):
            self.contexts += len(some)
            self._add(some, mean)
        if self.rows.batch is None:
            raise TrainingError("no token of this text is kept: there is nothing to measure on.")
        return {**self._figures(), "measured_on": self._measured_on()}

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
        total, count = torch.zeros(self.sae.config.hidden_size, dtype=torch.float64), 0
        with closing(self.harvest.passes(self._contexts())) as passes:
            for found in passes:
                rows = found.rows[self.place][: _MEAN_ROWS - count]
                total += rows.double().sum(0).cpu()
                count += len(rows)
                if count >= _MEAN_ROWS:
                    break
        return (total / max(count, 1)).float()

    def _add(self, contexts: list[Context], mean: Tensor | None) -> None:
        ids, mask, inputs = self.harvest.inputs(contexts)
        lm, policy, streams = self.harvest.lm, self.harvest.policy, dict[str, Tensor]()

        def keep(stream: Tensor) -> None:
            streams[self.place] = stream.clone()  # models add to it in place

        with hook_residual(lm, self.place, keep):
            clean = lm(**inputs)
        stream = streams[self.place]
        index = policy.rows(streams, policy.by_token(ids, mask))
        self.rows.add(stream.flatten(0, 1).index_select(0, index))
        if mean is None:
            return
        follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1).flatten().bool()
        at = index.cpu()
        at = at[follows[at]]  # a context's last token predicts none of it
        target = ids.flatten()[at + 1]
        expected = _at(clean.logits, at)
        del clean
        self.sums["ce_clean"] += _scores(expected, target)[0]
        with self.sae.attach(lm, at=self.place, splice=True, allow_mismatch=True):
            found = _scores(_at(lm(**inputs).logits, at), target, expected)
        self.sums["ce_spliced"] += found[0]
        self.sums["kl"] += found[1]

        def ablate(residual: Tensor) -> Tensor:
            stays = self.sae.is_outlier(residual.to(self.sae.device)).to(residual.device)
            return torch.where(stays[..., None], residual, mean.to(residual))

        with hook_residual(lm, self.place, ablate):
            self.sums["ce_ablated"] += _scores(_at(lm(**inputs).logits, at), target)[0]
        self.predictions += len(at)

    def _figures(self) -> dict[str, Any]:
        found: dict[str, Any] = self.rows.figures(lambda each: each)
        found["tokens"] = int(found["tokens"])
        if self.predictions:
            found |= {name: total / self.predictions for name, total in self.sums.items()}
            clean, spliced = found["ce_clean"], found["ce_spliced"]
            if found["ce_ablated"] != clean:
                span = found["ce_ablated"] - clean
                found["ce_recovered"] = (found["ce_ablated"] - spliced) / span
            found["ce_tokens"] = self.predictions
        return found

    def _measured_on(self) -> dict[str, Any]:
        root = unwrap(self.harvest.lm)
        policy = self.harvest.policy_dict()
        del policy["outlier_factor"]
        policy["outlier_norm"] = policy["outlier_norm"].get(self.place)
        return {
            "dataset": self.harvest.documents.provenance,
            "contexts": self.contexts,
            **policy,
            "hookpoint": self.place,
            "base_model": self.sae.config.base_model,
            "lm_dtype": str(getattr(root, "dtype", "")).removeprefix("torch."),
            "sae_dtype": str(self.sae.dtype).removeprefix("torch."),
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

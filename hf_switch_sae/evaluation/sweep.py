"""One pass over held-out text: what SAEs reconstruct, and what the model's predictions lose.

How    Each batch of contexts runs through the model as it is, once for all SAEs. It then runs again
       with each SAE spliced in, with the stream replaced by a mean, and with the stream replaced
       by 0. Sums are kept, not rows, so memory does not grow with the text.
Beware Predictions are measured only for models that make them: causal ones with a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_switch_sae.activations.harvest import Harvest
from hf_switch_sae.errors import TrainingError
from hf_switch_sae.evaluation.heldout import RowSums
from hf_switch_sae.lm.hookpoints import unwrap
from hf_switch_sae.lm.hooks import hook_residual
from hf_switch_sae.ops.precision import name_of
from hf_switch_sae.processes import processes
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.text.contexts import Context

_MEAN_ROWS = 16_384
_MEASURED = ("ce_clean", "ce_spliced", "ce_ablated", "ce_zero", "kl")
_ROWS_AT_ONCE = 256  # of logits, in float64


class Sweep:
    """One pass over the text.

    Args:
        saes: by name, all of one hookpoint, in eval mode.
        harvest: of that hookpoint, with the bound on norms that all SAEs share.
        max_tokens: stop before the context with which more tokens would have been read.
        by_itself: this process measures the whole text, whatever others torch.distributed joins.
    """

    def __init__(
        self,
        saes: Mapping[str, SwitchSAE],
        harvest: Harvest,
        max_tokens: int | None,
        by_itself: bool,
    ) -> None:
        self.saes, self.harvest, self.max_tokens = saes, harvest, max_tokens
        self.hookpoint = harvest.hookpoints[0]
        # what the model predicts is measured only if it sees no token that it is to predict
        head = getattr(unwrap(harvest.lm), "get_output_embeddings", lambda: None)()
        self.predicts = harvest.causal and head is not None
        self.bound: float = harvest.policy.outlier_norm.get(self.hookpoint, math.inf)
        self.rows = {name: RowSums(sae, self.bound) for name, sae in saes.items()}
        self.sums = dict.fromkeys(("ce_clean", "ce_ablated", "ce_zero"), 0.0)
        self.spliced = {name: dict.fromkeys(("ce_spliced", "kl"), 0.0) for name in saes}
        self.contexts = self.predictions = 0
        self.rank, self.world_size, self.reduce = processes(by_itself)

    @torch.no_grad()
    def run(self, progress: bool) -> dict[str, dict[str, Any]]:
        """Read the text and return each SAE's figures, as `evaluate` does.

        Raises:
            TrainingError: no token of the text is kept.
        """
        mean = self._mean() if self.predicts else None
        own = islice(self._contexts(), self.rank, None, self.world_size)
        hidden = not progress or self.rank > 0
        with tqdm(total=self.max_tokens, unit="token", disable=hidden) as bar:
            while some := list(islice(own, self.harvest.contexts_per_pass)):
                self.contexts += len(some)
                self._add(some, mean)
                # the other processes have come about as far
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
        """Add up counts and sums of predictions over processes, in a single exchange."""
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
        """As many contexts as `max_tokens` allows, so that the size of a pass does not matter."""
        read = 0
        for context in self.harvest.contexts(epochs=1):
            read += len(context.tokens)
            if self.max_tokens is not None and read > self.max_tokens:
                return
            yield context

    def _mean(self) -> Tensor:
        """[d] float32: the mean of the text's first rows."""
        width = self.harvest.hidden_size[self.hookpoint]
        total, count = torch.zeros(width, dtype=torch.float64, device="cpu"), 0
        with closing(self.harvest.passes(self._contexts())) as passes:
            for found in passes:
                rows = found.rows[self.hookpoint][: _MEAN_ROWS - count]
                total += rows.double().sum(0).cpu()
                count += len(rows)
                if count >= _MEAN_ROWS:
                    break
        return (total / max(count, 1)).float()

    def _add(self, contexts: list[Context], mean: Tensor | None) -> None:
        """Measure one batch of contexts."""
        ids, mask, inputs = self.harvest.inputs(contexts)
        lm, policy, streams = self.harvest.lm, self.harvest.policy, dict[str, Tensor]()

        def keep(residual: Tensor) -> None:
            streams[self.hookpoint] = residual.clone()  # models add to it in place

        # the model as it is: its rows, and its predictions
        with hook_residual(lm, self.hookpoint, keep):
            clean = lm(**inputs)
        stream, allowed = streams[self.hookpoint], policy.allows(ids, mask)
        index = policy.rows(streams, allowed)
        some = stream.flatten(0, 1)[allowed.flatten().to(stream.device)]
        for sums in self.rows.values():
            sums.add(some)
        if mean is None:
            return

        # predictions at the kept rows; a context's last token predicts none of it
        follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1).flatten().bool()
        at = index.cpu()
        at = at[follows[at]]
        target = ids.flatten()[at + 1]
        expected = _at(clean.logits, at)
        del clean  # all logits but these: the largest tensor there is
        self.sums["ce_clean"] += _scores(expected, target)[0]

        # the model with each SAE, and without its stream
        for name, sae in self.saes.items():
            with sae.attach(lm, at=self.hookpoint, splice=True, allow_mismatch=True):
                found = _scores(_at(lm(**inputs).logits, at), target, expected)
            self.spliced[name]["ce_spliced"] += found[0]
            self.spliced[name]["kl"] += found[1]
        for name, put in (("ce_ablated", mean), ("ce_zero", torch.zeros_like(mean))):
            with hook_residual(lm, self.hookpoint, self._replace_by(put)):
                self.sums[name] += _scores(_at(lm(**inputs).logits, at), target)[0]
        self.predictions += len(at)

    def _replace_by(self, put: Tensor) -> Callable[[Tensor], Tensor]:
        def replace_all(residual: Tensor) -> Tensor:
            # what the SAE would leave alone is left alone here too
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
                # else the stream decides nothing, and there is nothing to recover
                if without != clean:
                    found[recovered] = (without - spliced) / (without - clean)
            found["ce_tokens"] = self.predictions
        return {**found, "density": rows.density(self.reduce)}

    def _measured_on(self, sae: SwitchSAE) -> dict[str, Any]:
        root = unwrap(self.harvest.lm)
        policy = self.harvest.policy_dict()
        del policy["outlier_factor"]
        policy["outlier_norm"] = policy["outlier_norm"].get(self.hookpoint)
        return {
            "dataset": self.harvest.documents.provenance,
            "contexts": self.contexts,
            **policy,
            "hookpoint": self.hookpoint,
            "base_model": sae.config.base_model,
            "lm_dtype": name_of(getattr(root, "dtype", None)),
            "sae_dtype": name_of(sae.dtype),
            **({"ablated_to": f"mean of the first {_MEAN_ROWS:,} rows"} if self.predicts else {}),
        }


def _at(logits: Tensor, at: Tensor) -> Tensor:
    """[n, vocabulary]: the logits at flat indices `at`."""
    return logits.flatten(0, 1).index_select(0, at.to(logits.device))


def _scores(logits: Tensor, target: Tensor, clean: Tensor | None = None) -> tuple[float, float]:
    """Cross entropy and KL(clean || these) in nats, summed over rows, a few rows at a time."""
    # in float32 a small divergence would drown in rounding; Apple's GPUs have nothing wider
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

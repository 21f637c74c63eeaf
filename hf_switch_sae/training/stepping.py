"""The part of the trainer that steps: `SwitchSAEAdam`, its learning rates, and steps in parts.

How    A step's rows may be spread over processes, or accumulated from several batches. Losses are
       not means over tokens, so before the first part is run all parts are looked at: their sums
       (FVU's denominator, how often each expert is chosen) make each part's loss its exact share
       of the loss of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.errors import NonFiniteError
from hf_switch_sae.processes import added_up, alone
from hf_switch_sae.sae.fvu import WholeBatch
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sae.optim import SwitchSAEAdam
from hf_switch_sae.training.arguments import SwitchSAETrainingArguments
from hf_switch_sae.training.callbacks import unwrapped
from hf_switch_sae.training.monitor import Monitor, count_over_parts


class Stepping(Trainer):
    """How `SwitchSAETrainer` steps, unless it was given another optimizer."""

    args: SwitchSAETrainingArguments
    saes: dict[str, SwitchSAE]
    activations: Activations
    last_good_checkpoint: Callable[[], Path | None]
    _monitor: Monitor
    _parts: int
    """Parts of the current step that have yet to run."""
    _wholes: list[WholeBatch] | None
    """For each SAE the batch that the parts add up to; None if a step is a single part."""
    _sums: list[Tensor]
    """For each SAE the `batch_sums` of the whole; [] if a step is a single part."""
    _before: list[Tensor]
    """For each SAE its `num_tokens_since_fired` before the step; [] if a step is a single part."""
    _fired: list[Tensor]
    """For each SAE which features fired in the parts of this process so far."""

    def _added(self, tensor: Tensor) -> Tensor:
        """A tensor added up over processes."""
        return (added_up if self.args.world_size > 1 else alone)(tensor)

    # --- optimizer and schedule -------------------------------------------------------------------

    @property
    def learning_rates(self) -> dict[str, float]:
        """The peak of each SAE's schedule, by name."""
        steps = self._planned_steps()
        return {name: self.args.rate_for(sae.config, steps) for name, sae in self.saes.items()}

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        rows, batch = self.activations.num_rows or 0, self.get_total_train_batch_size(self.args)
        return math.ceil(self.args.num_train_epochs * max(1, rows // batch))

    def create_optimizer(self, model: Any = None) -> Any:
        """Create `SwitchSAEAdam`, with a learning rate for each SAE."""
        if self.optimizer is None:
            args, saes = self.args, list(self.saes.values())
            self.optimizer = SwitchSAEAdam(
                saes,
                lr=list(self.learning_rates.values()),
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                # 0 turns clipping off, as it does for `Trainer`
                max_grad_norm=args.max_grad_norm or None,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; by default it falls to 0 over the last `decay_share`."""
        args, optimizer = self.args, optimizer or self.optimizer
        if args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            # the decay comes first: a short run gives up warm-up, not decay
            decay = num_training_steps - int((1 - args.decay_share) * num_training_steps)
            warm = min(args.get_warmup_steps(num_training_steps), num_training_steps - decay)
            self.lr_scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=warm,
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs={
                    **{"num_decay_steps": decay, "decay_type": "linear"},
                    **(args.lr_scheduler_kwargs or {}),  # type: ignore[dict-item]
                },
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def _own_optimizer(self) -> SwitchSAEAdam | None:
        inner = unwrapped(self.optimizer)
        return inner if isinstance(inner, SwitchSAEAdam) else None

    # our optimizer clips each SAE's gradient by itself, so the Trainer must not clip their sum

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._own_optimizer is not None:
            return None
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._own_optimizer is not None:  # it knows the norms once it has stepped
            return None
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    # --- a step -----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> Any:
        """The parts of a step, on the device; measures what they add up to if they are several."""
        found, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        dtype = self._rows_dtype()
        found = [{name: rows.to(device, dtype) for name, rows in batch.items()} for batch in found]
        self._parts = len(found)
        self._fired, self._wholes, self._sums, self._before = [], None, [], []
        # the published loss needs the whole's sums even if it is a single part
        in_parts = self.args.world_size > 1 or self.args.gradient_accumulation_steps > 1
        if found and (in_parts or self.args.loss == "published"):
            self._before = [sae.num_tokens_since_fired.clone() for sae in self.saes.values()]
            self._sums = self._sums_over(found)
            widths = (sae.config.hidden_size for sae in self.saes.values())
            self._wholes = [
                WholeBatch.of(each, width).to(dtype)
                for each, width in zip(self._sums, widths, strict=True)
            ]
        return found, items

    def _rows_dtype(self) -> torch.dtype:
        return next(iter(self.saes.values())).b_dec.dtype

    @torch.no_grad()
    def _sums_over(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """For each SAE the `batch_sums` of a step's parts, added up over all processes."""
        # a call of the wrapped model, as only that gathers sharded weights
        parts = [self.model_wrapped(batch, only_sums=True)["sums"] for batch in batches]
        return [self._added(torch.stack(each).sum(0)) for each in zip(*parts, strict=True)]

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one part of a step."""
        model.train()
        for sae, before in zip(self.saes.values(), self._before, strict=False):
            # which features are dead is decided when the step begins, not between its parts
            sae.num_tokens_since_fired.copy_(before)
        with self.compute_loss_context_manager():
            found = model(inputs, self._wholes)
        loss: Tensor = found["loss"]
        # on a GPU this look would wait for the step; there it is taken when something is logged
        if loss.device.type == "cpu" and not loss.isfinite():
            raise self._not_finite(loss.detach(), inputs)
        # gradients are averaged over processes, but these losses are shares that add up
        self.accelerator.backward(loss * self.args.world_size)
        self._monitor.add(found["measures"])
        self._fired = (
            [a | b for a, b in zip(self._fired, found["fired"], strict=True)]
            if self._fired
            else found["fired"]
        )
        self._parts -= 1
        if not self._parts:
            self._end_step()
        done: Tensor = loss.detach() * self.args.world_size
        return done

    def _end_step(self) -> None:
        """Make the SAEs' counters those of the whole step, on every process."""
        self._monitor.end_step()
        if self._sums:
            for at, sae in enumerate(self.saes.values()):
                count_over_parts(
                    sae, self._before[at], self._sums[at], self._fired[at], self._added
                )
                if sae.config.activation == "batch_topk":
                    # each process has seen other rows, so their thresholds differ
                    sae.threshold.copy_(self._added(sae.threshold) / self.args.world_size)

    def _not_finite(self, loss: Tensor, inputs: Mapping[str, Tensor]) -> NonFiniteError:
        step = self.state.global_step
        batch = self.get_total_train_batch_size(self.args)
        bad = {name: int((~rows.isfinite()).any(-1).sum()) for name, rows in inputs.items()}
        where = ", ".join(f"{count} at {name}" for name, count in bad.items() if count)
        cause = (
            f"the rows themselves are not finite ({where}): check the language model's dtype"
            if where
            else "the rows are finite: lower the learning rate, or clip more (max_grad_norm)"
        )
        last = self.last_good_checkpoint()
        return NonFiniteError(
            f"the loss is {float(loss)} at step {step + 1} (rows {step * batch:,} to "
            f"{(step + 1) * batch - 1:,} of the run); {cause}. "
            + (f"{last} is from before." if last else "There is no checkpoint before it.")
        )

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # the look that a step on a GPU is spared; from here on the loss is waited for anyway
        if (self.control.should_log or self.control.should_save) and not tr_loss.isfinite():
            raise self._not_finite(tr_loss, {})
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

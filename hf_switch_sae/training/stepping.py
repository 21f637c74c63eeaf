"""The part of the trainer that steps: `SwitchSAEAdam` and the schedule of its learning rates."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sae.optim import SwitchSAEAdam
from hf_switch_sae.training.arguments import SwitchSAETrainingArguments


class Stepping(Trainer):
    """What `SwitchSAETrainer` steps with, unless it was given another optimizer."""

    args: SwitchSAETrainingArguments
    saes: dict[str, SwitchSAE]
    activations: Activations

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of each SAE by name, at the schedule's height."""
        steps = self._planned_steps()
        return {name: self.args.rate_for(sae.config, steps) for name, sae in self.saes.items()}

    def _planned_steps(self) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        rows, batch = self.activations.num_rows or 0, self.get_total_train_batch_size(self.args)
        return math.ceil(self.args.num_train_epochs * max(1, rows // batch))

    def create_optimizer(self, model: Any = None) -> Any:
        """`SwitchSAEAdam`, with the learning rate of each SAE."""
        if self.optimizer is None:
            args, saes = self.args, list(self.saes.values())
            self.optimizer = SwitchSAEAdam(
                saes,
                lr=list(self.learning_rates.values()),
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                max_grad_norm=args.max_grad_norm or None,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; the default falls to 0 over the last `decay_share`."""
        args, optimizer = self.args, optimizer or self.optimizer
        if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            if self.lr_scheduler is None:
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
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def _own_optimizer(self) -> SwitchSAEAdam | None:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner if isinstance(inner, SwitchSAEAdam) else None

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._own_optimizer is not None:
            return None
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._own_optimizer is not None:  # known once it has stepped
            return None
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

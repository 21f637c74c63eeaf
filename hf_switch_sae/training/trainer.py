"""`transformers.Trainer` for Switch SAEs: from text or rows to saved SAEs.

How    The model is `SAEsTogether`, the data loader hands out activations, the optimizer is
       `SwitchSAEAdam`; the loop, schedule, logging and callbacks are the Trainer's own.
Beware Losses are not means over tokens. Where a step's rows are spread over processes or
       accumulated, all parts are looked at before the first is run: the sums over the whole (FVU's
       denominator, how often each expert is chosen) make each part's loss its exact share.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers.utils import logging

from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.activations.live import activations_for
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.errors import NonFiniteError, TrainingError
from hf_switch_sae.evaluation.heldout import measure_held_out
from hf_switch_sae.processes import added_up
from hf_switch_sae.sae.fvu import WholeBatch
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training.arguments import SwitchSAETrainingArguments
from hf_switch_sae.training.callbacks import UnitRows
from hf_switch_sae.training.initialization import is_fresh, start_from
from hf_switch_sae.training.loader import Stream
from hf_switch_sae.training.monitor import Monitor, count_over_parts
from hf_switch_sae.training.saes import Given, SAEsTogether, build_saes, readers_of
from hf_switch_sae.training.saving import Saving
from hf_switch_sae.training.sharded import gathered
from hf_switch_sae.training.stepping import Stepping

logger = logging.get_logger(__name__)


class SwitchSAETrainer(Saving, Stepping):
    """Trains one Switch SAE, or several at once, on a language model's residual streams.

        trainer = SwitchSAETrainer(
            SwitchSAEConfig(hookpoint="layers.15.resid_post", ...),
            lm,
            SwitchSAETrainingArguments(output_dir="sae", num_train_tokens=10_000_000),
            train_dataset=texts,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()

    It is a `transformers.Trainer`: callbacks, `report_to`, `save_total_limit`, `push_to_hub`,
    `resume_from_checkpoint`, bf16, gradient accumulation, `torch_compile` and the rest are its own.
    Checkpoints and what is saved have a subfolder for each SAE.

    Several processes (`accelerate launch`) and gradient accumulation give the losses and gradients
    of one process with the whole batch, to rounding: FVU is over the whole's variance, and the load
    is balanced over the whole. What differs: `batch_topk` chooses within each part, and AuxK is a
    mean of the parts' own, each over the variance of its own error.

    Args:
        sae: a SwitchSAEConfig or a SwitchSAE, or {name: either} to train several over one pass of
            the language model. A `hookpoint` in the config says where it reads. An SAE that was
            trained before goes on from there; a fresh one starts from the data (`args.start`).
            `SAE_PRESETS` has the fields of the recipe.
        lm: the language model, in eval mode; None if `train_dataset` is `Activations`.
        args: what the run is told; batch sizes count tokens.
        train_dataset: texts, files, a folder, a Hub id or a `datasets` data set, as
            `text.read_documents` takes them; or `Activations`, such as `CachedActivations(folder)`.
        eval_dataset: held out, likewise.
        processing_class: the language model's tokenizer; for texts.
        activation_settings: how text becomes rows.
        callbacks, optimizers: as of `transformers.Trainer`.

    Raises:
        ConfigError, HookpointError, WidthError, TextError, TrainingError: what was given does not
            fit together; before anything is computed.
    """

    args: SwitchSAETrainingArguments

    def __init__(
        self,
        sae: Given | Mapping[str, Given],
        lm: nn.Module | None = None,
        args: SwitchSAETrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        activation_settings: ActivationSettings | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = copy.copy(args) if args is not None else SwitchSAETrainingArguments()
        saes = build_saes(sae, lm, train_dataset, args.seed)
        self.saes, self.lm, self._tokenizer = saes, lm, processing_class
        given = (lm, processing_class, activation_settings)
        self.activations = activations_for(readers_of(saes), train_dataset, *given)
        held_out = None
        if eval_dataset is not None:
            held_out = activations_for(readers_of(saes), eval_dataset, *given)
        self._end_of(args)
        together = SAEsTogether(saes, args.loss, args.load_balance_alpha)
        super().__init__(
            model=together,
            args=args,
            eval_dataset=held_out,
            callbacks=[*(callbacks or []), UnitRows(saes)],
            optimizers=optimizers,
        )
        self.train_dataset = self.activations
        self.processing_class = None  # the language model's: no part of what is saved
        self.model_accepts_loss_kwargs, self.can_return_loss = False, True
        self._monitor = Monitor(saes)
        self._fresh = {name: is_fresh(each) for name, each in saes.items()}
        self._wholes: list[WholeBatch] | None = None
        self._sums: list[Tensor] = []
        self._before: list[Tensor] = []
        self._fired: list[Tensor] = []
        self._parts = 0
        self._clock = (time.monotonic(), 0)

    @property
    def sae(self) -> SwitchSAE:
        """The SAE, or the first of several."""
        return next(iter(self.saes.values()))

    def _end_of(self, args: SwitchSAETrainingArguments) -> None:
        """Turn tokens into steps; raise TrainingError if nothing says when to stop."""
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.num_train_tokens is not None:
            args.max_steps = max(1, math.ceil(args.num_train_tokens / batch))
        rows = self.activations.num_rows
        if args.max_steps <= 0 and rows is None:
            raise TrainingError(
                "how many rows the data set has is known only once it has been read, and the "
                "learning rate needs to know where the run ends: give num_train_tokens or "
                "max_steps, or harvest an activation cache first."
            )
        if rows is not None and rows < args.train_batch_size * args.world_size:
            raise TrainingError(
                f"there are {rows:,} rows and a batch takes {args.train_batch_size:,} of each of "
                f"{args.world_size} processes: give more text, or a smaller "
                "per_device_train_batch_size."
            )

    # --- the run ----------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As `Trainer.train`; resumes from the newest checkpoint that is whole.

        Args:
            resume_from_checkpoint: True: the newest in `output_dir` that is undamaged, saying so if
                that is not the last one; a run that has none yet begins. Or a checkpoint's folder.
                By default `args.resume_from_checkpoint`.

        Raises:
            NonFiniteError: the loss is NaN or infinite; the last checkpoint is kept.
            TrainingError: a damaged checkpoint, one of another run, or no room for a new one.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if self.is_world_process_zero():
            self._say(self._plan(checkpoint))
        if checkpoint is None:
            self._start()
        self.accelerator.wait_for_everyone()
        result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self._calibrate()
        return result

    def _start(self) -> None:
        """Fit fresh SAEs to the data."""
        fresh = {name: sae for name, sae in self.saes.items() if self._fresh[name]}
        if not fresh:
            return
        bounds = self.activations.policy["outlier_norm"]
        rows = self.activations.sample(self.args.start_rows) if self.args.start != "none" else {}
        for sae in fresh.values():
            place = str(sae.config.hookpoint)
            some = rows.get(place, torch.empty(0))
            start_from(sae, some, bounds.get(place), self.args.start)

    def _plan(self, checkpoint: str | None) -> str:
        args, batch = self.args, self.get_total_train_batch_size(self.args)
        steps, rates = self._planned_steps(), self.learning_rates
        sizes = ", ".join(
            f"{name} ({sae.config.num_experts} x {sae.config.features_per_expert:,} features, "
            f"k={sae.config.k}, lr {rates[name]:.2g})"
            for name, sae in self.saes.items()
        )
        told = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
            for name, value in self.activations.estimate().items()
        )
        begun = f" from {checkpoint}" if checkpoint else ""
        return (
            f"training{begun}: {sizes}\n{steps:,} steps of {batch:,} tokens, "
            f"{steps * batch:,} tokens on {args.world_size} process(es)\nactivations: {told}"
        )

    def _run_notes(self) -> dict[str, Any]:
        return {**super()._run_notes(), "learning_rates": self.learning_rates}

    def _say(self, text: str) -> None:
        if not self.args.disable_tqdm:
            logger.warning(text)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; FSDP works on CPUs too, which accelerate leaves out."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.world_size > 1 and not self.is_fsdp_enabled:
            state: Any = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    # --- data -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """This process's rows."""
        rows = self.args.train_batch_size
        share = (self.args.process_index, self.args.world_size)
        self._stream = Stream(self.activations, rows, *share)
        return self._stream.loader()

    def num_examples(self, dataloader: Any) -> int:
        """Rows."""
        return self.activations.num_rows or 0

    def _init_training_state(self, *args: Any) -> Any:
        epochs, steps = super()._init_training_state(*args)
        self._stream.to_skip = steps
        self._clock = (time.monotonic(), self.state.num_input_tokens_seen)
        return epochs, steps

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> Any:
        """The rows of a step, on the device; where they are parts of a batch, what they add to."""
        found, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        found = [
            {name: rows.to(device, self._rows_dtype()) for name, rows in batch.items()}
            for batch in found
        ]
        self._parts = len(found)
        in_parts = self.args.world_size > 1 or self.args.gradient_accumulation_steps > 1
        self._fired, self._wholes, self._sums, self._before = [], None, [], []
        if found and (in_parts or self.args.loss == "published"):
            self._before = [sae.num_tokens_since_fired.clone() for sae in self.saes.values()]
            self._sums = self._sums_over(found)
            widths = (sae.config.hidden_size for sae in self.saes.values())
            self._wholes = [
                WholeBatch.of(each, width).to(self._rows_dtype())
                for each, width in zip(self._sums, widths, strict=True)
            ]
        return found, items

    def _rows_dtype(self) -> torch.dtype:
        return self.sae.b_dec.dtype

    @torch.no_grad()
    def _sums_over(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """For each SAE `batch_sums` over a step's parts, of all processes."""
        parts = [self.model_wrapped(batch, only_sums=True)["sums"] for batch in batches]
        return [self._added(torch.stack(each).sum(0)) for each in zip(*parts, strict=True)]

    def _added(self, tensor: Tensor) -> Tensor:
        """Added up over processes."""
        return added_up(tensor) if self.args.world_size > 1 else tensor

    # --- a step -----------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of a part of a step."""
        model.train()
        for sae, before in zip(self.saes.values(), self._before, strict=False):
            # which features are dead is told when a batch begins, not between its parts
            sae.num_tokens_since_fired.copy_(before)
        with self.compute_loss_context_manager():
            found = model(inputs, self._wholes)
        loss: Tensor = found["loss"]
        if loss.device.type == "cpu" and not loss.isfinite():
            raise self._not_finite(loss.detach(), inputs)
        # processes' gradients are averaged, and their losses are shares that add up
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
        self._monitor.end_step()
        if self._sums:
            for at, sae in enumerate(self.saes.values()):
                count_over_parts(
                    sae, self._before[at], self._sums[at], self._fired[at], self._added
                )
                if sae.config.activation == "batch_topk":
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
        # on a GPU looking at each step's loss would wait for it
        if (self.control.should_log or self.control.should_save) and not tr_loss.isfinite():
            raise self._not_finite(tr_loss, {})
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        rows = len(next(iter(inputs.values())))
        self.state.num_input_tokens_seen += rows * self.args.world_size

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> int:
        """Of the routed experts and the router, forward and backward."""
        total = 0
        for sae in self.saes.values():
            c = sae.config
            second = c.num_experts > 1 and c.second_expert_loss_coef > 0
            visits = c.num_experts_per_token + second
            features = c.features_per_expert * visits + c.num_experts
            total += 6 * len(inputs[str(c.hookpoint)]) * c.hidden_size * 2 * features
        return total

    # --- what is logged ---------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; a step's logs get fvu, l0, dead_share, expert load and tokens."""
        if "loss" in logs:
            found = self._monitor.take(self._added)
            own = self._own_optimizer
            norms = own.grad_norms if own is not None else []
            for name, norm in zip(self.saes, norms, strict=False):
                found["grad_norm" if len(self.saes) == 1 else f"{name}/grad_norm"] = float(norm)
            then, tokens = self._clock
            now, seen = time.monotonic(), self.state.num_input_tokens_seen
            self._clock = (now, seen)
            speed = (seen - tokens) / max(now - then, 1e-9)
            logs = {**logs, **found, "tokens": seen, "tokens_per_second": round(speed, 1)}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure on held-out rows: `eval_fvu`, `eval_l0`, `eval_dead_share`, ...

        Args:
            eval_dataset: texts or `Activations`; the trainer's own by default.
            ignore_keys: not used: there are no outputs to leave out.
            metric_key_prefix: what the names begin with.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, Activations):
            readers = readers_of(self.saes)
            dataset = activations_for(readers, dataset, self.lm, self._tokenizer, None)
        args = self.args
        share = (args.eval_batch_size, args.process_index, args.world_size)
        with gathered(self.model):
            found = measure_held_out(self.saes, dataset, *share, self._added)
        self.held_out = found
        alone = len(found) == 1
        metrics = {
            f"{metric_key_prefix}_{figure}" if alone else f"{metric_key_prefix}_{name}/{figure}": v
            for name, figures in found.items()
            for figure, v in figures.items()
        }
        metrics[f"{metric_key_prefix}_loss"] = sum(figures["fvu"] for figures in found.values())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

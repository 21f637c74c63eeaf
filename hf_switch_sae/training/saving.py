"""The part of the trainer that writes and reads: checkpoints, saved SAEs, releases on the Hub."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.errors import NonFiniteError, SwitchSAEError, TrainingError
from hf_switch_sae.evaluation.calibration import calibrate_on
from hf_switch_sae.files import rounded
from hf_switch_sae.hub.layout import CARD
from hf_switch_sae.release.push import push
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training import checkpoints, sharded
from hf_switch_sae.training.arguments import SwitchSAETrainingArguments
from hf_switch_sae.training.monitor import Monitor
from hf_switch_sae.training.notes import arguments_of, write_notes

logger = logging.get_logger(__name__)

_NOT_OF_THE_RUN = {"metrics", "source", "base_model", "base_model_revision"}


class Saving(Trainer):
    """What `SwitchSAETrainer` saves and loads; see `checkpoints` for how it lies on the disk."""

    args: SwitchSAETrainingArguments
    saes: dict[str, SwitchSAE]
    activations: Activations
    held_out: dict[str, dict[str, float]] | None = None
    command: str | None = None
    """What was typed to start the run, to note beside its SAEs."""
    _monitor: Monitor
    _added: Callable[[Tensor], Tensor]

    # --- sharded ---

    def _plain_saes(self) -> dict[str, SwitchSAE]:
        """The SAEs with whole weights; all processes must ask, and the first gets an answer."""
        if not self.is_fsdp_enabled:
            return self.saes
        state, found = sharded.whole_state(self.model), {}
        if self.args.should_save:
            for at, (name, sae) in enumerate(self.saes.items()):
                start = f"saes.{at}."
                found[name] = SwitchSAE(sae.config)
                found[name].load_state_dict(
                    {key[len(start) :]: v for key, v in state.items() if key.startswith(start)}
                )
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        name = f"optimizer_{self.args.process_index}.pt"
        torch.save(sharded.own_share(self._inner_optimizer()), Path(output_dir) / name)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = Path(checkpoint) / f"optimizer_{self.args.process_index}.pt"
        if not path.exists():
            raise TrainingError(f"{path} is not there: go on with as many processes, sharded.")
        state = torch.load(path, map_location="cpu", weights_only=True)
        sharded.load_own_share(self._inner_optimizer(), state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(schedule)

    def _inner_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # --- checkpoints ------------------------------------------------------------------------------

    def last_good_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole, if there is one."""
        try:
            return checkpoints.newest_good(Path(str(self.args.output_dir)), lambda _: None)
        except TrainingError:
            return None

    def _checkpoint_to_resume(self, wanted: Any) -> str | None:
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero():
            checkpoints.remove_leftovers(folder)
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):
            wanted = wanted.lower() == "true"
        if wanted is True:
            found = checkpoints.newest_good(folder, logger.warning)
            if found is None:
                logger.warning(f"{folder} has no checkpoint: the run begins.")
            return None if found is None else str(found)
        if not wanted:
            return None
        if not Path(wanted).is_dir():
            raise TrainingError(f"there is no checkpoint {wanted}; True takes the newest there is.")
        if fault := checkpoints.fault_of(Path(wanted)):
            raise TrainingError(
                f"{wanted} is damaged: {fault}. resume_from_checkpoint=True takes the newest that "
                "is whole."
            )
        return str(wanted)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer._save_checkpoint`, but what has its name is whole."""
        if trial is None:
            self.store_flos()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        partial = checkpoints.partial_of(folder)
        self._check_finite()
        try:
            self._on_all(lambda: self.args.should_save and checkpoints.begin(folder))
            self._on_all(lambda: self._write_checkpoint(partial, folder))
            self._on_all(lambda: self._finish(partial, folder))
        except Exception as err:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(err, SwitchSAEError):
                raise
            raise checkpoints.no_room(folder, err, self.last_good_checkpoint()) from err
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = [Path(best)] if best else []
            checkpoints.rotate(folder.parent, self.args.save_total_limit, keep)

    def _write_checkpoint(self, partial: Path, folder: Path) -> None:
        self._write_saes(partial)
        best = self.state.best_global_step
        if best is not None:
            path = folder.with_name(f"checkpoint-{best}")
            if path == folder or path.exists():
                self.state.best_model_checkpoint = str(path)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            own = {
                "activations": self.activations.state_dict(),
                "monitor": self._monitor.state_dict(),
            }
            torch.save(own, partial / f"process_{self.args.process_index}.pt")
        if self.args.should_save:
            self._note_callbacks()
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            torch.save(self.args, partial / TRAINING_ARGS_NAME)

    def _finish(self, partial: Path, folder: Path) -> None:
        if self.args.should_save:
            checkpoints.seal(partial)
            checkpoints.put_in_place(partial, folder)

    def _note_callbacks(self) -> None:
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                noted: Any = self.state.stateful_callbacks
                name = type(each).__name__
                if isinstance(noted[name], list):
                    noted[name].append(each.state())
                else:
                    noted[name] = each.state()

    def _on_all(self, act: Callable[[], Any]) -> None:
        """Run on every process; if one fails, all raise."""
        failure: Exception | None = None
        try:
            act()
        except Exception as err:
            failure = err
        failed = self._added(torch.tensor(float(failure is not None), device=self.args.device))
        if failure is not None:
            raise failure
        if failed > 0:
            raise TrainingError("another process could not write its part of the checkpoint.")

    def _check_finite(self) -> None:
        for name, sae in self.saes.items():
            weights = [getattr(w, "to_local", lambda w=w: w)() for w in sae.parameters()]
            bad = sum(int((~weight.isfinite()).sum()) for weight in weights)
            if self._added(torch.tensor(bad, device=self.args.device)):
                last = self.last_good_checkpoint()
                raise NonFiniteError(
                    f"{name} has weights that are NaN or infinite at step "
                    f"{self.state.global_step}; it is not saved. "
                    + (f"{last} is from before." if last else "There is no checkpoint before it.")
                    + " Lower the learning rate, or clip more (max_grad_norm)."
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole: dict[str, Tensor] = {}
        for name, sae in self.saes.items():
            folder = Path(resume_from_checkpoint) / name
            if not folder.is_dir():
                raise TrainingError(
                    f"{resume_from_checkpoint} has no SAE {name}: it is of another run."
                )
            with _no_bar():
                found = SwitchSAE.from_pretrained(folder, dtype=sae.dtype)
            _check_same_run(found, sae, resume_from_checkpoint)
            if self.is_fsdp_enabled:
                at = list(self.saes).index(name)
                whole |= {f"saes.{at}.{key}": value for key, value in found.state_dict().items()}
            else:
                sae.load_state_dict(found.state_dict())
        if whole:
            sharded.load_whole_state(self.model, whole)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        found = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self.is_fsdp_enabled and hasattr(self._inner_optimizer(), "hold"):
            self._inner_optimizer().hold(list(self.saes.values()))
        if resume_from_checkpoint is not None and not self.args.ignore_data_skip:
            path = Path(resume_from_checkpoint) / f"process_{self.args.process_index}.pt"
            if not path.exists():
                raise TrainingError(
                    f"{path} is not there: the run was saved by fewer processes than the "
                    f"{self.args.world_size} of now, or with save_only_model. Go on with as many."
                )
            own = torch.load(path, map_location="cpu", weights_only=True)
            self.activations.load_state_dict(own["activations"])
            self._monitor.load_state_dict(own["monitor"])
        return found

    # --- saved SAEs -------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save each SAE in the subfolder it is named by, as `args.save_dtype`, with its origin.

        With `args.push_to_hub` it is pushed too.
        """
        folder = Path(str(output_dir or self.args.output_dir))
        dtype = getattr(torch, self.args.save_dtype)
        self._write_saes(folder, dtype, beside=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_saes(
        self, folder: Path, dtype: torch.dtype | None = None, beside: bool = False
    ) -> None:
        """Write every SAE; `beside`: each renamed into its place."""
        for name, sae in self._plain_saes().items():
            if not self.args.should_save:
                return
            if self.held_out is not None and name in self.held_out:
                sae.config.metrics = rounded(self.held_out[name])
            saved = sae
            if dtype not in (None, sae.dtype):
                saved = copy.deepcopy(sae)
                nn.Module.to(saved, dtype)
            path = folder / name
            target = checkpoints.begin(path) if beside else path
            with _no_bar():
                saved.save_pretrained(target)
            write_notes(target, sae, self.activations, self._run_notes())
            if beside:
                checkpoints.move_files(target, path)

    def _run_notes(self) -> dict[str, Any]:
        return {
            **({"command": self.command} if self.command else {}),
            "arguments": arguments_of(self.args),
            "processes": self.args.world_size,
            "steps": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "held_out": self.held_out,
            "log": self.state.log_history,
        }

    def _calibrate(self) -> None:
        """Measure what edits and cards need, at the end of the run."""
        if not self.args.calibration_rows:
            return
        rows = self.activations.sample(self.args.calibration_rows)
        with sharded.gathered(self.model):
            for sae in self.saes.values():
                calibrate_on(sae, rows[str(sae.config.hookpoint)])

    # --- the Hub ----------------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Publish the SAEs as a release with a card, in one commit; see `push`.

        Args:
            commit_message: of the commit.
            blocking: must be True: nothing goes on in the background.
            token: by default `args.hub_token`, else the one you are logged in with.
            revision: branch; by default `args.hub_revision`, else main.
            private: whether a new repository is private; by default `args.hub_private_repo`.
            kwargs: none.

        Returns:
            The commit's id; None on all processes but the first.

        Raises:
            HubError: the Hub refuses or can't be reached.
        """
        if kwargs or not blocking:
            raise TrainingError(
                f"push_to_hub takes no {', '.join(kwargs) or 'blocking=False'}: the card is made "
                "from the SAEs' own files."
            )
        with tempfile.TemporaryDirectory() as staged:
            self._write_saes(Path(staged), getattr(torch, self.args.save_dtype))
            if not self.is_world_process_zero():
                return None
            return self._push(Path(staged), commit_message, token, revision, private)

    def push_release(self, folder: Path, message: str) -> str:
        """Publish the SAEs that `save_model` wrote into a folder, with what lies beside them."""
        with tempfile.TemporaryDirectory() as staged:
            for name in self.saes:
                shutil.copytree(folder / name, Path(staged) / name)
            if (readme := folder / CARD).exists():
                shutil.copy(readme, staged)
            return self._push(Path(staged), message)

    def _push(
        self,
        folder: Path,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        args = self.args
        return push(
            folder,
            args.hub_model_id or Path(str(args.output_dir)).resolve().name,
            private=args.hub_private_repo if private is None else private,
            branch=revision or args.hub_revision or "main",
            message=message,
            token=token or args.hub_token,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy, args = self.args.hub_strategy, self.args
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        message = f"Training in progress, step {self.state.global_step}"
        with tempfile.TemporaryDirectory() as staged:
            for name in self.saes:
                shutil.copytree(Path(checkpoint_folder) / name, Path(staged) / name)
            self._push(Path(staged), message)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = strategy == HubStrategy.CHECKPOINT
            HfApi(token=args.hub_token).upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                revision=args.hub_revision,
            )


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' progress bars, in the middle of the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_same_run(found: SwitchSAE, sae: SwitchSAE, checkpoint: str) -> None:
    """Raise TrainingError if a checkpoint's SAE is of another kind than the one to train."""
    there, here = found.config.to_dict(), sae.config.to_dict()
    names = set(type(sae.config).__annotations__) - _NOT_OF_THE_RUN
    other = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(names)
        if there.get(name) != here.get(name) and name != "base_model_fingerprint"
    ]
    if other:
        raise TrainingError(
            f"{checkpoint} is of another run: {'; '.join(other)}. Go on with what it began with, "
            "or take another output_dir."
        )

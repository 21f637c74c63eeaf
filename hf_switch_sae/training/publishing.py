"""The part of the trainer that publishes: releases and checkpoints on the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from hf_switch_sae.errors import TrainingError
from hf_switch_sae.hub.layout import CARD
from hf_switch_sae.release.push import push
from hf_switch_sae.training.saving import Saving


class Publishing(Saving):
    """How `SwitchSAETrainer` pushes what it has saved."""

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
            commit_message: the commit's message.
            blocking: must be True: nothing is pushed in the background.
            token: by default `args.hub_token`, or else the one you are logged in with.
            revision: the branch; by default `args.hub_revision`, or else main.
            private: whether a new repository is private; by default `args.hub_private_repo`.
            kwargs: other arguments of `Trainer.push_to_hub`, all refused.

        Returns:
            The commit's id; None on all processes but the first.

        Raises:
            HubError: the Hub refuses, or can't be reached.
            TrainingError: an argument that means nothing here.
        """
        if kwargs or not blocking:
            raise TrainingError(
                f"push_to_hub takes no {', '.join(kwargs) or 'blocking=False'}: the card is made "
                "from the SAEs' own files."
            )
        with tempfile.TemporaryDirectory() as staged:
            # all processes take part: sharded weights are gathered from them
            self._write_saes(Path(staged), getattr(torch, self.args.save_dtype))
            if not self.is_world_process_zero():
                return None
            return self._push(Path(staged), commit_message, token, revision, private)

    def push_release(self, folder: Path, message: str) -> str:
        """Publish the SAEs that `save_model` wrote into a folder, and the card if there is one."""
        with self._staged(folder) as staged:
            return self._push(staged, message)

    @contextmanager
    def _staged(self, folder: Path) -> Iterator[Path]:
        """A copy of a folder's SAEs and card, without the checkpoints and optimizer beside them."""
        with tempfile.TemporaryDirectory() as staged:
            for name in self.saes:
                shutil.copytree(folder / name, Path(staged) / name)
            if (card := folder / CARD).exists():
                shutil.copy(card, staged)
            yield Path(staged)

    def _push(
        self,
        folder: Path,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        # the arguments of `TrainingArguments` that say where to push, if the call does not
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
        """As `Trainer`'s own, but in this process: a push that fails is then seen."""
        strategy, args = self.args.hub_strategy, self.args
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        message = f"Training in progress, step {self.state.global_step}"
        # only the SAEs, so that whoever loads the release gets no optimizer
        with self._staged(Path(checkpoint_folder)) as staged:
            self._push(staged, message)
        # these strategies keep what it takes to resume on the Hub too
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = strategy == HubStrategy.CHECKPOINT
            HfApi(token=args.hub_token).upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                revision=args.hub_revision,
            )

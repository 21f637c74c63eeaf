"""Runs the language model over contexts, up to the last hookpoint, and keeps rows to train on.

Room   LM, hookpoints, documents, tokenizer, settings -> checked, outlier norms measured -> passes
       of the LM from a cursor on -> kept rows of every hookpoint, and their tokens.
How    Every pass takes the same number of contexts, so a pass from the same cursor gives the same
       numbers. With several ranks, each takes every n-th context.
Beware Hooks are on the model only while passes are iterated over. Attached SAEs that edit the
       stream before a hookpoint change its rows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.activations.policy import TokenPolicy, norms
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.errors import HookpointError, TextError
from hf_switch_sae.lm.config import (
    check_in_eval,
    is_sequence_first,
    longest_context,
    text_config,
    vocabulary_size,
    without_cache,
)
from hf_switch_sae.lm.hookpoints import Hookpoint, resolve, unwrap
from hf_switch_sae.lm.residuals import input_device, residuals
from hf_switch_sae.text.contexts import Context, Cursor, Marks, Packer
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.text.tokenizer import tokenizer_identity
from hf_switch_sae.text.windows import padded

_MEASURED_ROWS = 4000
_TOKENS_A_PASS = {"cpu": 2048}
_TOKENS_A_PASS_ELSEWHERE = 16384


@dataclass(frozen=True)
class Pass:
    """What one pass of the language model gave."""

    rows: dict[str, Tensor]
    """Hookpoint -> [kept, d] in the LM's dtype; row i belongs to the same token at each."""
    token_ids: Tensor
    """[kept] int64, on the CPU."""
    end: Cursor
    """Where the next pass of this rank begins."""


class Harvest:
    """Rows of a language model's residual streams over a data set; see the module's header.

    Args:
        lm: in eval mode; on one device or spread by a `device_map`, quantized or not.
        hookpoints: layers, hookpoints or module paths.
        documents: anything that `text.read_documents` takes.
        tokenizer: the model's; not needed for documents of token ids.
        settings: how text becomes rows.

    Raises:
        AttachError, HookpointError: the model is in training mode, or has no such hookpoint.
        TextError: the data set is empty, its texts are shorter than a context, or the tokenizer
            is another model's.
    """

    def __init__(
        self,
        lm: nn.Module,
        hookpoints: int | str | Sequence[int | str],
        documents: Any,
        tokenizer: Any = None,
        settings: ActivationSettings | None = None,
    ) -> None:
        self.lm, self.tokenizer = lm, tokenizer
        self.settings = settings or ActivationSettings()
        self._root = unwrap(lm)
        check_in_eval(self._root)

        wanted = [hookpoints] if isinstance(hookpoints, int | str) else list(hookpoints)
        self._resolved = [resolve(self._root, at) for at in wanted]
        # two names of one hookpoint are read once
        self.hookpoints = tuple(dict.fromkeys(each.name for each in self._resolved))
        self._check_hookpoints()

        self.documents = read_documents(documents)
        self._device = input_device(self._root)
        self._vocabulary = vocabulary_size(self._root)
        self._check_tokenizer()

        # a model that looks both ways would mix documents that are joined
        self.causal = not _looks_both_ways(self._resolved, tokenizer)
        packing = self.settings.packing
        windows = packing == "windows" or (packing == "auto" and not self.causal)
        marks = Marks.of(self.settings.boundary, tokenizer)
        self._check_context(marks, windows)
        self.packer = Packer(self.documents, tokenizer, self.settings.context, marks, windows)

        # the first token of a packed context is an attention sink; a window's is [CLS], special
        skip_first = self.settings.skip_first
        self.policy = TokenPolicy(
            not windows if skip_first is None else skip_first,
            self._special(marks) if self.settings.skip_special else (),
            self.settings.outlier_factor,
        )

        tokens = self.settings.tokens_per_pass or _TOKENS_A_PASS.get(
            self._device.type, _TOKENS_A_PASS_ELSEWHERE
        )
        self.contexts_per_pass = max(1, tokens // self.settings.context)
        self._options = without_cache(self._root)
        self.hidden_size: dict[str, int] = {}
        self.dtype: dict[str, torch.dtype] = {}
        self.device: dict[str, torch.device] = {}
        self._measure()

    @property
    def tokens_per_pass(self) -> int:
        """Tokens per pass of the language model, at most."""
        return self.contexts_per_pass * self.settings.context

    def _measure(self) -> None:
        """Measure widths, and bounds on norms, on the first rows of the data set."""
        lengths: dict[str, list[Tensor]] = {name: [] for name in self.hookpoints}
        count = 0
        with closing(self.passes(self.contexts(epochs=1))) as passes:
            for found in passes:
                for name, rows in found.rows.items():
                    self.hidden_size[name] = rows.shape[-1]
                    self.dtype[name], self.device[name] = rows.dtype, rows.device
                    lengths[name].append(norms(rows).cpu())
                count += len(found.token_ids)
                # widths need one kept row; medians need many
                if count >= _MEASURED_ROWS or (count and self.settings.outlier_factor is None):
                    break
        if not count:
            raise TextError(
                "the token policy leaves nothing of this text: every token is special, or the "
                "first of a context."
            )
        if (factor := self.settings.outlier_factor) is not None:
            medians = {name: float(torch.cat(some).median()) for name, some in lengths.items()}
            self.set_outlier_norm({name: factor * median for name, median in medians.items()})

    def set_outlier_norm(self, outlier_norm: dict[str, float]) -> None:
        """Use bounds that were measured before, instead of those measured here."""
        self.policy = replace(self.policy, outlier_norm=dict(outlier_norm))

    def policy_dict(self) -> dict[str, Any]:
        """JSON-able: which tokens are kept, and how text became contexts."""
        return {
            "context": self.settings.context,
            "packing": "windows" if self.packer.windows else "packed",
            "before": list(self.packer.marks.before),
            "after": list(self.packer.marks.after),
            **self.policy.to_dict(),
        }

    def identity(self) -> dict[str, Any]:
        """JSON-able: all that decides the rows and their order in the text, except the LM."""
        policy = self.policy_dict()
        del policy["outlier_norm"]  # measured here, and a resume replaces it by its own
        return {
            "hookpoints": list(self.hookpoints),
            "hidden_size": self.hidden_size,
            "dataset": self.documents.provenance,
            "tokenizer": None if self.tokenizer is None else tokenizer_identity(self.tokenizer),
            "policy": policy,
        }

    def contexts(
        self,
        start: Cursor | None = None,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Context]:
        """A rank's contexts from a cursor on: context number i goes to rank i % world_size.

        Args:
            start: where to begin; by default at the first document.
            epochs: stop before this epoch, counted from 0.
            rank, world_size: which of how many processes this is.
        """
        for context in self.packer.contexts(start, epochs):
            if context.number % world_size == rank:
                yield context

    def passes(self, contexts: Iterator[Context]) -> Generator[Pass, None, None]:
        """Passes of the language model; each takes the next contexts when it is asked for.

        Close the generator if you stop before its end: until then its hooks stay on the model.

        Raises:
            TextError: there are token ids beyond the model's vocabulary.
            NonFiniteError: a residual stream holds NaN or infinity.
        """
        with residuals(self.lm, [f"{at.path}.{at.site}" for at in self._resolved]) as read:
            while some := list(islice(contexts, self.contexts_per_pass)):
                yield self._pass(some, read)

    def inputs(self, contexts: list[Context]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """input_ids and attention_mask [batch, seq] on the CPU, and the model's keyword arguments.

        Raises:
            TextError: there are token ids beyond the model's vocabulary.
        """
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids, mask = padded([context.tokens for context in contexts], pad)
        # checked here, because on a GPU an index out of range breaks the whole process
        largest = int(ids.max())
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise TextError(
                f"token id {largest} is beyond the {self._vocabulary} embeddings of "
                f"{type(self._root).__name__}: the documents' tokens, or the tokenizer, are "
                "another model's."
            )
        inputs: dict[str, Any] = {"input_ids": ids.to(self._device), **self._options}
        # packed contexts are all of one length, so nothing of them is padding
        if self.packer.windows:
            inputs["attention_mask"] = mask.to(self._device)
        return ids, mask, inputs

    @torch.no_grad()
    def _pass(self, contexts: list[Context], read: Any) -> Pass:
        ids, mask, inputs = self.inputs(contexts)
        streams: dict[str, Tensor] = read(**inputs)
        # some models merge or split tokens on the way, so rows could not be told apart
        for name, stream in streams.items():
            if stream.ndim != 3 or stream.shape[:2] != ids.shape:
                raise HookpointError(
                    f"the stream at {name} is {list(stream.shape)} for {list(ids.shape)} tokens; "
                    "training needs one vector a token."
                )
        index = self.policy.rows(streams, self.policy.allows(ids, mask))
        rows = {
            name: stream.reshape(-1, stream.shape[-1]).index_select(0, index.to(stream.device))
            for name, stream in streams.items()
        }
        return Pass(rows, ids.flatten()[index.cpu()], contexts[-1].end)

    def _special(self, marks: Marks) -> tuple[int, ...]:
        found = set(getattr(self.tokenizer, "all_special_ids", None) or [])
        # documents of token ids come without a tokenizer; the config knows some of its tokens
        if self.tokenizer is None:
            config = text_config(self._root)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(config, name, None)
                found.update(value if isinstance(value, list) else [value])
        found.update(marks.before, marks.after)
        return tuple(sorted(each for each in found if isinstance(each, int) and each >= 0))

    def _check_hookpoints(self) -> None:
        if not self._resolved:
            raise HookpointError("no place to read: name at least one layer or hookpoint.")
        for each in self._resolved:
            owner = self._root if each.blocks is None else each.blocks.owner
            if is_sequence_first(owner):
                raise HookpointError(
                    f"{type(owner).__name__} has its stream as [seq, batch, d]; training reads "
                    "[batch, seq, d] only."
                )

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None or self._vocabulary is None:
            return
        size, model = len(self.tokenizer), type(self._root).__name__
        largest = max(self.tokenizer.get_vocab().values(), default=0)
        if largest >= self._vocabulary:
            raise TextError(
                f"the tokenizer has {size} tokens with ids up to {largest}, and {model} has "
                f"{self._vocabulary} embeddings: it is another model's tokenizer."
            )
        # embeddings are often padded to a round number, but not to twice the size
        if self._vocabulary > 2 * size + 1024:
            raise TextError(
                f"the tokenizer has {size} tokens, and {model} {self._vocabulary} embeddings: it "
                "is another model's tokenizer."
            )

    def _check_context(self, marks: Marks, windows: bool) -> None:
        context = self.settings.context
        longest = longest_context(self._root)
        if longest is not None and longest < context:
            raise TextError(
                f"context={context} is more than the {longest} positions of "
                f"{type(self._root).__name__}: give a smaller context."
            )
        if windows and context <= len(marks.before) + len(marks.after):
            raise TextError(f"context={context} has no room for a token between its marks.")


def _looks_both_ways(hookpoints: list[Hookpoint], tokenizer: Any) -> bool:
    """Whether a token sees those after it, so that documents should not be joined."""
    # attention modules of transformers say whether they are causal; one that is decides
    flags: set[bool] = set()
    for at in hookpoints:
        blocks = (at.module,) if at.blocks is None else at.blocks.blocks
        for block in blocks:
            found = (getattr(module, "is_causal", None) for module in block.modules())
            flags.update(flag for flag in found if isinstance(flag, bool))
    if flags:
        return True not in flags
    # no module says so (an attention of its own kind, or none), so the tokenizer decides: only
    # those of encoders have both of these
    named = ("cls_token_id", "sep_token_id")
    return all(getattr(tokenizer, name, None) is not None for name in named)

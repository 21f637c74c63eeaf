"""Which `generate` a forward pass belongs to: the Python call stack -> `Run` or `Requests`.

Room   `rows=` counts the rows that `generate` was given, "generated" are the tokens it appended.
       Only `generate` itself knows either, and the `generate` that runs need not be that of the
       object that was attached to: an inner model's, a wrapper's, a bound method kept from before.
How    A forward runs below the frames of whoever called it, so they are read from there. What has
       ended or raised is no longer on the stack: nothing is noted, and nothing can be left behind.
       A judge (a logits processor, a stopping criterion, a streamer) that runs the model is no part
       of the `generate` that asked it; a draft is part of the `generate` that it drafts for.
Beware Local variables of transformers are read by name. Where a name is missing the answer is None,
       which scopes refuse; it is never guessed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from hf_switch_sae.lm.calls import Call

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_LOOPS = ("_prefill", "_sample", "_beam_search", "_assisted_decoding")
_JUDGES = ("transformers.generation.logits_process", "transformers.generation.stopping_criteria")
_IDS_SO_FAR = ("candidate_input_ids", "flat_running_sequences", "input_ids")
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "input_values")
_TILING = {"ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor"}
_PREPARING = ("_maybe_prepare_encoder_kwargs_for_generation", "_prepare_model_inputs")
_NAMES = {
    *(*_LOOPS, *_PREPARING, "_wrapped_call_impl", "generate", "_main_generate_loop"),
    *("generate_with_fallback", "get_candidates", "get_unconditional_logits", "compute_batch"),
    *("__call__", "put", "end"),
}
"""Functions whose frames tell something."""


@dataclass(frozen=True)
class Run:
    """One `generate` under way, as far as it can be told."""

    name: str
    """Whose it is, for messages."""
    rows: int | None = None
    """Rows that it was given; None if unknown."""
    copies: int = 1
    """Beams or return sequences of each row, side by side in the batch."""
    tiled: bool = False
    """Whether the batch has a second half, that of guidance without the prompt."""
    numbers: Sequence[int] | None = None
    """The user's row that each of `rows` is; None: they are the user's."""
    generated: int | None = None
    """How many tokens have been appended so far, drafts included; None if unknown."""
    length: int | None = None
    """Token ids so far, prompt and generated; None if unknown."""
    mask: Tensor | None = None
    """[batch, length], the attention mask of all tokens so far, if one was given."""
    beams: int = 1
    total: int | None = None
    """How many rows the user gave, where `numbers` are some of them; None if unknown."""

    def row_of(self, batch: int) -> list[int] | None:
        """The user's row of each row of a batch; None if unknown."""
        if self.rows is None:
            return None
        numbers = self.numbers or range(self.rows)
        # an encoder runs before its rows are multiplied
        if batch == self.rows:
            return list(numbers)
        expanded = [number for number in numbers for _ in range(self.copies)]
        expanded = expanded * 2 if self.tiled else expanded
        return expanded if batch == len(expanded) else None


@dataclass(frozen=True)
class Requests:
    """One step of continuous batching: which requests stand in its one row, one after another."""

    ids: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each in this step."""
    prompts: tuple[int, ...]
    """Tokens of each one's prompt."""
    put_off: tuple[bool, ...]
    """Whether it was put off for lack of room, and begins anew with what it had generated."""

    def numbers(self) -> list[int] | None:
        """Each request's place in the order of asking; None if the caller named them himself."""
        found = [re.fullmatch(r"req_(\d+)(__child#\d+)?", request) for request in self.ids]
        return [int(each[1]) for each in found if each] if all(found) else None


def run_under_way(calls: Sequence[Call]) -> Run | Requests | None:
    """What a forward that runs in this thread belongs to; None if to no `generate`.

    Args:
        calls: of the forward's models, outermost first.
    """
    search, frame = _Search(calls), sys._getframe(1)
    # names first: this is done at every token for edits that ask for rows or parts
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name not in _NAMES:
            continue
        found = search.visit(frame)
        if found is not None:
            return found
        if search.ended:
            break
    return search.found()


def is_drafting() -> bool:
    """Whether this thread drafts tokens for a `generate`, as with the first layers alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "get_candidates":
        frame = frame.f_back
    return frame is not None


def virtual_tokens() -> int:
    """How many tokens PEFT puts before those that the running forward was given."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "peft.peft_model":
            config: Any = getattr(_self(frame), "active_peft_config", None)
            if getattr(config, "is_prompt_learning", False):
                return int(config.num_virtual_tokens)
        frame = frame.f_back
    return 0


class _Search:
    """From the forward outward: what the frames met so far tell."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.run: Run | None = None
        self.ended = False
        self._models = {id(call.module) for call in calls}
        self._outermost = calls[0].frame if calls else None
        self._is_outside = False
        self._loop: Mapping[str, Any] = {}
        self._ids: Tensor | None = None  # token ids so far, of the innermost loop
        self._main: Mapping[str, Any] = {}
        self._other_vocabulary = False
        self._is_preparing = False
        self._guiding = False
        self._active: list[int] = []

    def visit(self, frame: FrameType) -> Requests | None:
        """Take in one frame more."""
        name, values = frame.f_code.co_name, frame.f_locals
        if name == "_wrapped_call_impl":
            # a forward that a hook runs within one of the same models is no step of `generate`
            self.ended = self._is_outside and id(values.get("self")) in self._models
            self._is_outside |= id(frame) == self._outermost
        elif name == "generate":
            self._generate(frame, values)
        elif name in _PREPARING:
            self._is_preparing = self.run is None  # before the first token
        elif name in _LOOPS and _is_of_transformers(frame):
            self._loop = values
            if self._ids is None:
                ids = (values.get(each) for each in _IDS_SO_FAR)
                self._ids = next((x for x in ids if isinstance(x, Tensor)), None)
        elif name == "get_candidates":
            # the draft's own `generate` says nothing of the user's; how far it has come does,
            # unless it counts in another vocabulary
            self.run = None
            self._other_vocabulary = getattr(_self(frame), "assistant_tokenizer", None) is not None
        elif name == "_main_generate_loop":  # where Dia's generate keeps what others do
            self._main = values
        elif name == "generate_with_fallback":
            self._whisper_segment(values)
        elif name == "compute_batch":
            return _requests(values.get("self"))
        elif name == "get_unconditional_logits":
            self._guiding = True  # of the same rows, with a text and a cache of its own
        elif name == "__call__":
            judges = frame.f_globals.get("__name__") in _JUDGES
            self.ended = judges and not self._guiding
        elif name in ("put", "end"):  # a streamer's
            self.ended = not isinstance(_self(frame), nn.Module | None)
        return None

    def found(self) -> Run | None:
        """What all frames tell together."""
        if self.run is not None and self._guiding:
            return replace(self.run, generated=None)
        return self.run

    def _generate(self, frame: FrameType, values: Mapping[str, Any]) -> None:
        module = _self(frame)
        if not isinstance(module, nn.Module):
            return
        if frame.f_code is _GENERATE:
            run = self._run(module, values)
            self.run = run if self.run is None else _inside(self.run, run)
            self._loop = {}
        elif isinstance(module, PreTrainedModel) and _is_of_transformers(frame):
            self.run = self._own(module, values)
        elif isinstance(module, PreTrainedModel) and self.run is None:
            self.run = Run(_name(module))  # what its variables mean is its author's affair
        elif self.run is not None:  # a user's own, which may ask for some rows at a time
            self.run = _if_of_all_rows(self.run, values)

    def _run(self, module: nn.Module, values: Mapping[str, Any]) -> Run:
        """From the local variables of a `generate`, and of the decoding loop in it."""
        config, rows, prompt, given = (
            values.get(name)
            for name in ("generation_config", "batch_size", "input_ids_length", "input_ids")
        )
        ids = None if self._other_vocabulary else self._ids
        length, generated = None, 0 if self._is_preparing else None
        if ids is not None and isinstance(given, Tensor) and ids.ndim > given.ndim:
            generated = ids.shape[1]  # the loop goes on with frames of sound instead of text
        elif ids is not None and isinstance(prompt, int):
            length, generated = ids.shape[1], ids.shape[1] - prompt
        beams = getattr(config, "num_beams", None) or 1
        lists = [self._loop.get("logits_processor"), values.get("logits_processor")]
        kept = self._loop.get("model_kwargs") or values.get("model_kwargs") or {}
        mask = kept.get("attention_mask")
        return Run(
            name=_name(module),
            rows=rows if isinstance(rows, int) else _rows_given(values),
            copies=max(beams, getattr(config, "num_return_sequences", None) or 1),
            tiled=any(type(each).__name__ in _TILING for some in lists for each in some or ()),
            generated=generated,
            length=length,
            mask=mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            beams=beams,
        )

    def _own(self, module: PreTrainedModel, values: Mapping[str, Any]) -> Run:
        """A model's own `generate`: around the common one, or with a loop of its own."""
        kind, run = type(module).__module__, self.run
        if "whisper" in kind and isinstance(values.get("batch_size"), int):
            return self._whisper(module, values)
        if run is None:
            run = self._run(module, {**values, **self._main})
            if getattr(module, "_uses_cfg", False) and run.rows is not None:
                return replace(run, rows=run.rows // 2, tiled=True)  # Dia's, of both halves
            return run
        return replace(run, rows=None) if ".rag." in kind else _if_of_all_rows(run, values)

    def _whisper_segment(self, values: Mapping[str, Any]) -> None:
        """Long audio: each segment is generated for the rows that have not ended or failed."""
        rows, failed = values.get("batch_idx_map"), values.get("fallback_index_map")
        if self.run is not None and isinstance(rows, list) and isinstance(failed, list):
            active = [rows[i] for i in failed]
            # a static cache keeps its width: the rows behind are nobody's
            padding = max(0, (self.run.rows or 0) - len(active))
            self._active = active + [-1] * padding

    def _whisper(self, module: PreTrainedModel, values: Mapping[str, Any]) -> Run:
        rows, started = values["batch_size"], values.get("init_tokens")
        copies = len(started) // rows if isinstance(started, Tensor) else 1
        if self.run is None:  # to detect the language
            return Run(_name(module), rows=rows, generated=0)
        numbers = self._active
        if self.run.rows != len(numbers):
            return replace(self.run, rows=None)
        numbers = [row // copies if row >= 0 else -1 for row in numbers]
        return replace(self.run, numbers=numbers, total=rows)


def _rows_given(values: Mapping[str, Any]) -> int | None:
    """How many rows a `generate` was called with."""
    named = {
        name: x for value in values.values() if isinstance(value, dict) for name, x in value.items()
    }
    named |= values
    given = [named.get(name) for name in _INPUTS]
    given += [x for value in values.values() if isinstance(value, tuple) for x in value[:1]]
    return next((len(x) for x in given if isinstance(x, Tensor) and x.ndim), None)


def _if_of_all_rows(run: Run, values: Mapping[str, Any]) -> Run:
    """A run within a `generate` that was given more or fewer rows tells no rows."""
    rows, known = _rows_given(values), run.rows if run.total is None else run.total
    differs = rows is not None and known is not None and rows != known
    return replace(run, rows=None) if differs else run


def _inside(inner: Run, outer: Run) -> Run:
    """A `generate` that a model calls in each step of its own, such as that of a depth decoder."""
    numbers = None if inner.rows is None or inner.numbers else outer.row_of(inner.rows)
    return replace(inner, rows=None if numbers is None else inner.rows, numbers=numbers)


def _requests(runner: Any) -> Requests | None:
    """What the batch of transformers' continuous batching holds."""
    batch: Any = getattr(runner, "inputs_and_outputs", None)
    if (pairs := getattr(batch, "io_pairs", None)) is not None:  # two batches in turn
        batch = getattr(pairs[batch.current_pair], "host_io", None)
    try:
        held = batch.requests_in_batch
        return Requests(
            ids=tuple(each.state.request_id for each in held),
            lengths=tuple(each.query_length for each in held),
            prompts=tuple(
                each.state._true_initial_tokens or len(each.state.initial_tokens) for each in held
            ),
            put_off=tuple(each.state._true_initial_tokens > 0 for each in held),
        )
    except AttributeError:
        return None


def _is_of_transformers(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("transformers.")


def _self(frame: FrameType) -> Any:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__}.generate"

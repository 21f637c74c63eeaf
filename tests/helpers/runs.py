"""Which tokens each run of a block holds, written down by hand, to compare scoped edits with.

Room   (columns, prompt, padding) -> the tokens of one run; several runs make a `generate`.
How    `check` runs a call with every scope (`helpers.scopes`) and compares run by run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from helpers.scopes import SCOPES, Place
from helpers.streams import Tokens

PADS = (0, 2)
"""Columns of left padding in the two rows that most tests run."""
WIDTH = 6


def run(columns: range, prompt: int, pads: Sequence[int] = PADS, copies: int = 1) -> Tokens:
    """The tokens in these columns of a batch; its prompt has `prompt` columns."""
    row = torch.arange(len(pads)).repeat_interleave(copies)
    column = torch.arange(columns.start, columns.stop).expand(len(row), -1)
    position = (column - torch.tensor(pads)[row][:, None]).clamp(min=-1)
    return Tokens(row, position, column < prompt)


def turn(
    width: int = WIDTH, pads: Sequence[int] = PADS, copies: int = 1, steps: int = 3, start: int = 0
) -> list[Tokens]:
    """The runs of a prompt in columns `start` to `width` and of `steps` - 1 tokens after it."""
    after = [run(range(at, at + 1), width, pads, copies) for at in range(width, width + steps - 1)]
    return [run(range(start, width), width, pads, copies), *after]


def plain(rows: int, width: int) -> Tokens:
    """A forward of its own without padding."""
    return run(range(width), width, (0,) * rows)


@contextmanager
def seen_runs(core: nn.Module, prompt: int, pads: Sequence[int] = (0,)) -> Iterator[list[Tokens]]:
    """While open, the runs of a model as its own arguments and its cache tell them."""
    runs: list[Tokens] = []

    def note(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids = args[0] if args else given.get("input_ids")
        ids = given["inputs_embeds"] if ids is None else ids
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        copies = len(ids) // len(pads)
        runs.append(run(range(past, past + ids.shape[1]), prompt, pads, copies))

    handle = core.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield runs
    finally:
        handle.remove()


def check(
    root: nn.Module,
    path: str,
    call: Callable[[], Any],
    runs: Sequence[Tokens] | Callable[[int, Tensor], list[Tokens]],
    scopes: Sequence[str] = tuple(SCOPES),
    width: int = 32,
) -> None:
    """Every scope of an edit at `path` of `root` reaches the tokens it names, in every run."""
    by_index = runs if callable(runs) else lambda index, _: [runs[index]]
    found = Place(root, path, "", width).outcomes(list(scopes), call, by_index)
    for scope, outcome in found.items():
        assert outcome.refusal is None, f"{scope}: {outcome.refusal}"
        assert outcome.wrong is None, f"{scope}: {outcome.wrong}"
        assert callable(runs) or outcome.runs == len(runs), f"{scope}: {outcome.runs} runs"


def refused(root: nn.Module, path: str, call: Callable[[], Any], scopes: Sequence[str]) -> None:
    """Every one of these scopes is refused before it has edited a token."""
    found = Place(root, path, "", 32).outcomes(list(scopes), call, lambda *_: [])
    for scope, outcome in found.items():
        assert outcome.refusal is not None, f"{scope} is not refused"
        assert outcome.wrong is None, f"{scope}: {outcome.wrong}"


def between_tokens(act: Callable[[], Any]) -> dict[str, Any]:
    """Options of a generate that calls `act` between two tokens."""

    class Asked(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            act()
            return scores

    return {"logits_processor": [Asked()]}

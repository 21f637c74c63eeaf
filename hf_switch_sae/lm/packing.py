"""Several texts in one row of a batch: where each begins and ends, by seams or position ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_switch_sae.errors import EditError

Span = tuple[int, int, int]
"""(batch row, first column, column after the last) of one text."""


def one_after_another(edges: Sequence[int], keep_empty: bool = False) -> list[Span]:
    """Texts in one row, between edges such as those of `cu_seq_lens_q`."""
    return [(0, start, stop) for start, stop in pairwise(edges) if keep_empty or start < stop]


def begun_anew(ids: Tensor, real: Tensor, is_masked: bool) -> list[Span] | None:
    """Texts in rows whose position ids begin anew; None if none does.

    Args:
        ids: [B, T] position ids.
        real: [B, T] bool, not padding.
        is_masked: whether a mask told that; without one, ids that are repeated at the start of a
            row may be padding, or texts of one token.

    Raises:
        EditError: the ids go back, but not to where they began.
    """
    if tell_nothing(ids):
        return None
    # each real token is compared with the real one before it, over padding between texts
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(real, columns, -1).cummax(-1).values[:, :-1]
    back = (ids[:, 1:] <= ids.gather(1, last.clamp(min=0))) & real[:, 1:] & (last >= 0)
    if not bool(back.any()):
        return None
    first = ids.where(real, 2**31).amin(-1, True)
    doubtful = bool((ids[:, 1] == ids[:, 0]).any()) and not is_masked
    # drafts in a tree repeat positions
    if doubtful or bool((back & (ids[:, 1:] != first)).any()):
        raise unknown("rows and positions", "the position ids neither count on nor begin anew")
    spans = []
    for row in range(len(ids)):
        inside = real[row].nonzero()[:, 0].tolist()
        cuts = (back[row].nonzero()[:, 0] + 1).tolist()
        edges = [inside[0], *cuts, inside[-1] + 1] if inside else []
        spans += [(row, start, stop) for start, stop in pairwise(edges)]
    return spans


def numbers_of(spans: Sequence[Span], shape: tuple[int, int], device: torch.device) -> Tensor:
    """[B, T] int64: the number of each token's text; -1 in none."""
    numbers = torch.full(shape, -1, dtype=torch.int64, device=device)
    for at, (row, start, stop) in enumerate(spans):
        numbers[row, start:stop] = at
    return numbers


def positions_in(spans: Sequence[Span], numbers: Tensor, real: Tensor) -> Tensor:
    """[B, T] int64: each token's place in its text, in real tokens; -1 for padding."""
    counted = real.long().cumsum(-1)
    starts = [start for _, start, _ in spans]
    at = torch.tensor(starts, dtype=torch.int64, device=real.device)[numbers.clamp(min=0)]
    before = counted.gather(1, at) - real.long().gather(1, at)
    return torch.where(real & (numbers >= 0), counted - before - 1, -1)


def tell_nothing(ids: Tensor) -> bool:
    """Whether position ids are all the same, as models are given that know no positions."""
    return ids.shape[1] > 1 and bool((ids == ids[:, :1]).all())


def unknown(asked: str, why: str) -> EditError:
    """The error of a scope that can't be met, with the way around it."""
    return EditError(
        f"{asked} can't be told here: {why}. Edit without rows= and positions=, or run the model "
        "so that they are known (a plain forward with its attention mask, or `generate`)."
    )

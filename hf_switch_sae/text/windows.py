"""Documents -> windows of at most `context` tokens -> padded batches, for recording.

Beware Each window starts afresh: the model does not see the window before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_switch_sae.text.documents import Document
from hf_switch_sae.text.tokenizer import Tokenizer, token_ids


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document that the model sees at once."""

    document: int
    start: int
    """Position of its first token in the document."""
    tokens: list[int]


@dataclass(frozen=True)
class Batch:
    """Windows of similar length, padded at their ends."""

    inputs: dict[str, Tensor]
    """input_ids and attention_mask, [batch, seq] int64."""
    document: Tensor
    """[batch, seq] int64: the number of each token's document."""
    position: Tensor
    """[batch, seq] int64: each token's position in its document; -1 for padding and prefix."""


def windows_of(
    documents: Sequence[Document],
    tokenizer: Tokenizer | None,
    context: int,
    add_special_tokens: bool = True,
) -> list[Window]:
    """Cut documents into windows of at most `context` tokens.

    Args:
        documents: texts, or token ids, which are taken as they are.
        tokenizer: a tokenizer of transformers; not needed for token ids.
        context: tokens per window, at least 1.
        add_special_tokens: whether the tokenizer adds its own tokens, such as a first one, to
            each text.

    Raises:
        TextError: there are texts, but no tokenizer.
    """
    # apart, as all texts are tokenized in one call
    texts = {d.number: d.text for d in documents if isinstance(d.text, str)}
    tokens = {d.number: d.text for d in documents if not isinstance(d.text, str)}
    if texts:
        found = token_ids(tokenizer, list(texts.values()), add_special_tokens)
        tokens |= dict(zip(texts, found, strict=True))
    return [
        Window(document.number, start, list(ids[start : start + context]))
        for document in documents
        for ids in [tokens[document.number]]
        for start in range(0, len(ids), context)
    ]


def batches_of(
    windows: Sequence[Window], tokens: int, pad: int = 0, prefix: Sequence[int] = ()
) -> Iterator[Batch]:
    """Batches of windows of similar length, the longest first: what does not fit fails at once.

    Args:
        windows: in any order; only between windows of equal length does the order matter.
        tokens: tokens per batch, padding included; a single window may be longer.
        pad: token id to pad with; padding is masked.
        prefix: token ids before each window. The model sees them, but they are not counted:
            their position is -1.
    """
    order = sorted(windows, key=lambda window: -len(window.tokens))
    while order:
        # the first is the longest of those left, so all of the batch fit
        size = max(1, tokens // (len(prefix) + len(order[0].tokens)))
        yield _batch(order[:size], pad, prefix)
        order = order[size:]


def _batch(windows: Sequence[Window], pad: int, prefix: Sequence[int]) -> Batch:
    ids, mask = padded([[*prefix, *window.tokens] for window in windows], pad)
    position = np.full(ids.shape, -1, np.int64)
    for row, window in enumerate(windows):
        length = len(window.tokens)
        own = np.arange(window.start, window.start + length)
        position[row, len(prefix) : len(prefix) + length] = own
    numbers = np.array([window.document for window in windows], np.int64)
    document = torch.from_numpy(numbers)[:, None].expand(ids.shape)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Batch(inputs, document, torch.from_numpy(position))


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as input_ids and attention_mask, [batch, seq] int64, padded at their ends.

    Args:
        rows: at least one.
        pad: token id to pad with.
    """
    # NumPy assigns a plain list to a row; torch would build a tensor for each first
    ids = np.full((len(rows), max(map(len, rows))), pad, np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)

"""Documents -> windows of at most `context` tokens -> padded batches, for recording.

Beware A window starts afresh: the model does not see the window before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_switch_sae.errors import TextError
from hf_switch_sae.text.documents import Document
from hf_switch_sae.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document that the model sees at once."""

    document: int
    start: int
    """Position of the first in its document."""
    tokens: list[int]


@dataclass(frozen=True)
class Batch:
    """Windows of like length, padded at their ends."""

    inputs: dict[str, Tensor]
    """input_ids and attention_mask, [batch, seq] int64."""
    document: Tensor
    """[batch, seq] int64: number of each token's document."""
    position: Tensor
    """[batch, seq] int64: of each token in its document; -1 for padding and prefix."""


def windows_of(
    documents: Sequence[Document],
    tokenizer: Tokenizer | None,
    context: int,
    add_special_tokens: bool = True,
) -> list[Window]:
    """Cut documents into windows of at most `context` tokens.

    Args:
        documents: texts, or token ids, which are taken as they are.
        tokenizer: of transformers; not needed for token ids.
        context: tokens a window, at least 1.
        add_special_tokens: whether the tokenizer puts its own, such as a first one, in each text.

    Raises:
        TextError: texts without a tokenizer.
    """
    texts = [document for document in documents if isinstance(document.text, str)]
    tokens = {d.number: d.text for d in documents if not isinstance(d.text, str)}
    if texts:
        if tokenizer is None:
            raise TextError(
                "these documents are texts, so the language model's tokenizer is needed."
            )
        encoded = tokenizer(
            [document.text for document in texts],
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,  # documents are longer than the model's context, and are cut below
        )["input_ids"]
        tokens |= {document.number: ids for document, ids in zip(texts, encoded, strict=True)}
    return [
        Window(document.number, start, list(ids[start : start + context]))
        for document in documents
        for ids in [tokens[document.number]]
        for start in range(0, len(ids), context)
    ]


def batches_of(
    windows: Sequence[Window], tokens: int, pad: int = 0, prefix: Sequence[int] = ()
) -> Iterator[Batch]:
    """Batches of windows of like length, the longest first: what is too large fails at once.

    Args:
        windows: in any order; the batches depend on it only where windows are equally long.
        tokens: a batch, padding included; a single window may be longer.
        pad: token id to pad with; it is masked.
        prefix: token ids before each window, which the model sees and nobody counts: position -1.
    """
    order = sorted(windows, key=lambda window: -len(window.tokens))
    while order:
        width = len(prefix) + len(order[0].tokens)
        size = max(1, tokens // width)
        yield _batch(order[:size], width, pad, prefix)
        order = order[size:]


def _batch(windows: Sequence[Window], width: int, pad: int, prefix: Sequence[int]) -> Batch:
    ids = np.full((len(windows), width), pad, np.int64)
    mask = np.zeros((len(windows), width), np.int64)
    position = np.full((len(windows), width), -1, np.int64)
    begin = len(prefix)
    ids[:, :begin] = prefix
    for row, window in enumerate(windows):
        end = begin + len(window.tokens)
        ids[row, begin:end] = window.tokens
        mask[row, :end] = 1
        position[row, begin:end] = np.arange(window.start, window.start + len(window.tokens))
    document = torch.tensor([window.document for window in windows])[:, None].expand(-1, width)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return Batch(inputs, document, torch.from_numpy(position))

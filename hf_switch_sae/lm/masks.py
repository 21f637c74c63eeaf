"""Which columns of a residual stream hold real tokens: the masks that were given -> one `Mask`.

Room   A mask may be as wide as the text, as the sound before its convolutions, or as the keys of
       one attention; it fits a stream only if its width says so. A mask of another width is mapped
       by the model's own rule, or read where it arrives at the block; it is never cut to fit.
Beware It is read late, when somebody asks: until then it must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_switch_sae.lm.config import StreamFacts

if TYPE_CHECKING:
    from hf_switch_sae.lm.calls import Call

_SUB_SAMPLED = "_get_feature_vector_attention_mask"


class Mask(NamedTuple):
    """Which of a call's columns hold real tokens."""

    width: int
    """How many columns it covers: those of the call, or those and all before them."""
    read: Callable[[], Tensor]
    """[B, width] bool."""
    flat: Tensor | None = None
    """The mask itself, if it is 2-D and was given with this width."""

    def padding(self) -> Tensor:
        """[B] columns of padding."""
        return self.width - self.read().sum(-1)


class UnknownMask(NamedTuple):
    """A mask was given, and which columns of the stream it means can't be told."""

    why: str


def is_flat(mask: Any) -> bool:
    """Whether a mask is [B, columns]."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def mask_of(
    calls: Sequence[Call],
    decoding: bool,
    batch: int,
    past: int,
    length: int,
    block: Any,
    facts: StreamFacts,
    of_run: Tensor | None = None,
) -> Mask | UnknownMask | None:
    """Which of past + length columns, or of length, are real; None if all are.

    Args:
        calls: of the models around the stack, outermost first.
        decoding: whether the stack is that of the decoder.
        batch, past, length: rows, columns before this call, columns of this call.
        block: the mask that arrives at the block, if one does.
        facts: what the models' configs say of the stream.
        of_run: the mask that `generate` was given, of a model that it is not handed on to.
    """
    given = [mask for call in reversed(calls) if (mask := _own(call, decoding)) is not None]
    if not given and of_run is not None:
        given = [nn.functional.pad(of_run, (0, int(facts.appends_column)), value=1)]
    for mask in given:
        wide = _before_text(mask, past + length) if facts.text_last else mask
        if is_flat(wide) and (found := _flat(wide, batch, past, length)) is not None:
            return found
    for mask in given if not past else ():
        if is_flat(mask) and (found := _sub_sampled(calls, mask, batch, length)) is not None:
            return found
    # a text's mask that does not cover its cache is no mask of this call
    short = past and any(map(is_flat, given))
    for mask in (*given, block) if not short else ():
        # `generate` makes masks of four dimensions too, for a static cache
        by_hand = mask is calls[0].mask and not calls[0].has_cache
        if by_hand and _is_mixed(mask, length):
            return UnknownMask("a mask in which some see what comes after them tells no padding")
        if by_hand and _hides_beginnings(mask, length):
            return UnknownMask("a mask that hides the beginning of a row may be of several texts")
        found = _square(mask, batch, past, length, by_hand)
        # where a row has no real token at all, True means hidden in this model
        if found is not None and (past or bool(found.read().any(-1).all())):
            return found
    # a mask that hides nothing fits any stream
    if all(is_flat(mask) and bool((mask != 0).all()) for mask in given):
        return None
    shapes = " and ".join(str(list(m.shape)) for m in given if isinstance(m, Tensor))
    return UnknownMask(
        f"which of the {length} columns of this residual stream are padding can't be told from "
        f"the mask {shapes or 'that was given'}"
    )


def _own(call: Call, decoding: bool) -> Any:
    """The mask that speaks of the stack's own sequence."""
    mask = call.decoder_mask if call.is_pair and decoding else call.mask
    if isinstance(mask, Mapping):  # one 4-D mask for each kind of attention
        parts = [part for part in mask.values() if part is not None]
        mask = mask.get("full_attention") if mask.get("full_attention") is not None else None
        return mask if mask is not None else next(iter(parts), None)
    return mask


def _flat(mask: Tensor, batch: int, past: int, length: int) -> Mask | None:
    if mask.shape[0] not in (1, batch) or mask.shape[1] not in (past + length, length):
        return None
    return Mask(mask.shape[1], lambda: (mask != 0).expand(batch, -1), mask)


def _before_text(mask: Any, width: int) -> Any:
    """A text's mask with what stands before the text, which is no padding."""
    missing = width - mask.shape[1] if is_flat(mask) else 0
    return nn.functional.pad(mask, (missing, 0), value=1) if missing > 0 else mask


def _sub_sampled(calls: Sequence[Call], mask: Tensor, batch: int, length: int) -> Mask | None:
    """By the model's own rule, as where convolutions make frames of samples."""
    rule = next(
        (f for c in reversed(calls) if callable(f := getattr(c.module, _SUB_SAMPLED, None))), None
    )
    if rule is None or len(mask) != batch:
        return None
    try:
        # the rule speaks of frames; some models squeeze these once more
        lengths = getattr(rule.__self__, "_get_feat_extract_output_lengths", None)
        if lengths is not None and int(lengths(mask.shape[1])) != length:
            return None
        frames = rule(length, mask)
    except Exception:  # a rule for another kind of mask
        return None
    if not isinstance(frames, Tensor) or frames.shape != (batch, length):
        return None
    return Mask(length, lambda: frames != 0)


def _square(mask: Any, batch: int, past: int, length: int, by_hand: bool = False) -> Mask | None:
    """From a mask as attention takes it: [B or 1, heads or 1, queries or 1, keys], or [B, keys].

    One made by hand may let padding see itself.
    """
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch):
        return None
    if mask.ndim == 2 and mask.shape[1] == length:
        return Mask(length, lambda: _open(mask).expand(batch, -1))
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[-2] not in (1, length):
        return None
    keys = mask.shape[-1]
    if mask.shape[-2] == 1 and keys == length:  # the same for every query
        return Mask(length, lambda: _open(mask[:, 0, 0]).expand(batch, -1))
    # a static cache has room for more keys; one that slides holds the last of them
    offset = past if keys >= past + length else keys - length
    if mask.shape[-2] != length or offset < 0:
        return None

    def read() -> Tensor:
        opened = _open(mask[:, 0])
        # a real token always sees itself; padding is hidden from everyone, itself included
        real = opened.diagonal(offset, -2, -1)[:, :length]
        if by_hand and keys == length > 1:
            real = real & ~_seen_by_nobody(opened)
        return real.expand(batch, -1)

    return Mask(length, read)


def _seen_by_nobody(opened: Tensor) -> Tensor:
    """[B, T] bool: padding that was let see itself, lest softmax should divide by 0.

    Args:
        opened: [B, T, T] bool, which token sees which.
    """
    others = ~torch.eye(opened.shape[-1], dtype=torch.bool, device=opened.device)
    unseen = ~(opened & others).any(-2)
    if not bool((opened & others.triu()).any()):  # causal: nobody comes after the last to see it
        unseen[:, -1] = unseen[:, -2] & unseen.sum(-1).gt(1)
    return unseen


def _is_mixed(mask: Any, length: int) -> bool:
    """Whether some tokens see what comes after them, and others do not: a prefix, or padding."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (length, length):
        return False
    ahead = _open(mask[:, 0]).triu(1).any(-1)[:, :-1]
    return bool(ahead.any()) and not bool(ahead.all())


def _hides_beginnings(mask: Any, length: int) -> bool:
    """Whether some token does not see the first real one of its row."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (length, length):
        return False
    opened = _open(mask[:, 0])
    real = opened.diagonal(0, -2, -1) & ~_seen_by_nobody(opened)
    first = real.long().argmax(-1)[:, None, None].expand(-1, length, 1)
    return bool((real & ~opened.gather(-1, first)[..., 0]).any())


def _open(mask: Tensor) -> Tensor:
    """Whether attention may look there: of a mask to be added, where little is taken away."""
    return mask > -1.0 if mask.is_floating_point() else mask != 0

"""The residual stream in what a block takes and returns, whatever it is wrapped in.

Room   a block's output or arguments <-> the tensor in it <-> rows of tokens [B, T, d].
Beware A residual need not be [batch, seq, hidden_size]: stages of vision models are [B, C, H, W],
       packed towers [tokens, d], hyper-connections [B, seq, lanes, d], XLNet's [seq, batch, d].
       What its dimensions are is told by the sizes that the model was called with.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import HookpointError
from hf_switch_sae.lm.config import NO_FACTS, StreamFacts


class Layout:
    """A residual stream of any layout as rows of tokens [B, T, d], and back.

    Args:
        stream: [B, T, d], [tokens, d], [B, H, W, d], [B, d, H, W], [T, B, d], [B, T, lanes, d] or
            [lanes, B, T, d]; or [B, sections * T, d], whose sections are lanes as well.
        width: d, which tells [B, d, H, W] from [B, H, W, d].
        of_text: the stream is a text's, so that four dimensions are tokens of several lanes.
        expected: (B, T) of the call that owns the blocks, T = 0 if it does not tell.
        facts: what the models' configs say, where sizes fit either way.

    Raises:
        HookpointError: fewer than two dimensions.
    """

    def __init__(
        self,
        stream: Tensor,
        width: int,
        of_text: bool,
        expected: tuple[int | None, int],
        facts: StreamFacts = NO_FACTS,
    ) -> None:
        if stream.ndim < 2:
            raise HookpointError(
                "a residual stream has at least two dimensions; "
                f"this tensor is {list(stream.shape)}."
            )
        shape = stream.shape
        self.lanes = 1
        """Vectors that one token has in the stream, one after another in `rows`."""
        self.unknown = ""
        """Why it can't be told which dimension is which; "" if it can."""
        # [B, ..., d] first, then everything between B and d is one sequence
        self._moved: tuple[int, int] | None = None
        is_like_text = (
            stream.ndim == 4 and of_text and expected in (tuple(shape[:2]), tuple(shape[1:3]))
        )
        if stream.ndim == 4 and shape[1] == shape[-1] == width and not is_like_text:
            raise HookpointError(
                f"this tensor is {list(shape)}, and the SAE reads {width}: whether the second or "
                "the last dimension holds the features can't be told; use an image of another size."
            )
        if stream.ndim == 4 and shape[-1] != width and shape[1] == width:
            self._moved = (1, -1)  # convolutional stages
        elif stream.ndim == 4 and of_text:
            first, last = tuple(shape[1:3]) == expected, tuple(shape[:2]) == expected
            lanes_first = first if first != last else facts.lanes_first
            self._moved = (0, 2) if lanes_first else None
            self.lanes = shape[0 if lanes_first else 2]
        elif stream.ndim == 3:
            first, last = tuple(shape[1::-1]) == expected, tuple(shape[:2]) == expected
            if first if first != last else facts.sequence_first:
                self._moved = (0, 1)
        self._whole = shape
        if stream.ndim == 3 and facts.sections > 1 and shape[1] == facts.sections * expected[1]:
            stream = stream.reshape(shape[0], facts.sections, -1, shape[-1])
            self.lanes, self._moved = facts.sections, (1, 2)
        x = stream if self._moved is None else stream.movedim(*self._moved)
        self._shape = x.shape
        if x.ndim == 2:
            batch, length = expected
            # rows of tokens one after another, as experts and packed towers take them
            if batch and length and batch * length == len(x):
                x = x.reshape(batch, length, -1)
            else:
                self.unknown = f"the stream has {len(x)} vectors without a batch dimension"
        self.rows = x[None] if x.ndim == 2 else x.reshape(len(x), -1, x.shape[-1])

    def restore(self, rows: Tensor) -> Tensor:
        """Rows [B, T, d] in the layout of the stream."""
        x = rows.reshape(self._shape)
        x = x if self._moved is None else x.movedim(*reversed(self._moved))
        return x.reshape(self._whole)


def read_residual(value: Any) -> torch.Tensor:
    """The residual stream in a block's output: the first tensor, depth first.

    Raises:
        HookpointError: there is no tensor in it.
    """
    if isinstance(value, torch.Tensor):
        return value
    if (key := _first_key(value)) is None:
        raise HookpointError(
            f"no tensor in the block's output, a {type(value).__name__}: it has no residual stream "
            "to read. Name another module by its path."
        )
    return read_residual(value[key])


def replace_residual(value: Any, new: torch.Tensor) -> Any:
    """`value` with `new` in place of the tensor that `read_residual` reads; `value` stays as it is.

    Returns:
        The same kind of structure (tuple, namedtuple, list, dict, ModelOutput), all else untouched.

    Raises:
        HookpointError: there is no tensor in it.
    """
    if isinstance(value, torch.Tensor):
        return new
    if (key := _first_key(value)) is None:
        read_residual(value)  # says what is wrong
    # a namedtuple keeps its type, and the caller its own objects
    if isinstance(value, tuple):
        items = list(value)
        items[key] = replace_residual(value[key], new)
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    changed = copy.copy(value)
    changed[key] = replace_residual(value[key], new)
    return changed


def read_residual_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The residual stream in a block's arguments: its first floating tensor.

    Positional arguments come first, then `hidden_states`, then the other keywords in order.

    Raises:
        HookpointError: no argument is a floating tensor.
    """
    key = _input_key(args, kwargs)
    tensor: torch.Tensor = args[key] if isinstance(key, int) else kwargs[key]
    return tensor


def replace_residual_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with `new` in place of what `read_residual_input` reads.

    Raises:
        HookpointError: no argument is a floating tensor.
    """
    key = _input_key(args, kwargs)
    if isinstance(key, int):
        return (*args[:key], new, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: new}


def _first_key(value: Any) -> Any:
    """Key or index of the first item with a tensor somewhere in it; None if there is none."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    else:
        return None
    for key, item in items:
        if isinstance(item, torch.Tensor) or _first_key(item) is not None:
            return key
    return None


def _input_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return index
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return name
    given = [type(value).__name__ for value in args] + list(kwargs)
    raise HookpointError(
        f"no floating tensor among the module's arguments ({', '.join(given) or 'none'}), so "
        "no residual stream to read. Use .resid_post, or name another module."
    )

"""Which call of generate a forward pass belongs to, and what it was given."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_switch_sae.lm.config import is_encoder_decoder
from hf_switch_sae.lm.hooks import watch_calls
from hf_switch_sae.lm.positions import Call, Generation

_DRAFTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")


class Flow(threading.local):
    """What the calls under way in this thread were given."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.generation: Generation | None = None
        self.read_only = False


def note_calls(module: nn.Module, flow: Flow, is_root: bool) -> Callable[[], None]:
    """Note what a module that owns blocks is called with, while it runs; returns what ends that."""
    parameters = inspect.signature(type(module).forward).parameters
    # positional arguments get their names, so that either way of calling reads alike
    names = [name for name in parameters if name != "self"]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow.calls[id(module)] = Call.read({**dict(zip(names, args, strict=False)), **kwargs})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = flow.calls.pop(id(module), None)
        # `generate` calls the root; another owner may run more often, and is not counted
        if is_root and call is not None and flow.generation is not None:
            flow.generation.seen += call.length

    return watch_calls(module, before, after)


def generation_of(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    """What `generate` was given: its rows, and the prompt's columns if known beforehand."""
    given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
    # text first: one row of text may come with several images, or with parts of them
    named = [given.get(name) for name in ("inputs_embeds", "input_ids", "inputs", "attention_mask")]
    encoded = (given.get("encoder_outputs") or [None])[0]
    candidates = (*named, encoded, *given.values())
    tensors = [value for value in candidates if isinstance(value, Tensor) and value.ndim >= 2]
    rows = tensors[0].shape[0] if tensors else None
    is_pair = is_encoder_decoder(root)
    names = ("decoder_input_ids",) if is_pair else ("inputs_embeds", "input_ids", "inputs")
    # an encoder-decoder's prompt is the decoder's, not what the encoder reads
    prompt = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    is_text = prompt is not None and (
        prompt.ndim == 2 or (prompt.ndim == 3 and prompt is given.get("inputs_embeds"))
    )
    columns = prompt.shape[1] if is_text and prompt is not None else None
    defaults = given.get("generation_config") or getattr(root, "generation_config", None)
    options = (given, vars(defaults) if defaults is not None else {})
    drafted = any(each.get(name) for each in options for name in _DRAFTS)
    if is_pair:  # `generate` may put a start token in front; the first forward shows whether
        columns = 1 if drafted and prompt is None else None
    return Generation(rows=rows, columns=columns, drafted=drafted)

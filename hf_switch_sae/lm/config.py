"""What a language model's config and its forward tell; found out here once, for everybody.

Beware Configs of multimodal models hold the text model's config inside them, and some raise for a
       name that they don't have. What is not known is None, never an error.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from hf_switch_sae.errors import AttachError

_SEQUENCE_FIRST = {"xlnet", "fsmt"}


def config_of(model: nn.Module) -> Any:
    """A model's config; None if it has none."""
    return getattr(model, "config", None)


def text_config(model: nn.Module) -> Any:
    """The config of the model's text part, which mostly is its config; None if it has none."""
    config = config_of(model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_sequence_first(model: nn.Module) -> bool:
    """Whether the residual stream of the model that owns the blocks is [seq, batch, d]."""
    return getattr(config_of(model), "model_type", None) in _SEQUENCE_FIRST


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model is a pair of an encoder and a decoder."""
    return bool(getattr(config_of(model), "is_encoder_decoder", False))


def longest_context(model: nn.Module) -> int | None:
    """How many positions the model has; None if any number will do, or it does not tell."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model embeds; None if it does not tell."""
    embed: Any = getattr(model, "get_input_embeddings", lambda: None)()
    # the embedding decides: a config may be padded or stale
    rows = getattr(embed, "num_embeddings", None)
    rows = rows or getattr(text_config(model), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Arguments of the model's forward that keep it from building a KV cache."""
    options = inspect.signature(model.forward).parameters
    # not every forward takes it
    return {"use_cache": False} if "use_cache" in options else {}


def name_without_path(name: Any) -> str:
    """A Hub id as it is; of a folder its last part only, as where it lies is nobody's business."""
    text = str(name or "")
    return Path(text).name if Path(text).exists() else text


def check_in_eval(model: nn.Module) -> None:
    """Raise AttachError for a model in training mode, whose dropout would be in the activations."""
    if model.training:
        raise AttachError("the language model is in training mode, with dropout: call lm.eval().")

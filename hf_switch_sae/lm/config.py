"""What a language model's config and its forward tell; found out here once, for everybody.

Beware Configs of multimodal models hold the text model's config inside them, and some raise for a
       name that they don't have. What is not known is None, never an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_switch_sae.errors import AttachError
from hf_switch_sae.lm.hookpoints import language_model

# By model type, as the model zoo found them.
_SEQUENCE_FIRST = {"xlnet", "fsmt"}
_TEXT_LAST = {"cpmant", "git", "musicgen_melody", "rwkv"}
_DROPS_MASK = {"reformer", "xlm", "xlnet"}
_APPENDS_COLUMN = {"flaubert", "xlm", "xlnet"}


def config_of(model: nn.Module) -> Any:
    """A model's config; None if it has none."""
    return getattr(model, "config", None)


def text_config(model: nn.Module) -> Any:
    """The config of the model's text part, which mostly is its config; None if it has none.

    Of a module around a language model it is the one inside's.
    """
    config = config_of(language_model(model))
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # it has several, and none of them is the model's
        return config


def is_sequence_first(model: nn.Module) -> bool:
    """Whether the residual stream of the model that owns the blocks is [seq, batch, d]."""
    return getattr(config_of(model), "model_type", None) in _SEQUENCE_FIRST


@dataclass(frozen=True)
class StreamFacts:
    """What the types and configs of the models around a stream say of it, where calls do not."""

    sequence_first: bool = False
    """[seq, batch, d]."""
    lanes_first: bool = False
    """Of several lanes: [lanes, batch, seq, d]."""
    sections: int = 1
    """As many streams as this one after another: [batch, sections * seq, d]."""
    codebooks: int = 1
    """How many rows of token ids make one row: those of a sound's codebooks."""
    text_last: bool = False
    """What else is in the sequence (images, conditions) stands before the text."""
    drops_mask: bool = False
    """`generate` does not hand on the attention mask that it was given."""
    appends_column: bool = False
    """Under `generate` a forward ends with a column for the token to come."""


NO_FACTS = StreamFacts()


def stream_facts(models: Sequence[nn.Module]) -> StreamFacts:
    """Of the models around a stream, outermost first."""
    configs = [config_of(model) for model in models]
    types = {getattr(config, "model_type", None) for config in configs}
    owner = configs[-1] if configs else None
    codebooks = getattr(owner, "num_codebooks", None)
    ngram = getattr(owner, "ngram", None)
    return StreamFacts(
        sequence_first=not types.isdisjoint(_SEQUENCE_FIRST),
        lanes_first=getattr(owner, "altup_num_inputs", None) is not None,
        sections=1 + ngram if isinstance(ngram, int) and "prophetnet" in types else 1,
        codebooks=codebooks if isinstance(codebooks, int) and codebooks > 0 else 1,
        text_last=not types.isdisjoint(_TEXT_LAST),
        drops_mask=not types.isdisjoint(_DROPS_MASK),
        appends_column=not types.isdisjoint(_APPENDS_COLUMN),
    )


def longest_context(model: nn.Module) -> int | None:
    """How many positions the model has; None if any number will do, or it does not tell."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model embeds; None if it does not tell."""
    embed: Any = getattr(language_model(model), "get_input_embeddings", lambda: None)()
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

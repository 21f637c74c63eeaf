"""Calling a tokenizer, and telling one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_switch_sae.errors import TextError

Tokenizer = Callable[..., Any]


def token_ids(
    tokenizer: Tokenizer | None, texts: Sequence[str], add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each text, uncut.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: any number of them; many at once are much faster than one at a time.
        add_special_tokens: whether the tokenizer adds its own tokens, such as a first one.

    Raises:
        TextError: there is no tokenizer.
    """
    if tokenizer is None:
        raise TextError("these documents are texts, so the language model's tokenizer is needed.")
    found = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        verbose=False,  # no warning of texts longer than the model's context: callers cut them
    )["input_ids"]
    return [list(ids) for ids in found]


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """JSON-able: a tokenizer's name, and a SHA-256 of all that decides how it splits a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # each call sets these anew, so what the last call left behind is no part of the identity
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    # a folder of this machine names nothing on another
    return {"name": "" if Path(name).exists() else name, "sha256": digest}

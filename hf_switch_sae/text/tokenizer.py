"""Calling a tokenizer, and telling one from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tokenizer = Callable[..., Any]


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """JSON-able: a tokenizer's name, and a SHA-256 of all that decides what it makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        what = json.loads(backend.to_str())
        # a call that truncates or pads leaves these behind, and then sets them anew
        what.pop("truncation", None)
        what.pop("padding", None)
    else:
        what = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    return {"name": "" if Path(name).exists() else name, "sha256": digest}

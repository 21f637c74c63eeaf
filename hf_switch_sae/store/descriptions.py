"""A store of recorded features -> a few words a feature: those it is strongest on.

features.json    {feature: [words]}, beside an SAE's weights; the demo and cards look for it
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from hf_switch_sae.errors import StoreError
from hf_switch_sae.files import written_beside
from hf_switch_sae.store import FeatureStore


def describe(
    store: FeatureStore, tokenizer: Any, strongest: int = 12, words: int = 4
) -> dict[int, list[str]]:
    """The words most frequent among each feature's strongest tokens.

    Args:
        store: recorded and indexed.
        tokenizer: that made its tokens.
        strongest: tokens looked at for each feature.
        words: kept, at most.

    Returns:
        Nothing for features that are active on no token, or on white space alone.

    Raises:
        StoreError: the store is not indexed.
    """
    if not store.is_indexed:
        raise StoreError(f"{store} is not indexed: run its index() first.")
    table = {}
    for feature in range(store.num_features):
        hits = store.top_tokens(feature, strongest, context=0)
        found = Counter(tokenizer.decode([hit.tokens[hit.at]]).strip() for hit in hits)
        kept = [word for word, _ in found.most_common() if word][:words]
        if kept:
            table[feature] = kept
    return table


def write_descriptions(table: dict[int, list[str]], file: Path) -> None:
    """One feature a line; written beside its place and renamed."""
    lines = (
        f"{json.dumps(str(feature))}: {json.dumps(words, ensure_ascii=False)}"
        for feature, words in table.items()
    )
    with written_beside(file) as beside:
        beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

"""A store of recorded features -> a few words for each feature: those it is strongest on.

They are written to features.json, {feature: [words]}, beside an SAE's weights, where the demo and
model cards look for them.
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
    """The most frequent words among each feature's strongest tokens.

    Args:
        store: recorded and indexed.
        tokenizer: the one that made its tokens.
        strongest: how many tokens to look at for each feature.
        words: the most words to keep for a feature.

    Returns:
        {feature: words}, without features that are active nowhere or only on white space.

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
    """Write features.json, one feature a line; the file appears whole or not at all."""
    lines = (
        f"{json.dumps(str(feature))}: {json.dumps(words, ensure_ascii=False)}"
        for feature, words in table.items()
    )
    with written_beside(file) as beside:
        beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

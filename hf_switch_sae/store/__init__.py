"""Recorded features on disk: token shards, an inverted index, and the questions they answer.

A store is a folder:
    store.json      what it was made from (`provenance`)
    README.md       a data set card, so that `load_dataset(folder, "tokens")` works
    tokens/         one row for each token (`shards`)
    index/          one row for each active feature of each token, ordered by feature and act
                    (`index`, `postings`, `levels`)
Every file is written whole or not at all, and checked when it is read (`parquet`).
"""

from hf_switch_sae.store.answers import Companion, Hit, Passage
from hf_switch_sae.store.feature_store import FeatureStore
from hf_switch_sae.store.provenance import Provenance
from hf_switch_sae.store.rows import RowLayout, TokenRows

__all__ = [
    "Companion",
    "FeatureStore",
    "Hit",
    "Passage",
    "Provenance",
    "RowLayout",
    "TokenRows",
]

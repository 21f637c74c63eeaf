"""Recorded features on disk: token shards, an inverted index, and the questions they answer.

A store is a folder:
    store.json      what it was made from (`provenance`)
    README.md       a data set card, so that `load_dataset(folder, "tokens")` works
    tokens/         one row a token (`shards`)
    index/          one row an active feature of a token, by feature and act (`index`, `postings`,
                    `levels`; `postings_v1` for those of older stores)
All are written whole or not at all, and checked when they are read (`files`).
"""

from hf_switch_sae.store.answers import Companion, Hit, Passage
from hf_switch_sae.store.feature_store import FeatureStore
from hf_switch_sae.store.provenance import Provenance
from hf_switch_sae.store.rows import Layout, TokenRows

__all__ = [
    "Companion",
    "FeatureStore",
    "Hit",
    "Layout",
    "Passage",
    "Provenance",
    "TokenRows",
]

"""What users' type checkers see: `make test` runs mypy over this file, and nothing imports it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import assert_type

from hf_switch_sae import FeatureStore, SparseFeatures, SwitchSAE, attach, record


def of_one(lm: nn.Module, sae: SwitchSAE, texts: list[str], folder: Path) -> None:
    with attach(lm, sae, at=7) as session:
        assert_type(session.features, SparseFeatures)
        with session.record(folder) as live:
            assert_type(live, FeatureStore)
    assert_type(record(lm, sae, texts, folder), FeatureStore)


def of_several(lm: nn.Module, saes: Mapping[int, SwitchSAE], texts: Any, folder: Path) -> None:
    with attach(lm, saes) as session:
        assert_type(session.features, dict[str, SparseFeatures])
        with session.record(folder) as live:
            assert_type(live, dict[str, FeatureStore])
    assert_type(record(lm, saes, texts, folder), dict[str, FeatureStore])

"""Small stores for the tests, what must be in them, and processes that are killed while at work."""

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_switch_sae import FeatureStore, SparseFeatures
from hf_switch_sae.store import Provenance, TokenRows

WIDTHS: dict[str, dict[str, Any]] = {
    "switch": {"num_features": 64, "num_experts": 4, "num_experts_per_token": 1},
    "two_experts": {"num_features": 64, "num_experts": 4, "num_experts_per_token": 2},
    "plain": {"num_features": 64, "num_experts": 1, "num_experts_per_token": 1},
    "wide_experts": {"num_features": 280_000, "num_experts": 4, "num_experts_per_token": 1},
    "wide": {"num_features": 70_000, "num_experts": 1, "num_experts_per_token": 1},
}


def provenance(kind: str = "switch", **fields: Any) -> Provenance:
    return Provenance(**{**WIDTHS[kind], "k": 4, "hookpoint": "layers.2.resid_post", **fields})


def features(n: int, kind: str = "switch", k: int = 4, seed: int = 0) -> SparseFeatures:
    """Distinct ids of the right experts, in no order; some slots empty, some tokens wholly."""
    width, rng = WIDTHS[kind], np.random.default_rng(seed)
    of_expert = width["num_features"] // width["num_experts"]
    expert = rng.integers(0, width["num_experts"], (n, 1))
    if width["num_experts_per_token"] > 1:
        expert = (expert + rng.integers(0, 2, (n, k))) % width["num_experts"]
    base = rng.integers(0, of_expert, (n, 1))
    ids = expert * of_expert + (base + np.arange(k) * 7) % of_expert
    acts = np.exp(rng.normal(size=(n, k))).astype(np.float32)
    acts[rng.random((n, k)) < 0.2] = 0
    acts[rng.random(n) < 0.05] = 0
    acts = np.round(acts, 1)  # so that many acts are equal
    return SparseFeatures(torch.tensor(acts), torch.tensor(ids), width["num_features"])


def rows(lengths: list[int], kind: str = "switch", first: int = 0, seed: int = 0) -> TokenRows:
    """Tokens of documents of these lengths, numbered from `first`."""
    n, rng = sum(lengths), np.random.default_rng(seed + 1)
    document = np.repeat(np.arange(first, first + len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths] or [np.zeros(0, int)])
    token = rng.integers(0, 9, n)
    layout = provenance(kind).layout
    return TokenRows.of(features(n, kind, seed=seed), document, position, token, layout)


def make(
    path: Path, shards: list[list[int]], kind: str = "switch", **fields: Any
) -> tuple[FeatureStore, TokenRows]:
    """A store of some shards, each of documents of these lengths, and all its rows."""
    store = FeatureStore.create(path, provenance(kind, **fields))
    parts, first = [], 0
    for seed, lengths in enumerate(shards):
        parts.append(rows(lengths, kind, first, seed))
        store.append(first, first + len(lengths) - 1, parts[-1])
        first += len(lengths)
    store.refresh()
    return store, TokenRows.cat([TokenRows.empty(store.provenance.layout), *parts])


def postings(of: TokenRows) -> list[tuple[int, float, int, int]]:
    """(feature, act, document, position) in the order of an index, by sorting plainly."""
    at = np.repeat(np.arange(len(of)), np.diff(of.offsets))
    found = zip(
        of.ids.tolist(), of.acts.tolist(), of.document[at].tolist(), of.position[at].tolist(),
        strict=True,
    )  # fmt: skip
    return sorted(found, key=lambda each: (each[0], -each[1], each[2], each[3]))


def same(one: TokenRows, other: TokenRows) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("document", "position", "token", "offsets", "ids", "acts", "expert")
        if getattr(one, name) is not None or getattr(other, name) is not None
    )


def all_rows(store: FeatureStore) -> TokenRows:
    return TokenRows.cat([TokenRows.empty(store.provenance.layout), *store.rows()])


def documents(store: FeatureStore) -> list[list[int]]:
    """The token ids of each document, whose positions must count from 0."""
    rows = all_rows(store)
    found = []
    for number in np.unique(rows.document):
        here = rows.document == number
        assert rows.position[here].tolist() == [*range(here.sum())]
        found.append(rows.token[here].tolist())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder but locks and what a killed process left behind."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".tmp-", ".lock"))
    }


def forks() -> Any:
    """Where to start processes from: a server that has imported everything, and threads nowhere."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_switch_sae", "helpers.stores", "helpers.tiny"])
    return context


def kill_at_random(
    work: Callable[..., None],
    args: tuple[Any, ...],
    within: float,
    times: int,
    after_each: Callable[[], None],
    start_over: Callable[[], None],
) -> int:
    """SIGKILL a process that does `work(*args)` at random moments, then let one finish.

    `start_over` is called where the work was done before it could be killed. The number of kills
    that hit a process at work.
    """
    rng, kills = random.Random(0), 0
    while kills < times:
        process = forks().Process(target=work, args=args)
        process.start()
        deadline = time.monotonic() + 20
        started = args[-1]  # a multiprocessing Event that `work` sets when it begins
        assert started.wait(max(0, deadline - time.monotonic()))
        time.sleep(rng.uniform(0, within))
        alive = process.is_alive()
        process.kill()
        process.join()
        started.clear()
        after_each()
        if alive:
            kills += 1
        else:
            start_over()
    process = forks().Process(target=work, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0
    return kills

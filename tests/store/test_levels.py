"""Levels of the index: every rank lies in one place, pinned ones exactly, others near their act."""

import numpy as np
import pytest

from hf_switch_sae.store.levels import Levels, rank_at

COUNTS = [1, 15, 63, 64, 65, 81, 200, 1000, 5000, 100_003]


def made(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Acts falling, many of them equal, and rows in no order."""
    acts = np.sort(np.random.default_rng(0).integers(0, 500, count).astype(np.uint16))[::-1]
    return acts.copy(), np.random.default_rng(1).permutation(10 * count)[:count]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("cut", [0, 0.01, 0.3, 1])
def test_every_rank_of_two_files_is_stored_once_pinned_ones_first(count, cut):
    middle = int(cut * count)
    for start, stop in ((0, middle), (middle, count)):
        if start == stop:
            continue
        levels = Levels(count, start, stop)
        ranks = np.arange(start, stop)
        at = levels.stored_at(ranks)
        assert sorted(at.tolist()) == list(range(stop - start))
        first = levels.stored_at(levels.pinned)
        assert first.tolist() == list(range(len(first)))
        members = [levels.members(level) for level in range(len(levels.edges))]
        ordered = np.concatenate([levels.pinned, *members])
        assert levels.stored_at(ordered).tolist() == list(range(stop - start))
        for level, (low, high) in enumerate(levels.begins.tolist()):
            assert levels.stored_at(members[level]).tolist() == list(range(low, high))


@pytest.mark.parametrize("count", COUNTS)
def test_pinned_are_the_strongest_and_those_of_a_sample_at_the_quartiles(count):
    pinned = set(Levels(count).pinned.tolist())
    assert pinned >= set(range(min(64, count)))
    for quantile in (1, 0.75, 0.5, 0.25, 0):
        start = max(0, min(rank_at(quantile, count) - 8, count - 16))
        assert pinned >= set(range(start, min(count, start + 16)))
    assert len(pinned) <= 64 + 4 * 16


@pytest.mark.parametrize("count", COUNTS)
def test_levels_grow_with_the_rank_up_to_a_quarter_of_all(count):
    edges = Levels(count).edges
    lengths = np.diff(edges)[:, 0]
    assert (lengths <= np.maximum(64, np.minimum(edges[:, 0], count // 4))).all()
    assert len(lengths) <= 4 + np.log2(count)


@pytest.mark.parametrize("count", COUNTS)
def test_arranged_rows_are_in_order_within_levels_and_none_is_lost(count):
    acts, rows = made(count)
    levels, was = Levels(count), dict(zip(rows.tolist(), acts.tolist(), strict=True))
    ranked = rows.copy()

    exact = levels.arrange(acts, rows)

    pinned = len(levels.pinned)
    assert exact.tolist() == [True] * pinned + [False] * (count - pinned)
    assert sorted(rows.tolist()) == sorted(ranked.tolist())
    assert rows[:pinned].tolist() == ranked[levels.pinned].tolist()
    assert acts[:pinned].tolist() == [was[row] for row in rows[:pinned].tolist()]
    for level, (low, high) in enumerate(levels.begins.tolist()):
        here = rows[low:high].tolist()
        assert here == sorted(here, reverse=level % 2 == 1)
        assert set(here) == set(ranked[levels.members(level)].tolist())
        assert set(acts[low:high].tolist()) == {min(was[row] for row in here)}

"""A store of recorded features: what was put in comes out, queries agree with a plain search, and
nothing that is damaged, foreign or half written is ever read as if it were right."""

import errno
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import stores

from hf_switch_sae import FeatureIdError, FeatureStore, SparseFeatures, StoreError, files
from hf_switch_sae.store import TokenRows, index, parquet, shards

SHARDS = [[5, 0, 9], [1], [40, 3, 3, 7], [2, 2]]


@pytest.mark.parametrize("kind", stores.WIDTHS)
def test_ids_come_back_exactly_and_acts_to_float16_strongest_first(tmp_path, kind):
    given = stores.features(200, kind)
    place = np.arange(200)
    store = FeatureStore.create(tmp_path / "s", stores.provenance(kind))
    layout = store.provenance.layout
    store.append(0, 9, TokenRows.of(given, place // 20, place % 20, place % 9, layout))
    store.refresh()

    found = stores.all_rows(store)

    assert found.document.tolist() == (place // 20).tolist()
    assert found.token.tolist() == (place % 9).tolist()
    back = found.features(store.num_features)
    assert torch.equal(back.acts, given.topk(4).acts.half()[:, : back.k])
    torch.testing.assert_close(back.to_dense(), given.to(torch.float16).to_dense())
    if kind == "switch":
        assert found.expert.tolist() == (given.ids[:, 0] // 16).tolist()


def test_rows_in_any_order_are_stored_by_document_and_position(tmp_path):
    rows = stores.rows([30, 20])
    store = FeatureStore.create(tmp_path / "s", stores.provenance())
    store.append(0, 1, rows.take(np.random.default_rng(0).permutation(len(rows))))
    store.refresh()

    assert stores.same(stores.all_rows(store), rows)


def test_a_shard_of_many_row_groups_reads_whole_and_in_part(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[9000, 1, 500]])

    assert store.shards[0].path.exists()
    assert pq.read_metadata(store.shards[0].path).num_row_groups == 3
    assert stores.same(stores.all_rows(store), rows)
    assert stores.same(
        TokenRows.cat(list(store.rows(range(1, 3)))), rows.take(np.arange(9000, 9501))
    )
    for position in (0, 4094, 4095, 4096, 8191, 8192, 8999):
        passage = store.around(0, position, 3)
        lowest, highest = max(0, position - 3), min(8999, position + 3)
        assert passage.positions == tuple(range(lowest, highest + 1))
        assert passage.tokens == tuple(rows.token[lowest : highest + 1])
        want = rows.take(np.arange(lowest, highest + 1)).features(64)
        assert torch.equal(passage.features.to_dense(), want.to_dense())


# --- the index ----------------------------------------------------------------------------------


def read_postings(store: FeatureStore) -> list[tuple[int, float, int, int]]:
    """(feature, act, document, position) of every rank of every feature, as queries read them."""
    store, found = FeatureStore(store.path), []
    files = sorted((store.path / "index").glob("*/postings-*.parquet"))
    sizes = {pq.read_metadata(path).row_group(0).num_rows for path in files if path.stat().st_size}
    with pytest.MonkeyPatch.context() as patch:
        # of the files that a test wrote with smaller row groups
        patch.setattr("hf_switch_sae.store.postings.ROW_GROUP", 64 if max(sizes) <= 64 else 65_536)
        for feature in np.flatnonzero(store._index.counts).tolist():
            acts, places = store._index.ranked(feature, 0, 1 << 40)
            for act, (shard, row) in zip(acts.tolist(), places, strict=True):
                document, position, _ = store._reader.tokens(shard, row, row + 1)
                found.append((feature, act, int(document[0]), int(position[0])))
    return found


@pytest.mark.parametrize("kind", stores.WIDTHS)
def test_the_index_is_every_posting_sorted_by_feature_act_and_place(tmp_path, kind):
    store, rows = stores.make(tmp_path / "s", SHARDS, kind)

    store.index()

    assert read_postings(store) == stores.postings(rows)
    assert not list((store.path / "index").glob("*/runs"))


def test_runs_parts_and_a_feature_larger_than_a_part_join_to_the_same_index(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "ROW_GROUP", 64)
    monkeypatch.setattr(index, "_BYTES_A_POSTING", 1)
    store, rows = stores.make(tmp_path / "s", [[300, 20], [500], [1, 1, 400]])
    # feature 3 is active on every token, with three different acts
    n = len(rows)
    dense = TokenRows.of(
        SparseFeatures(torch.arange(3.0)[torch.arange(n) % 3, None] + 1, torch.full((n, 1), 3), 64),
        rows.document,
        rows.position,
        rows.token,
        store.provenance.layout,
    )
    store.append(0, 1, dense.take(np.flatnonzero(rows.document <= 1)))
    store.refresh()
    rows = stores.all_rows(store)

    store.index(memory=100)

    assert read_postings(store) == stores.postings(rows)
    parts = sorted((store.path / "index").glob("*/postings-*.parquet"))
    assert len(parts) > 10
    store = FeatureStore(store.path)
    monkeypatch.setattr("hf_switch_sae.store.postings.ROW_GROUP", 64)
    hits = store.top_tokens(3, 1000)
    want = [each for each in stores.postings(rows) if each[0] == 3][:1000]
    assert [(hit.feature, hit.act, hit.document, hit.position) for hit in hits] == want


def test_an_index_is_only_used_for_the_shards_it_was_built_from(tmp_path):
    store, _ = stores.make(tmp_path / "s", SHARDS)
    with pytest.raises(StoreError, match=r"no index.*call store\.index"):
        store.top_tokens(0)
    store.index()
    store.append(11, 11, stores.rows([3], first=11))

    again = FeatureStore(store.path)

    assert not again.is_indexed
    with pytest.raises(StoreError, match=r"of other shards.*call store\.index"):
        again.density()
    again.index()
    assert read_postings(again) == stores.postings(stores.all_rows(again))
    assert len(list((store.path / "index").iterdir())) == 2  # the new one and the lock


def test_an_empty_store_has_nothing_to_index_and_says_so(tmp_path):
    store, _ = stores.make(tmp_path / "s", [])
    with pytest.raises(StoreError, match="no tokens yet"):
        store.index()
    assert store.num_tokens == 0
    assert store.to_csr().shape == (0, 64)


def test_tokens_without_any_active_feature_can_be_indexed(tmp_path):
    store = FeatureStore.create(tmp_path / "s", stores.provenance())
    nothing = SparseFeatures(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64), 64)
    place = np.arange(3)
    rows = TokenRows.of(nothing, 0 * place, place, place, store.provenance.layout)
    store.append(0, 0, rows)
    store.index()

    assert store.density().sum() == 0
    assert store.top_tokens(5) == []
    assert store.sample(5) == {1.0: [], 0.75: [], 0.5: [], 0.25: [], 0.0: []}
    assert store.coactivation(5) == []


# --- queries ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    store, rows = stores.make(tmp_path_factory.mktemp("q") / "s", [[50, 0, 9], [700], [40, 3, 60]])
    store.index()
    return store, rows


def test_top_tokens_are_those_of_a_plain_search_with_their_context(indexed):
    store, rows = indexed
    plain = stores.postings(rows)
    for feature in range(64):
        hits = store.top_tokens(feature, 12, context=(2, 3))
        want = [each for each in plain if each[0] == feature][:12]
        assert [(hit.feature, hit.act, hit.document, hit.position) for hit in hits] == want
        for hit in hits:
            here = np.flatnonzero(rows.document == hit.document)
            low = max(0, hit.position - 2)
            assert hit.tokens == tuple(rows.token[here][low : hit.position + 4])
            assert hit.at == hit.position - low


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Features of some hundred tokens each, so that most ranks lie in levels."""
    store, rows = stores.make(tmp_path_factory.mktemp("d") / "s", [[2000, 9], [3000], [1500]])
    store.index()
    return store, stores.postings(rows)


def found(hits) -> list[tuple[int, float, int, int]]:
    return [(hit.feature, hit.act, hit.document, hit.position) for hit in hits]


@pytest.mark.parametrize("n", [3, 64, 65, 100, 129, 300, 100_000])
def test_however_many_are_asked_for_they_are_those_of_a_plain_search(dense, n):
    store, plain = dense
    for feature in (0, 17, 63):
        want = [each for each in plain if each[0] == feature]
        assert len(want) > 300
        assert found(store.top_tokens(feature, n, context=0)) == want[:n]


@pytest.mark.parametrize("n", [1, 4, 16, 90])
def test_a_sample_is_those_nearest_in_rank_at_whatever_quantile(dense, n):
    store, plain = dense
    quantiles = (1.0, 0.97, 0.75, 0.6, 0.5, 0.31, 0.25, 0.02, 0.0)
    for feature in (5, 40):
        ranked = [each for each in plain if each[0] == feature]
        sample = store.sample(feature, quantiles, n, context=0)
        for quantile in quantiles:
            start = round((1 - quantile) * (len(ranked) - 1)) - n // 2
            start = max(0, min(start, len(ranked) - n))
            assert found(sample[quantile]) == ranked[start : start + n]


def test_the_strongest_and_the_quartiles_are_answered_without_reading_levels(dense, monkeypatch):
    store, _ = dense
    monkeypatch.setattr("hf_switch_sae.store.postings.Index._level", None)
    for feature in (5, 40):
        assert len(store.top_tokens(feature, 64)) == 64
        for n in (1, 4, 15, 16):
            assert all(len(hits) == n for hits in store.sample(feature, n=n).values())
    with pytest.raises(TypeError):
        store.top_tokens(5, 65)


def test_coactivation_looks_at_tokens_spread_evenly_over_the_levels(dense):
    store, plain = dense
    for feature in (5, 40):
        rank = {each[2:]: at for at, each in enumerate(e for e in plain if e[0] == feature)}
        count = len(rank)
        ranks = np.linspace(0, count - 1, 50).astype(np.int64)
        places = [
            tuple(int(part[0]) for part in store._reader.tokens(shard, row, row + 1)[:2])
            for shard, row in store._index.spread(feature, ranks)
        ]
        assert len(set(places)) == 50
        farther = np.abs(np.sort([rank[place] for place in places]) - ranks)
        assert farther.max() <= max(64, count // 4)


def test_acts_that_the_shards_no_longer_have_are_an_error(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[3000]])
    store.index()
    half = replace(rows, acts=(rows.acts / 2).astype(np.float16))
    index_folder = store._index_folder
    shutil.copytree(index_folder, tmp_path / "kept")
    store.append(0, 0, half)
    store.refresh()
    shutil.copytree(tmp_path / "kept", store._index_folder)  # as if the shard were as large

    with pytest.raises(StoreError, match=r"does not fit the shards.*call store\.index"):
        FeatureStore(store.path).top_tokens(0, 200)


def test_density_maxima_and_counts_are_those_of_a_plain_search(indexed):
    store, rows = indexed
    dense = rows.features(64).to_dense()

    torch.testing.assert_close(store.density(), (dense > 0).double().mean(0))
    torch.testing.assert_close(store.max_acts(), dense.amax(0).float())
    assert store.num_tokens == len(rows)


def test_a_sample_lies_at_its_quantiles(indexed):
    store, rows = indexed
    feature = int(store.density().argmax())
    acts = np.sort(rows.acts[rows.ids == feature])

    found = store.sample(feature, (1.0, 0.5, 0.0), n=1)

    assert [found[q][0].act for q in (1.0, 0.5, 0.0)] == [
        acts[-1], pytest.approx(np.quantile(acts, 0.5), abs=0.1), acts[0],
    ]  # fmt: skip
    assert [len(hits) for hits in store.sample(feature, (1.0, 0.0), n=7).values()] == [7, 7]
    with pytest.raises(ValueError, match="between 0 and 1"):
        store.sample(feature, (50,))


def test_coactivation_is_that_of_a_plain_count(indexed):
    store, rows = indexed
    dense = rows.features(64).to_dense()
    for feature in (0, 17, 40):
        here = dense[dense[:, feature] > 0]
        found = store.coactivation(feature, 64)
        counts = (here > 0).sum(0)
        assert {each.feature for each in found} == set(counts.nonzero()[:, 0].tolist()) - {feature}
        for each in found:
            assert each.share == pytest.approx(float(counts[each.feature]) / len(here))
        assert [each.share for each in found] == sorted((e.share for e in found), reverse=True)
    assert len(store.coactivation(17, 64, tokens=1)) <= 3


def test_features_of_tokens_are_those_where_they_follow_each_other_in_a_document(indexed):
    store, rows = indexed
    wanted = rows.token[100:102].tolist()
    dense = rows.features(64).to_dense()
    follows = np.flatnonzero((rows.token[:-1] == wanted[0]) & (rows.token[1:] == wanted[1]))
    starts = follows[rows.document[follows] == rows.document[follows + 1]]
    here = dense[np.concatenate([starts, starts + 1])]

    found = store.features_of(wanted, 64)

    assert len(starts) < len(follows) or len(starts) > 3
    shares = {each.feature: each.share for each in found}
    counts = (here > 0).double().mean(0)
    assert shares == {int(id): pytest.approx(float(counts[id])) for id in counts.nonzero()[:, 0]}


def test_asking_by_text_uses_the_tokenizer_and_needs_one(indexed):
    store, rows = indexed
    token = int(rows.token[0])
    with pytest.raises(StoreError, match="tokenizer="):
        store.features_of("a text")
    with pytest.raises(StoreError, match="empty"):
        store.features_of([])
    asked = FeatureStore(store.path, tokenizer=lambda text, **_: {"input_ids": [int(text)]})
    assert asked.features_of(str(token)) == store.features_of([token])


def test_csr_is_the_dense_matrix_of_the_documents_asked_for(indexed):
    store, rows = indexed
    dense = rows.features(64).to_dense()

    torch.testing.assert_close(store.to_csr().to_dense(), dense)
    some = store.to_csr(range(2, 5))
    inside = torch.from_numpy((rows.document >= 2) & (rows.document < 5))
    torch.testing.assert_close(some.to_dense(), dense[inside])


def test_a_feature_or_a_token_that_is_not_there_is_an_error_that_says_what_is(indexed):
    store, _ = indexed
    with pytest.raises(FeatureIdError, match="features 0 to 63"):
        store.top_tokens(64)
    with pytest.raises(StoreError, match="document 1 has no token at position 0"):
        store.around(1, 0)  # a document without tokens
    with pytest.raises(StoreError, match="documents 0 to 6"):
        store.around(99, 0)


@pytest.mark.parametrize("wrong", [True, np.True_, torch.tensor(True)], ids=repr)
def test_a_truth_value_asks_for_no_feature_token_or_document(indexed, wrong):
    store, _ = indexed
    for ask in (store.top_tokens, store.sample, store.coactivation):
        with pytest.raises(FeatureIdError, match="feature ids are integers"):
            ask(wrong)
    for ask in (lambda: store.around(wrong, 0), lambda: store.around(0, wrong)):
        with pytest.raises(StoreError, match="documents and positions are integers"):
            ask()
    for tokens in ([wrong, wrong], [2, wrong], [1.5]):
        with pytest.raises(StoreError, match="token ids are integers"):
            store.features_of(tokens)


def test_datasets_and_plain_pyarrow_read_a_store_as_it_is(indexed, tmp_path):
    import datasets

    store, rows = indexed
    datasets.disable_progress_bars()
    for name, count in (("tokens", len(rows)), ("postings", len(rows.ids))):
        found = datasets.load_dataset(str(store.path), name, split="train", cache_dir=str(tmp_path))
        assert len(found) == count
    table = pq.read_table(store.path / "tokens")
    assert table["document"].to_pylist() == rows.document.tolist()


# --- damage -------------------------------------------------------------------------------------


def answers(path: Path) -> object:
    store = FeatureStore(path)
    found = stores.all_rows(store)
    return (
        [getattr(found, name).tolist() for name in ("document", "token", "ids", "acts")],
        [store.top_tokens(feature, 5) for feature in (0, 9, 33)],
        store.around(2, 5),
    )


@pytest.mark.parametrize("kind", ["tokens", "postings", "features"])
def test_a_flipped_bit_anywhere_is_an_error_or_changes_nothing_and_verify_finds_it(tmp_path, kind):
    store, _ = stores.make(tmp_path / "s", [[60], [5, 30]])
    store.index()
    right = repr(answers(store.path))
    pattern = {"tokens": "tokens/*.parquet", "postings": "index/*/postings*"}
    path = next(iter(store.path.glob(pattern.get(kind, "index/*/features*"))))
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            given = repr(answers(store.path))
        except StoreError:
            refused += 1
        else:
            assert given == right, f"byte {at} gave a wrong answer"
        with pytest.raises(StoreError):
            FeatureStore(store.path).verify()
    path.write_bytes(whole)
    assert refused > 75
    FeatureStore(store.path).verify()


@pytest.mark.parametrize("left", [0, 3, 11, 100, 0.5, -1])
def test_a_shard_that_is_cut_short_is_an_error_that_names_it(tmp_path, left):
    store, _ = stores.make(tmp_path / "s", SHARDS)
    path = store.shards[2].path
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if left == 0.5 else left])

    again = FeatureStore(store.path)
    for ask in (lambda: stores.all_rows(again), again.verify, again.index):
        with pytest.raises(StoreError, match=path.name):
            ask()
    assert not list((store.path / "index").glob("*/index.json"))


def test_a_shard_of_another_store_is_refused(tmp_path):
    store, _ = stores.make(tmp_path / "a", SHARDS)
    other, _ = stores.make(tmp_path / "b", [[4]], "two_experts")
    target = store.path / "tokens" / "tokens-000000000011-000000000011.parquet"
    shutil.copy(other.shards[0].path, target)

    with pytest.raises(StoreError, match="belongs to another store"):
        stores.all_rows(FeatureStore(store.path))


def test_a_file_that_this_package_did_not_write_is_refused(tmp_path):
    store, _ = stores.make(tmp_path / "s", SHARDS)
    path = store.shards[0].path
    pq.write_table(pq.read_table(path), path)

    with pytest.raises(StoreError, match="no seal"):
        stores.all_rows(FeatureStore(store.path))


def test_a_shard_without_rows_does_not_stop_a_search_for_a_text(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[0, 0], [9]])
    wanted = rows.token[3:5].tolist()
    assert store.features_of(wanted)
    assert store.features_of([*wanted] * 9) == []


def test_two_shards_with_one_document_are_refused(tmp_path):
    store, _ = stores.make(tmp_path / "s", SHARDS)
    store.append(3, 4, stores.rows([1, 1], first=3))

    with pytest.raises(StoreError, match=r"two shards of .* hold document"):
        FeatureStore(store.path)


def test_rows_of_other_documents_than_named_are_refused(tmp_path):
    store, _ = stores.make(tmp_path / "s", [])
    with pytest.raises(StoreError, match="documents 0 to 1, not of 5 to 6"):
        store.append(5, 6, stores.rows([1, 1]))
    assert not list(store.path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "format version 2, and this package reads version 1"),
        ({"format": "something"}, "of the format 'something'"),
        ({"num_features": None}, "damaged|lacks"),
    ],
)
def test_another_format_or_version_is_refused_and_left_alone(tmp_path, change, says):
    store, _ = stores.make(tmp_path / "s", SHARDS)
    path = store.path / "store.json"
    data = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    before = stores.contents(store.path)

    with pytest.raises(StoreError, match=says):
        FeatureStore(store.path)
    with pytest.raises(StoreError, match=says):
        FeatureStore.create(store.path, stores.provenance())
    assert stores.contents(store.path) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3"])
def test_a_damaged_store_json_is_refused(tmp_path, content):
    store, _ = stores.make(tmp_path / "s", SHARDS)
    (store.path / "store.json").write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        FeatureStore(store.path)


@pytest.mark.parametrize(
    "other",
    [
        {"sae": {"name": "a", "weights": "2"}},
        {"lm": {"fingerprint": "2"}},
        {"hookpoint": "layers.3.resid_post"},
        {"dataset": {"kind": "list", "sha256": "2"}},
        {"kind": "two_experts"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_store_of_something_else_is_refused_and_left_alone(tmp_path, other):
    made = {
        "sae": {"name": "a", "weights": "1"},
        "lm": {"fingerprint": "1"},
        "dataset": {"kind": "list", "sha256": "1"},
    }
    store, _ = stores.make(tmp_path / "s", SHARDS, **made)
    before = stores.contents(store.path)

    with pytest.raises(StoreError, match="something else, so nothing was added"):
        FeatureStore.create(store.path, stores.provenance(**{**made, **other}))

    assert stores.contents(store.path) == before
    renamed = {**made, "sae": {"name": "moved/elsewhere", "revision": "main", "weights": "1"}}
    FeatureStore.create(store.path, stores.provenance(**renamed))


def test_more_files_after_those_there_were_go_on_with_a_store_and_others_do_not(tmp_path):
    def of(*names):
        files = [{"name": name, "bytes": 1} for name in names]
        return stores.provenance(dataset={"kind": "files", "files": files})

    FeatureStore.create(tmp_path / "s", of("a", "b"))
    FeatureStore.create(tmp_path / "s", of("a", "b", "c"))
    with pytest.raises(StoreError, match="dataset files"):
        FeatureStore.create(tmp_path / "s", of("b", "a"))


def test_files_that_were_added_are_noted_so_that_others_do_not_take_their_numbers(tmp_path):
    def of(*names, **more):
        files = [{"name": name, "bytes": 1, **more} for name in names]
        return stores.provenance(dataset={"kind": "files", "files": files})

    FeatureStore.create(tmp_path / "s", of("a", sha256="2"))
    path = tmp_path / "s" / "store.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "of a later version": 1}))
    store = FeatureStore.create(tmp_path / "s", of("a", "b", sha256="2"))

    assert [file["name"] for file in store.provenance.dataset["files"]] == ["a", "b"]
    assert json.loads(path.read_text())["of a later version"] == 1
    before = stores.contents(tmp_path)
    FeatureStore.create(tmp_path / "s", of("a", "b", sha256="2"))
    for other in (of("a", "c", sha256="2"), of("a", "b", sha256="3"), of("a"), of("a", "c", "b")):
        with pytest.raises(StoreError, match="dataset files"):
            FeatureStore.create(tmp_path / "s", other)
    assert stores.contents(tmp_path) == before


def test_a_folder_that_holds_other_things_is_not_made_a_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="not empty"):
        FeatureStore.create(tmp_path, stores.provenance())
    with pytest.raises(StoreError, match=r"no store\.json there"):
        FeatureStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_readme_that_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("my own words")
    FeatureStore.create(tmp_path, stores.provenance())
    assert (tmp_path / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES])
def test_a_store_is_made_where_there_are_no_hard_links(tmp_path, monkeypatch, code):
    def no_links(*_):
        raise OSError(code, "no links here")

    plain = FeatureStore.create(tmp_path / "plain", stores.provenance())
    monkeypatch.setattr("os.link", no_links)
    FeatureStore.create(tmp_path / "s", stores.provenance())
    FeatureStore.create(tmp_path / "s", stores.provenance())

    assert stores.contents(tmp_path / "s") == stores.contents(plain.path)


def test_a_writer_that_comes_second_compares_and_leaves_nothing(tmp_path, monkeypatch):
    def no_links(beside, path):
        path.write_bytes((plain.path / "store.json").read_bytes())  # the other was faster
        raise OSError(errno.EPERM, "no links here")

    plain = FeatureStore.create(tmp_path / "plain", stores.provenance())
    monkeypatch.setattr("os.link", no_links)
    with pytest.raises(StoreError, match="something else"):
        FeatureStore.create(tmp_path / "s", stores.provenance(hookpoint="layers.3.resid_post"))

    assert stores.contents(tmp_path / "s") == stores.contents(plain.path)


def test_an_act_that_float16_cannot_hold_is_an_error_and_one_it_rounds_to_0_is_no_posting():
    layout, place = stores.provenance().layout, np.zeros(1, int)

    def of(act):
        made = SparseFeatures(torch.tensor([[act]]), torch.tensor([[3]]), 64)
        return TokenRows.of(made, place, place, place, layout)

    with pytest.raises(StoreError, match="feature 3 has an act of 70000"):
        of(70000.0)
    assert len(of(1e-9).ids) == 0
    assert of(65504.0).acts.tolist() == [65504]


# --- a full disk --------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """No file may grow over 20 kB: to a writer the same as a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_what_was_there_stays(tmp_path, small_files):
    store, rows = stores.make(tmp_path / "s", [[50]])
    before = stores.contents(store.path)

    for documents in ((0, 0), (1, 1)):
        with pytest.raises(StoreError, match=r"the disk is full.*run the same call again"):
            store.append(*documents, stores.rows([4000], first=documents[0]))

    assert stores.contents(store.path) == before
    assert not list(store.path.rglob(".tmp-*"))
    assert stores.same(stores.all_rows(FeatureStore(store.path)), rows)


def test_a_disk_that_fills_while_indexing_leaves_the_store_as_it_was(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[3000], [3000]])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StoreError, match="the disk is full"):
            store.index()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert not FeatureStore(store.path).is_indexed
    store.index()
    assert read_postings(store) == stores.postings(rows)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_and_no_quota_read_alike(tmp_path, monkeypatch, code):
    store, _ = stores.make(tmp_path / "s", [[5]])

    def full(handle):
        raise OSError(code, "no room")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match="the disk is full"):
        store.append(1, 1, stores.rows([4], first=1))
    assert len(list((store.path / "tokens").iterdir())) == 1


def test_a_budget_of_bytes_is_not_passed(tmp_path):
    store, _ = stores.make(tmp_path / "s", [[5]])
    rows = stores.rows([400], first=1)
    assert store.append(1, 1, rows, room=500) is None
    assert len(list((store.path / "tokens").iterdir())) == 1
    size = store.append(1, 1, rows, room=50_000)
    store.refresh()
    assert size == store.shards[1].size


# --- several writers ----------------------------------------------------------------------------


def append_some(path, worker, started):
    store = FeatureStore(path)
    for i in range(5):
        store.append_documents([stores.rows([worker + 1] * 2, seed=i)])


def test_processes_that_append_documents_at_once_get_numbers_of_their_own(tmp_path):
    store, _ = stores.make(tmp_path / "s", [])
    context = stores.forks()
    workers = [
        context.Process(target=append_some, args=(store.path, worker, None)) for worker in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    store = FeatureStore(store.path)
    assert [shard.first for shard in store.shards] == list(range(20))
    assert store.num_tokens == 5 * 2 * (1 + 2 + 3 + 4)


def test_documents_of_sessions_do_not_go_into_a_data_sets_store(tmp_path):
    store, _ = stores.make(tmp_path / "s", [], dataset={"kind": "list"})
    with pytest.raises(StoreError, match="a folder of their own"):
        store.append_documents([stores.rows([3])])


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    store, _ = stores.make(tmp_path / "s", [[3]])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.socket.gethostname()
    gone = store.path / "tokens" / f".tmp-{host}-{dead.pid}-00000000"
    stays = [
        store.path / "tokens" / f".tmp-{host}-{files.os.getpid()}-00000000",
        store.path / "tokens" / f".tmp-elsewhere-{dead.pid}-00000000",
    ]
    for path in (gone, *stays):
        path.write_bytes(b"half a shard")

    store.remove_leftovers()

    assert not gone.exists()
    assert all(path.exists() for path in stays)
    assert FeatureStore(store.path).num_tokens == 3


def test_no_signal_is_sent_where_it_would_be_ctrl_c(monkeypatch):
    sent = []
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "kill", lambda *signal: sent.append(signal))
        patch.setattr(files.os, "name", "nt")
        running = files._is_running(1)
    assert running
    assert not sent


# --- killed while indexing ----------------------------------------------------------------------


def index_slowly(path, started):
    store = FeatureStore(path)
    index.ROW_GROUP = 64
    index._BYTES_A_POSTING = 1
    started.set()
    store.index(memory=400, progress=False)


def test_killed_20_times_while_indexing_it_goes_on_to_the_very_same_index(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[400, 30], [200], [300, 300], [100]])
    started = stores.forks().Event()
    shutil.copytree(store.path, tmp_path / "whole")
    process = stores.forks().Process(target=index_slowly, args=(tmp_path / "whole", started))
    process.start()
    started.wait()
    begin = time.monotonic()
    process.join()
    within = 0.6 * (time.monotonic() - begin)
    started.clear()
    want = stores.contents(tmp_path / "whole")

    def after_each():
        again = FeatureStore(store.path)
        assert stores.same(stores.all_rows(again), rows)
        if again.is_indexed:
            assert read_postings(again) == stores.postings(rows)

    kills = stores.kill_at_random(
        index_slowly,
        (store.path, started),
        within,
        20,
        after_each,
        lambda: shutil.rmtree(store.path / "index"),
    )

    assert kills == 20
    assert stores.contents(store.path) == want
    assert not list(store.path.rglob(".tmp-*"))


def test_an_index_interrupted_at_any_step_goes_on_without_doing_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "ROW_GROUP", 64)
    monkeypatch.setattr(index, "_BYTES_A_POSTING", 1)
    store, rows = stores.make(tmp_path / "s", [[300], [200], [300, 300]])
    written = []

    class Stop(Exception):
        pass

    def counting(write):
        def counted(path, *args, **options):
            if written.count(path.name) or len(written) == budget:
                raise Stop
            written.append(path.name)
            return write(path, *args, **options)

        return counted

    for module in (index, parquet):
        monkeypatch.setattr(module, "written_whole", counting(files.written_whole))
    monkeypatch.setattr(index, "write_json", counting(files.write_json))
    for budget in range(1, 1000):  # noqa: B007  `counting` reads it
        try:
            store.index(memory=400)
        except Stop:
            continue
        break
    else:
        pytest.fail("it never came to an end")

    assert len(written) >= 10
    assert len(set(written)) == len(written), "something was done twice"
    assert read_postings(store) == stores.postings(rows)


def test_an_interrupted_index_can_go_on_with_another_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "ROW_GROUP", 64)
    monkeypatch.setattr(index, "_BYTES_A_POSTING", 1)
    store, rows = stores.make(tmp_path / "s", [[300], [200], [300, 300]])
    real = index._write_features

    def stop(*_):
        raise StoreError("no room for the rest")

    monkeypatch.setattr(index, "_write_features", stop)
    with pytest.raises(StoreError, match="no room"):
        store.index(memory=200)
    monkeypatch.setattr(index, "_write_features", real)
    store.index(memory=900)

    assert read_postings(store) == stores.postings(rows)
    monkeypatch.setattr("hf_switch_sae.store.postings.ROW_GROUP", 64)
    for feature in range(64):
        want = [each[1:] for each in stores.postings(rows) if each[0] == feature]
        hits = FeatureStore(store.path).top_tokens(feature, 10_000, context=0)
        assert [(hit.act, hit.document, hit.position) for hit in hits] == want


def test_an_unfinished_index_of_another_version_is_begun_anew(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[300], [200]])
    run = store._index_folder / "runs" / "run-000000.bin"
    run.parent.mkdir(parents=True)
    head = {"base": 0, "stop": [2, 0], "limit": (1 << 30) // index._BYTES_A_POSTING, "tokens": 500}
    run.write_bytes(json.dumps(head).encode() + b"\n" + bytes(8 * 129))
    store.index()

    assert read_postings(store) == stores.postings(rows)


def test_a_shard_replaced_by_one_of_equal_size_is_not_answered_for_by_the_old_index(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[30], [20]])
    store.index()
    size = store.shards[0].size
    one = rows.take(np.arange(30))
    # the same features on other tokens, so a file as large
    store.append(0, 0, replace(one, token=(one.token + 20).astype(one.token.dtype)))
    store.refresh()

    assert store.shards[0].size == size
    assert not store.is_indexed
    store.index()
    assert read_postings(store) == stores.postings(stores.all_rows(store))


def test_a_shard_is_not_replaced_while_its_index_is_built(tmp_path):
    store, rows = stores.make(tmp_path / "s", [[30]])
    store.index()
    before = stores.contents(tmp_path)
    with (
        files.locked(store.path / "index" / ".lock", wait=False),
        pytest.raises(StoreError, match="another process is at work"),
    ):
        store.append(0, 0, rows)
    assert stores.contents(tmp_path) == before


def test_one_process_at_a_time_builds_the_index(tmp_path):
    store, _ = stores.make(tmp_path / "s", SHARDS)
    with (
        files.locked(store.path / "index" / ".lock", wait=False),
        pytest.raises(StoreError, match="another process is at work"),
    ):
        store.index()


# --- memory -------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from hf_switch_sae import FeatureStore
import pyarrow, torch
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
FeatureStore(sys.argv[1]).index(memory=int(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_indexing_stays_within_its_memory_whatever_the_size_of_the_store(tmp_path):
    store, _ = stores.make(tmp_path / "s", [[40_000]] * 2)
    for i in range(2, 20):
        shard = store.shards[i % 2].path
        store.append(i, i, stores.rows([40_000], first=i, seed=i % 2))
        assert shard.exists()
    store.refresh()
    assert store.num_tokens == 800_000  # 2.5 M postings, 160 MB in the sort's own terms

    done = subprocess.run(
        [sys.executable, "-c", PEAK, store.path, str(32 << 20)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert int(done.stdout) < 100 + 32
    assert FeatureStore(store.path).is_indexed


def test_reading_a_large_store_does_not_load_it(indexed):
    store, _ = indexed
    assert store._reader.footer.cache_info().maxsize is not None
    assert store._reader._token_columns.cache_info().maxsize is not None
    assert shards.ROW_GROUP == 4096

"""The format of a store, pinned: bytes in `golden_store/` that every later version must read.

They were written by `python tests/store/test_store_format.py`; never write them again for the same
version of store and index.
"""

import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import stores

from hf_switch_sae import FeatureStore, StoreError
from hf_switch_sae.store import Provenance, TokenRows

GOLDEN = pathlib.Path(__file__).parent / "golden_store"
# document 2 is long enough for its features to have levels
LENGTHS = {0: 5, 1: 0, 2: 2400, 3: 40, 4: 1}
SHARDS = [(0, 2), (3, 4)]


def provenance() -> Provenance:
    return Provenance(
        num_features=48,
        num_experts=4,
        num_experts_per_token=1,
        k=3,
        hookpoint="layers.2.resid_post",
        sae={"name": "org/sae", "revision": "0123abcd", "weights": "11" * 32},
        lm={"name": "org/lm", "revision": None, "fingerprint": "22" * 32},
        tokenizer={"name": "org/lm", "sha256": "33" * 32},
        dataset={"kind": "list", "sha256": "44" * 32},
        text={"context": 16, "prefix": [], "add_special_tokens": True},
    )


def rows_of(documents: range) -> TokenRows:
    """Rows by arithmetic alone: token t has t % 4 features of expert t % 4, strongest first."""
    columns: dict[str, list[int]] = {"document": [], "position": [], "token": [], "expert": []}
    ids, acts, offsets = [], [], [0]
    for document in documents:
        for position in range(LENGTHS[document]):
            t = 7 * document + position
            columns["document"].append(document)
            columns["position"].append(position)
            columns["token"].append(1000 + 13 * t)
            columns["expert"].append(t % 4)
            for j in range(t % 4):
                ids.append(12 * (t % 4) + (j if document == 2 else (t + 5 * j) % 12))
                acts.append(2.5 / (1 + j) + 37 * t % 256 / 64)
            offsets.append(len(ids))
    plain: dict[str, Any] = {name: np.array(column) for name, column in columns.items()}
    return TokenRows(
        **plain, offsets=np.array(offsets), ids=np.array(ids), acts=np.array(acts, np.float16)
    )


def write(folder: pathlib.Path) -> None:
    store = FeatureStore.create(folder, provenance())
    for first, last in SHARDS:
        store.append(first, last, rows_of(range(first, last + 1)))
    store.index()
    (folder / "index" / ".lock").unlink()


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_golden_store_reads_to_the_rows_it_was_made_from():
    store = FeatureStore(GOLDEN)

    store.verify()
    found = TokenRows.cat(list(store.rows()))
    want = rows_of(range(5))
    for name in ("document", "position", "token", "expert", "offsets", "ids", "acts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name), name)
    assert store.provenance == provenance()
    assert [(shard.first, shard.last) for shard in store.shards] == SHARDS
    dense = want.features(48).to_dense()
    np.testing.assert_allclose(store.density(), (dense > 0).numpy().mean(0))
    assert store.max_acts().tolist() == dense.amax(0).tolist()
    for feature in (0, 14, 24, 38, 41):
        hits = store.top_tokens(feature, 1 << 20, context=1)
        plain = [posting for posting in stores.postings(want) if posting[0] == feature]
        assert [(hit.feature, hit.act, hit.document, hit.position) for hit in hits] == plain
        for hit in hits:
            here = want.token[want.document == hit.document]
            low = max(0, hit.position - 1)
            assert hit.tokens == tuple(here[low : hit.position + 2])
    active = dense[dense[:, 38] > 0]
    for each in store.coactivation(38, 48, tokens=1 << 20):
        assert each.share == pytest.approx(float((active[:, each.feature] > 0).double().mean()))


def test_a_golden_feature_has_levels_as_the_format_says():
    table = pq.read_table(next(GOLDEN.glob("index/*/postings*"))).to_pydict()
    feature = 38
    at = [i for i, each in enumerate(table["feature"]) if each == feature]
    acts, exact, rows = ([table[name][i] for i in at] for name in ("act", "exact", "token_row"))
    want = rows_of(range(5))
    token = np.repeat(np.arange(len(want)), np.diff(want.offsets))
    mine = np.flatnonzero(want.ids == feature)
    ranked = sorted((-float(want.acts[i]), int(token[i])) for i in mine)
    count = len(ranked)
    pinned = {*range(64), *range(count - 16, count)}
    for quantile in (0.75, 0.5, 0.25):
        middle = round((1 - quantile) * (count - 1))
        pinned |= set(range(middle - 8, middle + 8))
    order = [(act, True, row) for i, (act, row) in enumerate(ranked) if i in pinned]
    level, low = 0, 64
    while low < count:
        high = min(count, low + max(64, min(low, count // 4)))
        ranks = [i for i in range(low, high) if i not in pinned]
        floor = [ranked[i][0] for i in ranks[-1:]]
        some = sorted((ranked[i][1] for i in ranks), reverse=level % 2 == 1)
        order += [(floor[0], False, row) for row in some]
        level, low = level + 1, high

    assert count == 600
    assert level == 5
    assert not all(exact)
    assert list(zip(acts, exact, rows, strict=True)) == [(-a, e, r) for a, e, r in order]


def test_columns_types_and_encodings_are_those_of_the_format():
    want = {
        "tokens/*": {
            "document": ("int64", "DELTA_BINARY_PACKED"),
            "position": ("int32", "DELTA_BINARY_PACKED"),
            "token": ("int32", "RLE_DICTIONARY"),
            "expert": ("uint16", "RLE_DICTIONARY"),
            "ids": ("list<element: uint16>", "BYTE_STREAM_SPLIT"),
            "acts": ("list<element: halffloat>", "PLAIN"),
        },
        "index/*/postings*": {
            "feature": ("int32", "DELTA_BINARY_PACKED"),
            "act": ("halffloat", "PLAIN"),
            "exact": ("bool", "RLE"),
            "token_row": ("int64", "DELTA_BINARY_PACKED"),
        },
    }
    for pattern, columns in want.items():
        found = sorted(GOLDEN.glob(pattern))
        assert found
        for path in found:
            types = pq.read_schema(path)
            assert {f.name: str(f.type) for f in types} == {n: t for n, (t, _) in columns.items()}
            group = pq.read_metadata(path).row_group(0)
            for at, (_, encoding) in enumerate(columns.values()):
                column = group.column(at)
                assert column.compression == "ZSTD"
                assert encoding in column.encodings
                assert column.statistics is not None


def test_the_seal_stands_where_parquet_readers_do_not_look():
    data = (GOLDEN / "tokens" / "tokens-000000000000-000000000002.parquet").read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    assert data[-8 - footer - 12 : -8 - footer - 8] == b"HFSW"


def test_what_is_written_today_is_byte_for_byte_the_golden_store(tmp_path):
    written_by = pq.read_metadata(GOLDEN / "tokens" / "tokens-000000000003-000000000004.parquet")
    if written_by.created_by.split()[-1] != pa.__version__:
        pytest.skip(f"written by {written_by.created_by}: another pyarrow may compress otherwise")
    write(tmp_path / "s")

    now, then = files(tmp_path / "s"), files(GOLDEN)

    assert list(now) == list(then)
    assert [name for name in now if now[name] != then[name]] == []


def test_the_versions_of_store_and_index_are_written_down():
    data = json.loads((GOLDEN / "store.json").read_text())
    assert (data["format"], data["version"]) == ("hf_switch_sae feature store", 1)
    data = json.loads(next(GOLDEN.glob("index/*/index.json")).read_text())
    assert data["version"] == 2
    assert data["shards"] == [
        [shard.path.name, shard.size, tokens]
        for shard, tokens in zip(FeatureStore(GOLDEN).shards, (2405, 41), strict=True)
    ]


@pytest.mark.parametrize("version", [1, 3])
def test_an_index_of_another_version_is_refused_and_left_alone(tmp_path, version):
    shutil.copytree(GOLDEN, tmp_path / "s")
    path = next(tmp_path.glob("s/index/*/index.json"))
    path.write_text(path.read_text().replace('"version": 2', f'"version": {version}'))
    with pytest.raises(StoreError, match=f"of version {version}, and this package reads version 2"):
        FeatureStore(tmp_path / "s").top_tokens(0)
    assert path.exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder) / "s")
        shutil.rmtree(GOLDEN, ignore_errors=True)
        shutil.copytree(pathlib.Path(folder) / "s", GOLDEN)
    sys.exit()

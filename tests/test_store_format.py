"""The format of a store, pinned: bytes in `golden_store/` that every later version must read.

Written by `python tests/test_store_format.py`; never write it again for the same format version.
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

from hf_switch_sae import FeatureStore
from hf_switch_sae.store import Provenance, TokenRows

GOLDEN = pathlib.Path(__file__).parent / "golden_store"
LENGTHS = {0: 5, 1: 0, 2: 9, 3: 4, 4: 1}
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
                ids.append(12 * (t % 4) + (t + 5 * j) % 12)
                acts.append(2.5 / (1 + j) + (t % 3))
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
    hits = store.top_tokens(14, 9, context=1)
    at = [(hit.act, hit.document, hit.position, hit.tokens, hit.at) for hit in hits]
    dense = want.features(48).to_dense()[:, 14]
    assert [act for act, *_ in at] == sorted(dense[dense > 0].tolist(), reverse=True)
    np.testing.assert_allclose(store.density(), (want.features(48).to_dense() > 0).numpy().mean(0))


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
            "document": ("int64", "DELTA_BINARY_PACKED"),
            "position": ("int32", "DELTA_BINARY_PACKED"),
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


def test_store_json_names_its_format_and_version():
    data = json.loads((GOLDEN / "store.json").read_text())
    assert (data["format"], data["version"]) == ("hf_switch_sae feature store", 1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder) / "s")
        shutil.rmtree(GOLDEN, ignore_errors=True)
        shutil.copytree(pathlib.Path(folder) / "s", GOLDEN)
    sys.exit()

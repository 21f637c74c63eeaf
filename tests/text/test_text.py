"""Documents from whatever holds text, under numbers that never change, and batches of tokens."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_switch_sae import TextError
from hf_switch_sae.text import documents as texts
from hf_switch_sae.text.documents import Document, read_documents
from hf_switch_sae.text.windows import batches_of, windows_of

TEXTS = ["One day.", "", "Two\n\ndays, and a night: été.", "x" * 50]


def found(documents) -> list[str]:
    assert [each.number for each in documents] == list(range(len(list(documents))))
    return [each.text for each in documents]


@pytest.fixture
def folder(tmp_path):
    table = pa.table({"id": range(4), "text": TEXTS})
    pq.write_table(table, tmp_path / "c.parquet")
    lines = [json.dumps({"text": each}) for each in TEXTS]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "a.txt").write_text(TEXTS[2], encoding="utf-8")
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_each_kind_of_file_gives_its_documents_in_order(folder):
    assert found(read_documents(folder / "c.parquet")) == TEXTS
    assert found(read_documents(str(folder / "b.jsonl"))) == TEXTS
    assert found(read_documents(folder / "a.txt")) == [TEXTS[2]]
    assert found(read_documents([folder / "c.parquet", folder / "a.txt"])) == [*TEXTS, TEXTS[2]]
    assert found(read_documents([str(folder / "a.txt")])) == [TEXTS[2]]


def test_a_folder_is_its_files_in_order_of_their_names(folder):
    assert found(read_documents(folder)) == [TEXTS[2], *TEXTS, *TEXTS]
    assert read_documents(folder).count is not None
    names = [file["name"] for file in read_documents(folder).provenance["files"]]
    assert names == ["a.txt", "b.jsonl", "c.parquet"]


def test_a_file_edited_in_place_to_equal_size_is_another_at_its_begin_and_end(tmp_path):
    path = tmp_path / "a.txt"
    seen = set()
    for text in ("ab" * 3, "ab" + "xb" + "ab", "x" + "y" * (3 << 20), "z" + "y" * (3 << 20)):
        for end in "xz":
            path.write_text(text + end)
            (file,) = read_documents(path).provenance["files"]
            seen.add((file["bytes"], file["sha256"]))
    assert len(seen) == 8
    assert len({size for size, _ in seen}) == 2


def test_a_long_text_file_is_several_documents_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_CHARACTERS", 100)
    lines = [f"line {i}\n" for i in range(60)]
    (tmp_path / "a.txt").write_text("".join(lines))

    parts = found(read_documents(tmp_path / "a.txt"))

    assert "".join(parts) == "".join(lines)
    assert len(parts) > 3
    assert all(part.endswith("\n") and len(part) < 120 for part in parts)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_streamed_or_not_gives_its_rows(streaming):
    data = datasets.Dataset.from_dict({"body": TEXTS, "other": [1, 2, 3, 4]})
    data = data.to_iterable_dataset() if streaming else data

    documents = read_documents(data, column="body")

    assert found(documents) == TEXTS
    assert found(documents) == TEXTS  # again from the beginning
    assert json.dumps(documents.provenance)
    with pytest.raises(TextError, match=r"no column 'text'; it has body, other"):
        read_documents(data)


def test_lists_of_texts_and_of_token_ids_and_their_identity():
    assert found(read_documents(TEXTS)) == TEXTS
    ids = read_documents([[1, 2], torch.tensor([3]), (4,)])
    assert found(ids) == [[1, 2], [3], [4]]
    assert read_documents(TEXTS).provenance == read_documents(list(TEXTS)).provenance
    assert read_documents(TEXTS).provenance != read_documents(TEXTS[:3]).provenance


def test_none_is_a_document_without_tokens_and_keeps_its_number():
    data = datasets.Dataset.from_dict({"text": ["a", None, "b"]})
    assert found(read_documents(data)) == ["a", [], "b"]


@pytest.mark.parametrize(
    ("dataset", "options", "says"),
    [
        ("nowhere.parquet", {}, "no file or folder"),
        ("c.parquet", {"column": "body"}, "no column 'body'; it has id, text"),
        ("ignored.png", {}, "none of .txt, .md, .jsonl, .parquet"),
        ("empty", {}, "no .txt"),
        ("broken.parquet", {}, "no Parquet file"),
        ({"train": []}, {}, r"dataset\['train'\]"),
        (7, {}, "can't read documents from int"),
    ],
)
def test_what_can_not_be_read_is_an_error_before_anything_is(folder, dataset, options, says):
    (folder / "empty").mkdir()
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    given = folder / dataset if isinstance(dataset, str) else dataset
    with pytest.raises(TextError, match=says):
        read_documents(given, **options)


def test_a_bad_line_or_row_names_itself(folder):
    (folder / "d.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(TextError, match=r"d\.jsonl, line 2"):
        list(read_documents(folder / "d.jsonl"))
    (folder / "d.jsonl").write_text('{"body": "a", "title": "b"}\n')
    with pytest.raises(TextError, match="line 1: no column 'text'; it has body, title"):
        list(read_documents(folder / "d.jsonl"))
    (folder / "d.jsonl").write_text('["text"]\n')
    with pytest.raises(TextError, match="line 1: no JSON object, but list"):
        list(read_documents(folder / "d.jsonl"))
    (folder / "e.txt").write_bytes(b"ok\n\xff\xfe")
    with pytest.raises(TextError, match=r"e\.txt is not UTF-8"):
        list(read_documents(folder / "e.txt"))
    with pytest.raises(TextError, match="document 1 holds True or False"):
        list(read_documents([[4, 5], [7, True]]))
    with pytest.raises(TextError, match="document 1 is int"):
        list(read_documents(["a", 3]))


def test_a_hub_id_that_can_not_be_reached_is_an_error_that_names_it():
    with pytest.raises(TextError, match=r"'nobody/nothing'.*can't be opened"):
        read_documents("nobody/nothing")


def tokenizer(batch, **_):
    return {"input_ids": [[ord(letter) for letter in each] for each in batch]}


def test_windows_cover_every_token_once_with_its_position():
    documents = [Document(3, "abcdefg"), Document(5, ""), Document(6, [7, 8])]

    windows = windows_of(documents, tokenizer, 3)

    assert [(w.document, w.start, len(w.tokens)) for w in windows] == [
        (3, 0, 3), (3, 3, 3), (3, 6, 1), (6, 0, 2),
    ]  # fmt: skip
    assert [t for w in windows[:3] for t in w.tokens] == [ord(c) for c in "abcdefg"]
    with pytest.raises(TextError, match="tokenizer is needed"):
        windows_of(documents, None, 3)


@pytest.mark.parametrize("prefix", [(), (99, 98)])
def test_batches_hold_every_token_at_its_place_and_waste_little(prefix):
    documents = [Document(i, list(range(100, 100 + n))) for i, n in enumerate([5, 30, 1, 17, 16])]
    windows = windows_of(documents, None, 16)
    seen, padding = {}, 0
    widths = []
    for batch in batches_of(windows, 40, pad=7, prefix=prefix):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        widths.append(ids.shape[1])
        assert ids.numel() <= 40
        assert (ids[mask == 0] == 7).all()
        assert ids[:, : len(prefix)].tolist() == [list(prefix)] * len(ids)
        assert ((batch.position >= 0) <= (mask == 1)).all()
        padding += int((mask == 0).sum())
        for at in (batch.position >= 0).nonzero().tolist():
            place = int(batch.document[tuple(at)]), int(batch.position[tuple(at)])
            assert place not in seen
            seen[place] = int(ids[tuple(at)])

    assert seen == {(d.number, i): t for d in documents for i, t in enumerate(d.text)}
    assert widths == sorted(widths, reverse=True)
    assert padding < 0.4 * len(seen)

"""What is written stands at its place whole or not at all, and leaves nothing beside it."""

import errno
import json
import os
import socket

import pytest
from helpers.saes import make

from hf_switch_sae import Recipe, Steer, export, export_recipe
from hf_switch_sae.files import (
    LEFT_OVER,
    remove_leftovers,
    rounded,
    write_json,
    write_once,
    written_beside,
)


def test_a_file_replaces_what_was_there_when_all_of_it_is_written(tmp_path):
    place = tmp_path / "deeper" / "file"
    for content in ("first", "second"):
        with written_beside(place) as beside:
            beside.write_text(content)
            assert LEFT_OVER.fullmatch(beside.name)
            assert not place.exists() or place.read_text() == "first"
        assert place.read_text() == content
    assert list(place.parent.iterdir()) == [place]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path):
    with written_beside(tmp_path / "new") as beside:
        (beside / "in").mkdir(parents=True)
        (beside / "in" / "file").write_text("x")
        assert list(tmp_path.iterdir()) == [beside]
    assert (tmp_path / "new" / "in" / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_raised_while_writing_leaves_everything_as_it_was(tmp_path, folder):
    place = tmp_path / "place"
    if not folder:
        place.write_text("before")

    def write():
        with written_beside(place) as beside:
            if folder:
                beside.mkdir()
            (beside / "half" if folder else beside).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == (
        [] if folder else [(place, "before")]
    )


def test_a_folder_that_is_there_is_never_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")

    def write():
        with written_beside(tmp_path / "there") as beside:
            beside.mkdir()

    with pytest.raises(OSError, match="there"):
        write()
    assert (tmp_path / "there" / "mine").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_json_is_written_with_the_arguments_of_dumps(tmp_path):
    write_json(tmp_path / "new" / "file.json", {"b": "é", "a": [1]}, indent=1, sort_keys=True)
    text = (tmp_path / "new" / "file.json").read_text(encoding="utf-8")
    assert text == json.dumps({"a": [1], "b": "é"}, indent=1) + "\n"


@pytest.mark.parametrize("has_links", [True, False])
def test_the_first_of_several_writers_wins_and_the_others_leave_nothing(
    tmp_path, monkeypatch, has_links
):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    for data in (b"first", b"second"):
        write_once(tmp_path / "file", data)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_only_floats_are_rounded_however_deep_they_lie():
    told = {"a": 1.23456789, "count": 1234567, "rows": [(0.1234567, "x", None, True)]}
    assert rounded(told) == {"a": 1.2346, "count": 1234567, "rows": [[0.12346, "x", None, True]]}


WRITERS = {
    "recipe": lambda place: Recipe("org/sae", (Steer(1, unit="raw"),)).save(place),
    "steering": lambda place: export_recipe(
        Recipe("org/sae", (Steer(1, unit="raw"),)), make(), place.with_suffix(".pt"), module="h.1"
    ),
    "export": lambda place: export(make("plain_topk"), place, "sparsify"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing_behind(tmp_path, name, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_switch_sae.files.sync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](tmp_path / "place")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    WRITERS[name](tmp_path / "place")
    assert len(list(tmp_path.iterdir())) == 1


def test_leftover_files_and_folders_go_and_what_a_leftover_link_leads_to_stays(tmp_path):
    ended = 2**22 + 1  # above the largest process id that Linux gives
    name = f".tmp-{socket.gethostname()}-{ended}-0000000{{}}".format
    (tmp_path / name(1)).write_text("half")
    (tmp_path / name(2) / "deep").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / name(3)).symlink_to(tmp_path / "mine")
    ours = tmp_path / f".tmp-{socket.gethostname()}-{os.getpid()}-00000004"
    ours.mkdir()

    remove_leftovers(tmp_path)

    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "mine", ours])

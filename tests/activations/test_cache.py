"""Activations on disk: what is in a cache, killed and gone on with, read back in order."""

import errno
import itertools
import json
import os
import random
import shutil
import time

import pytest
import torch
from helpers import stores, tiny
from helpers.activations import DOCUMENTS, in_order, settings, tokenizer
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_switch_sae import BaseModelError, HookpointError, StoreError, TextError
from hf_switch_sae.activations.cache_reader import CachedActivations
from hf_switch_sae.activations.cache_writer import cache_activations
from hf_switch_sae.activations.harvest import Harvest
from hf_switch_sae.cli.app import app

PLACES = ["layers.0.resid_post", "layers.2.resid_post"]
PLACE = PLACES[1]
ROW = 2 * 2 * tiny.DIM  # of both hookpoints, in bfloat16
OPTIONS = {"settings": settings(dtype="bfloat16"), "shard_bytes": 50 * ROW, "progress": False}


def harvest(folder, lm=None, hookpoints=PLACES, documents=DOCUMENTS, **changes):
    return cache_activations(
        lm or tiny.llama(), hookpoints, documents, folder, **{**OPTIONS, **changes}
    )


def contents(folder):
    """Every tensor of a cache, file by file."""
    return {path.name: load_file(path) for path in sorted(folder.glob("rows-*.safetensors"))}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[file].keys() == b[file].keys()
        and all(torch.equal(a[file][n], b[file][n]) for n in a[file])
        for file in a
    )


def manifest(folder):
    return json.loads((folder / "cache.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return harvest(tmp_path_factory.mktemp("cache") / "c")


def edited(folder, tmp_path, **changes):
    """A copy of a cache whose cache.json says other things; None leaves one out."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    told = {**manifest(copy), **changes}
    told = {name: value for name, value in told.items() if value is not None}
    (copy / "cache.json").write_text(json.dumps(told))
    return copy


# --- what is in it ------------------------------------------------------------------------------


def test_a_cache_holds_the_rows_of_the_live_passes_and_their_tokens_in_order(folder):
    live = Harvest(tiny.llama(), PLACES, DOCUMENTS, None, settings())
    passes = list(live.passes(live.contexts(epochs=1)))
    files = contents(folder).values()
    assert len(files) > 3
    for name in PLACES:
        found = torch.cat([file[name] for file in files])
        want = torch.cat([each.rows[name] for each in passes]).bfloat16()
        assert torch.equal(found, want)
    tokens = torch.cat([file["token_ids"] for file in files])
    assert torch.equal(tokens, torch.cat([each.token_ids for each in passes]).int())


def test_the_manifest_says_what_the_rows_are(folder):
    told = manifest(folder)
    assert told["format"] == "hf_switch_sae activations"
    assert told["version"] == 1
    assert told["hookpoints"] == PLACES
    assert told["hidden_size"] == dict.fromkeys(PLACES, tiny.DIM)
    assert told["lm"]["fingerprint"]["model_type"] == "llama"
    assert told["lm"]["dtype"] == "float32"
    assert told["dataset"]["kind"] == "list"
    assert told["policy"]["skip_first"] is True
    files = contents(folder)
    rows = sum(len(file["token_ids"]) for file in files.values())
    assert told["complete"]["rows"] == rows
    assert told["complete"]["shards"] == len(files)
    assert told["complete"]["stopped_by"] == "text"
    assert str(folder) not in (folder / "cache.json").read_text()


def test_outlier_norms_are_kept_and_a_resume_does_not_measure_them_anew(tmp_path):
    options = {"settings": settings(dtype="float32", outlier_factor=6.0)}
    harvest(tmp_path / "c", max_rows=60, **options)
    told = manifest(tmp_path / "c")
    assert set(told["outlier_norm"]) == set(PLACES)
    told["outlier_norm"] = dict.fromkeys(PLACES, 1e-3)
    (tmp_path / "c" / "cache.json").write_text(json.dumps(told))
    before = contents(tmp_path / "c")
    harvest(tmp_path / "c", **options)
    assert same(contents(tmp_path / "c"), before)  # the rest are outliers by what the cache says
    assert CachedActivations(tmp_path / "c", PLACE).policy["outlier_norm"] == {PLACE: 1e-3}


# --- going on -----------------------------------------------------------------------------------


def test_a_harvest_in_steps_is_a_harvest_in_one(folder, tmp_path):
    for limit in (1, 60, 60, 130, None):
        harvest(tmp_path / "c", max_rows=limit)
        found = CachedActivations(tmp_path / "c")
        assert found.manifest["complete"]["stopped_by"] == ("max_rows" if limit else "text")
        assert limit is None or limit <= found.num_rows <= limit + 64
    for name in [*PLACES, "token_ids"]:
        one, steps = (
            torch.cat([file[name] for file in contents(each).values()])
            for each in (folder, tmp_path / "c")
        )
        assert torch.equal(one, steps)


def test_files_stay_within_the_byte_budget_and_a_larger_one_goes_on(folder, tmp_path):
    whole = manifest(folder)["complete"]["bytes"]
    budget = whole // 2
    harvest(tmp_path / "c", max_bytes=budget)
    used = sum(path.stat().st_size for path in (tmp_path / "c").glob("rows-*"))
    assert budget / 2 < used <= budget
    assert manifest(tmp_path / "c")["complete"]["stopped_by"] == "max_bytes"
    harvest(tmp_path / "c")
    assert CachedActivations(tmp_path / "c").num_rows == CachedActivations(folder).num_rows
    with pytest.raises(StoreError, match="leaves no room for a pass"):
        harvest(tmp_path / "d", max_bytes=100)


def harvest_all(path, started):
    torch.set_num_threads(1)
    lm = tiny.llama()
    started.set()
    harvest(path, lm, documents=DOCUMENTS * 12)


def test_killed_10_times_while_harvesting_it_goes_on_to_the_very_same_rows(tmp_path):
    started = stores.forks().Event()
    process = stores.forks().Process(target=harvest_all, args=(tmp_path / "whole", started))
    process.start()
    assert started.wait(60)
    begin = time.monotonic()
    process.join()
    within = 0.4 * (time.monotonic() - begin)
    started.clear()
    want = contents(tmp_path / "whole")
    assert len(want) > 30
    path = tmp_path / "c"

    def after_each():
        found = contents(path)
        assert same(found, {file: want[file] for file in found})

    kills = stores.kill_at_random(
        harvest_all, (path, started), within, 10, after_each, lambda: shutil.rmtree(path)
    )

    assert kills == 10
    assert same(contents(path), want)
    assert manifest(path) == manifest(tmp_path / "whole")
    assert not list(path.glob(".tmp-*"))


def test_a_full_disk_is_an_error_and_what_was_written_is_gone_on_with(
    folder, tmp_path, monkeypatch
):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(1)
        if len(calls) == 7:  # of a file, then of its folder, and cache.json comes first
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"rows-0000000\d\.safetensors: the disk is full"):
        harvest(tmp_path / "c")
    monkeypatch.undo()
    assert 0 < len(contents(tmp_path / "c")) < len(contents(folder))
    with pytest.raises(StoreError, match="unfinished"):
        CachedActivations(tmp_path / "c")
    harvest(tmp_path / "c")
    assert same(contents(tmp_path / "c"), contents(folder))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"documents": DOCUMENTS[1:]}, StoreError, "something else: dataset differ"),
        ({"hookpoints": PLACES[:1]}, StoreError, "hookpoints, hidden_size differ"),
        ({"settings": settings(dtype="float32")}, StoreError, "something else: dtype differ"),
        ({"settings": settings(context=8)}, StoreError, "something else: policy"),
        ({"lm": tiny.llama(seed=1)}, BaseModelError, "another language model"),
        ({"lm": tiny.llama().bfloat16()}, StoreError, "the language model's dtype differ"),
        ({"documents": []}, TextError, "data set is empty"),
    ],
)
def test_a_cache_of_something_else_is_not_gone_on_with(folder, changes, error, says):
    before = contents(folder), manifest(folder)
    with pytest.raises(error, match=says):
        harvest(folder, **changes)
    assert same(contents(folder), before[0])
    assert manifest(folder) == before[1]


def test_a_folder_of_other_things_is_not_written_to(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(StoreError, match=r"holds other things \(thesis\.txt\)"):
        harvest(tmp_path)
    with pytest.raises(StoreError, match="is a file"):
        harvest(tmp_path / "thesis.txt")


# --- reading ------------------------------------------------------------------------------------


def rows_of(folder, place=PLACE):
    return torch.cat([file[place] for file in contents(folder).values()])


@pytest.mark.parametrize("buffer_rows", [10_000, 100, 1], ids=["all", "some files", "one file"])
def test_each_epoch_has_every_row_once_in_another_order(folder, buffer_rows):
    activations = CachedActivations(folder, PLACE, buffer_bytes=buffer_rows * ROW // 2)
    found = torch.cat([batch[PLACE] for batch in activations.batches(1, epochs=2)])
    first, second = found.chunk(2)
    want = in_order(rows_of(folder).float())
    assert torch.equal(in_order(first.float()), want)
    assert torch.equal(in_order(second.float()), want)
    assert not torch.equal(first, second)
    assert found.dtype == torch.bfloat16
    assert activations.num_rows == len(first)


@pytest.mark.parametrize("buffer_rows", [10_000, 100])
def test_after_a_resume_the_very_same_batches_follow(folder, buffer_rows):
    def make(**changes):
        return CachedActivations(folder, **{"buffer_bytes": buffer_rows * ROW, **changes})

    activations = make()
    states, batches = [activations.state_dict()], []
    for batch in itertools.islice(activations.batches(7, epochs=3), 100):
        batches.append(batch)
        states.append(activations.state_dict())
    for at in [0, *random.Random(1).sample(range(len(states)), 10), len(states) - 1]:
        resumed = make(buffer_bytes=77 * ROW)  # the machine may have other memory
        resumed.load_state_dict(json.loads(json.dumps(states[at])))
        follow = list(itertools.islice(resumed.batches(7, epochs=3), len(batches) - at))
        assert len(follow) == len(batches) - at
        for a, b in zip(follow, batches[at:], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in PLACES)
    with pytest.raises(StoreError, match="seed"):
        make(seed=1).load_state_dict(states[0])


def test_ranks_with_half_the_batch_see_the_rows_of_one(folder):
    alone = list(CachedActivations(folder, buffer_bytes=100 * ROW).batches(12, epochs=2))
    parts = [
        list(CachedActivations(folder, buffer_bytes=100 * ROW).batches(6, rank, 2, epochs=2))
        for rank in range(2)
    ]
    assert len(alone) == len(parts[0]) == len(parts[1]) > 20
    for batch, *halves in zip(alone, *parts, strict=True):
        for name in PLACES:
            assert torch.equal(batch[name], torch.cat([half[name] for half in halves]))


def test_a_sample_is_from_all_over_the_cache_and_leaves_the_cursor(folder):
    activations = CachedActivations(folder, PLACE)
    rows = rows_of(folder).float()
    sample = activations.sample(60)[PLACE]
    assert sample.dtype == torch.float32
    place = sorted({int((rows - row).abs().sum(-1).argmin()) for row in sample})
    assert len(place) == len(sample) == 60
    assert place[0] < len(rows) // 4
    assert place[-1] > 3 * len(rows) // 4
    assert activations.state_dict()["done"] == 0
    everything = activations.sample(10**6)[PLACE]
    assert torch.equal(in_order(everything), in_order(rows))
    assert json.dumps(activations.estimate())


def test_places_are_named_as_the_model_or_the_cache_has_them(folder):
    lm = tiny.llama()
    assert CachedActivations(folder).hookpoints == tuple(PLACES)
    for at in (2, PLACE, [2, PLACE]):
        assert CachedActivations(folder, at, lm=lm).hookpoints == (PLACE,)
        assert CachedActivations(folder, at).hookpoints == (PLACE,)
    assert CachedActivations(folder, "model.layers.2", lm=lm).hookpoints == (PLACE,)
    with pytest.raises(HookpointError, match=r"no activations of 1; it has layers\.0"):
        CachedActivations(folder, 1)


def test_a_cache_of_another_model_or_revision_is_an_error(folder, tmp_path):
    CachedActivations(folder, lm=tiny.llama().bfloat16())
    with pytest.raises(BaseModelError, match="another language model"):
        CachedActivations(folder, lm=tiny.llama(seed=1))
    lm = {**manifest(folder)["lm"], "revision": "abc"}
    pinned = edited(folder, tmp_path, lm=lm)
    CachedActivations(pinned, lm=tiny.llama(), lm_revision="abc")
    for lm in (tiny.llama(), None):
        with pytest.raises((BaseModelError, StoreError), match="of revision abc"):
            CachedActivations(pinned, lm=lm, lm_revision="def")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "a cache of version 2; this package reads version 1"),
        ({"format": "store"}, "is not of a cache"),
        ({"policy": None}, "does not say policy"),
        ({"complete": None}, "unfinished"),
    ],
)
def test_another_format_is_an_error(folder, tmp_path, changes, says):
    with pytest.raises(StoreError, match=says):
        CachedActivations(edited(folder, tmp_path, **changes))


def test_no_cache_and_broken_manifests_are_errors(folder, tmp_path):
    with pytest.raises(StoreError, match=r"there is no cache\.json"):
        CachedActivations(tmp_path / "nowhere")
    copy = edited(folder, tmp_path)
    (copy / "cache.json").write_text("{")
    with pytest.raises(StoreError, match="can't be read"):
        CachedActivations(copy)


def test_a_missing_cut_or_flipped_file_is_an_error(folder, tmp_path):
    copy = edited(folder, tmp_path)
    names = sorted(path.name for path in copy.glob("rows-*"))
    middle, last = copy / names[2], copy / names[-1]
    data = middle.read_bytes()

    middle.unlink()
    with pytest.raises(StoreError, match=r"rows-00000002\.safetensors is missing"):
        CachedActivations(copy)
    middle.write_bytes(data[:-5])
    with pytest.raises(StoreError, match=r"rows-00000002\.safetensors is damaged"):
        CachedActivations(copy)
    middle.write_bytes(data[:-5] + b"?????")
    activations = CachedActivations(copy)
    with pytest.raises(StoreError, match=r"rows-00000002\.safetensors is damaged: the checksum"):
        list(activations.batches(7, epochs=1))
    middle.write_bytes(data)
    list(CachedActivations(copy).batches(7, epochs=1))
    last.unlink()
    with pytest.raises(StoreError, match="lacks files"):
        CachedActivations(copy)
    harvest(copy)
    assert same(contents(copy), contents(folder))


# --- the command --------------------------------------------------------------------------------


def test_the_command_makes_a_cache_and_says_how_large_it_is(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "lm")
    tokenizer("<s> $A", bos_token="<s>").save_pretrained(tmp_path / "lm")
    (tmp_path / "a.txt").write_text("the ship sailed across the old sea\n" * 40)
    arguments = ["cache", tmp_path / "lm", tmp_path / "a.txt", "--to", tmp_path / "c"]
    arguments += ["--layer", 2, "--layer", "layers.1.resid_pre", "--context", 16]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.exception
    found = CachedActivations(tmp_path / "c", lm=tiny.llama())
    assert found.hookpoints == ("layers.2.resid_post", "layers.1.resid_pre")
    assert f"{found.num_rows:,} tokens at layers.2.resid_post" in result.output

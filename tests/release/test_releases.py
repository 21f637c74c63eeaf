"""Releases over HTTP with the real client: pushed, pulled, pinned, cut off, refused, offline.

One client process goes through `release_client`'s steps in order, another through those without a
network; each test looks at one outcome.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from helpers.foreign_layouts import LAYOUTS
from helpers.hub_server import Hub
from helpers.release_client import BIG, BIG_SHA, PUSH_FAULTS, REPO, A, B
from helpers.saes import config

from hf_switch_sae import SwitchSAE

TESTS = pathlib.Path(__file__).parents[1]


def run(hub: Hub, tmp: pathlib.Path, mode: str) -> dict:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp / "home"),
        "HF_HUB_OFFLINE": "1" if mode == "offline" else "0",
        "HF_HUB_DISABLE_XET": "1",  # that upload protocol needs a server of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    }
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "release_client.py"), mode, str(tmp / "work")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Outcomes by step, and the Hub as it then was."""
    tmp = tmp_path_factory.mktemp("releases")
    (tmp / "work").mkdir()
    sparsify, qwen = LAYOUTS["sparsify"](tmp)[0], LAYOUTS["qwen_scope"](tmp)[0]
    foreign = {f"layers.10/{path.name}": path.read_bytes() for path in sparsify.iterdir()}
    foreign["layer12.sae.pt"] = (qwen / "layer12.sae.pt").read_bytes()
    with Hub() as hub:
        hub.tag("org/foreign", "v1", hub.upload("org/foreign", foreign))
        hub.upload("org/foreign", {"layers.10/cfg.json": b"{}"})  # what v1 is not
        wide = SwitchSAE(config(hidden_size=256, num_features=2400))
        wide.statistics_tokens.fill_(7)
        wide.save_pretrained(tmp / "wide")
        hub.upload("org/wide", {path.name: path.read_bytes() for path in (tmp / "wide").iterdir()})
        scale = LAYOUTS["scale_sae"](tmp)[0]
        held = {**torch.load(scale / "ae.pt"), "expert_modules.wide": torch.zeros(1 << 19)}
        torch.save(held, scale / "ae.pt")
        hub.upload("org/pickled", {f"a/{path.name}": path.read_bytes() for path in scale.iterdir()})
        hub.upload("org/evil", {"../evil.txt": b"x", "config.json": b"{}"})
        hub.upload("org/big", {"big.bin": BIG, "whole.bin": BIG[:5000]})
        hub.create("org/gated", gated=True)
        hub.upload("org/gated", {"config.json": b"{}"})
        online = run(hub, tmp, "online")
        before = len(hub.requests)
        offline = run(hub, tmp, "offline")
        yield {**online, **offline, "hub": hub, "asked_offline": hub.requests[before:]}


def held(done, repo: str, commit: str) -> dict[str, str]:
    return {name: data.hex() for name, data in done["hub"].repos[repo].commits[commit].items()}


def test_a_pull_gives_the_very_bytes_and_names_the_commit(done):
    pulled = done["pull_again"]
    assert pulled["revision"] == done["push_saes"]
    assert pulled["files"] == held(done, REPO, done["push_saes"])
    assert {f"{A}/model.safetensors", f"{B}/config.json", "recipes/calm.json", "README.md"} <= set(
        pulled["files"]
    )
    assert done["hub"].repos[REPO].private


def test_a_folder_that_was_pushed_is_the_one_that_is_pulled(done):
    pushed, pulled = done["push_folder"], done["pull_second"]
    mine = pulled["files"].pop("mine.txt")
    assert pulled == pushed
    assert bytes.fromhex(mine) == b"of the user"


def test_an_older_revision_replaces_a_newer_and_leaves_what_is_the_users(done):
    pulled = dict(done["pull_older_over_it"]["files"])
    assert pulled.pop("mine.txt")
    assert pulled == held(done, REPO, done["push_saes"])
    assert "notes.txt" in held(done, REPO, done["push_folder"]["revision"])


def test_a_file_of_an_earlier_pull_that_was_changed_since_is_left(done):
    assert done["pull_over_changes"] == "changed by the user"


def test_the_marked_part_of_a_card_is_renewed_and_a_persons_words_stay(done):
    card = bytes.fromhex(done["push_folder"]["files"]["README.md"]).decode()
    assert "A person's words." in card
    assert "broken" not in card
    assert f"subfolder={A!r}".replace("'", '"') in card


def test_one_subfolder_comes_with_the_files_beside_it_alone(done):
    assert done["pull_one"] == ["README.md", f"{B}/config.json", f"{B}/model.safetensors"]


def test_all_saes_of_a_release_and_the_auto_class_load_at_a_revision(done):
    assert done["load_all_older"] is True
    assert done["auto_model"] is True


def test_what_is_saved_carries_the_commit_it_was_loaded_at(done):
    commit = done["push_folder"]["revision"]
    assert done["pinned"]["config"] == {"repo": REPO, "revision": commit, "path": A}
    assert done["pinned"]["recipe"]["revision"] == commit
    assert done["pinned"]["recipe"]["sae"] == REPO


def test_recipes_are_published_and_fetched_by_name(done):
    calm = {"edit": "Steer", "features": [1], "strength": 0.5}
    assert done["recipes"]["calm"] == {"sae": REPO, "hookpoint": A, "edits": [calm]}
    assert "has no such file" in done["recipes"]["missing"]
    assert "no name for a recipe" in done["recipes"]["climbs"]


def test_a_branch_is_made_and_pulled(done):
    assert done["branch"] is True


def test_an_upload_that_is_cut_off_is_sent_again(done):
    assert done["upload_is_cut_off"] == {
        "puts": 2,
        "same": True,
        "commit": done["upload_is_cut_off"]["commit"],
    }


def test_a_push_that_failed_half_way_commits_nothing_and_sends_only_the_rest_next_time(done):
    outcome = done["upload_goes_on"]
    first, again = outcome["puts"]
    assert outcome["error"].startswith("HubError: could not push to org/three")
    assert outcome["committed"] is False
    assert len(first) == 2
    assert again == [first[1]]  # the third has the weights of another one here, and is known


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(done):
    outcome = done["download_is_cut_off"]
    assert outcome["sha256"] == BIG_SHA
    assert f"GET /cdn/{BIG_SHA} bytes={10 * 2**20}-" in outcome["asked"]


def test_a_pull_that_failed_leaves_no_half_file_and_fetches_only_the_rest_next_time(done):
    outcome = done["download_goes_on"]
    assert outcome["error"].startswith("HubError: could not pull org/big")
    assert "HTTP 403" in outcome["error"]
    assert outcome["left"] == ["whole.bin"]
    assert outcome["asked"] == [f"GET /cdn/{BIG_SHA}"]
    assert outcome["sha256"] == BIG_SHA


def test_a_repository_is_inspected_without_reading_its_weights(done):
    outcome = done["inspect_remote"]
    assert outcome["same"]
    assert outcome["revision"] == done["push_saes"]
    for words in ("24 features in 4 expert(s), jumprelu", "fvu 0.2", "W_enc: F32 [4, 6, 16]"):
        assert words in outcome["text"]
    assert len(outcome["infos"]) == 2  # ours and the client's own; no more for the second SAE
    assert outcome["wide"]["statistics_tokens"] == 7
    repo = done["hub"].repos["org/wide"]
    whole = len(repo.commits[repo.refs["main"]]["model.safetensors"])
    assert sum(asked_for(outcome)) < whole / 3


def test_a_pickled_checkpoint_is_named_without_fetching_its_tensors(done):
    outcome = done["inspect_pickled"]
    assert outcome["formats"] == [["a", "scale_sae"]]
    repo = done["hub"].repos["org/pickled"]
    whole = len(repo.commits[repo.refs["main"]]["a/ae.pt"])
    assert sum(asked_for(outcome)) < whole / 3


def asked_for(outcome) -> list[int]:
    """Bytes of each request to where large files lie; never is a whole file asked for."""
    lines = [line for line in outcome["asked"] if line.startswith("GET /cdn/")]
    ranges = [re.search(r"bytes=(\d+)-(\d+)", line) for line in lines]
    assert ranges
    assert all(ranges), "a whole file was asked for"
    return [int(found[2]) - int(found[1]) + 1 for found in ranges]


def test_a_foreign_checkpoint_is_converted_at_its_revision(done):
    commit = done["hub"].repos["org/foreign"].refs["v1"]
    assert done["foreign"]["source"] == {
        **{"repo": "org/foreign", "revision": commit},
        **{"path": "layers.10", "format": "sparsify"},
    }
    assert done["foreign"]["hookpoint"] == "layers.10.resid_post"


def test_a_published_conversion_keeps_what_it_was_taken_from(done):
    commit = done["hub"].repos["org/foreign"].refs["v1"]
    origin = {"repo": "org/foreign", "revision": commit, "path": "layers.10", "format": "sparsify"}
    for source, repo in zip(done["converted_and_published"], ("org/ours", "org/copy"), strict=True):
        revision = done["hub"].repos[repo].refs["main"]
        assert source == {"repo": repo, "revision": revision, "taken_from": origin}


def test_what_a_foreign_repository_does_not_tell_is_passed_to_from_pretrained(done):
    outcome = done["foreign_with_an_argument"]
    assert "pass k=" in outcome["lacks"]
    assert (outcome["k"], outcome["hookpoint"]) == (5, "layers.12.resid_post")


def test_where_there_is_nothing_what_there_is_is_named(done):
    assert done["foreign_nothing_there"].startswith("OSError")
    assert "there are: layers.10" in done["foreign_nothing_there"]


def test_a_file_that_would_be_written_outside_of_the_folder_stops_everything(done):
    assert "outside of its folder" in done["climbs"]["pull"]
    assert "climbs out" in done["climbs"]["convert"]
    assert done["climbs"]["written"] == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no_repo", "no such repository, or it is private"),
        ("private", "no such repository, or it is private"),
        ("gated", "gated: ask for access"),
        ("no_revision", "no such revision"),
        ("no_subfolder", "no subfolder 'layers.9'"),
        ("no_name", "no name of a repository"),
        ("push_no_token", "wants a token"),
        ("push_read_token", "your token may not do that"),
        ("nothing_to_push", "there is no SAE in"),
        ("401", "HTTP 401"),
        ("403", "HTTP 403"),
        ("404", "HTTP 404"),
        ("429", "too many requests"),
        ("500", "the Hub itself failed"),
        ("drop", "the connection was lost"),
        ("load_429", "too many requests"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(done, case, words):
    assert done["errors"][case].startswith("HubError")
    assert words in done["errors"][case]


@pytest.mark.parametrize(("step", "status"), PUSH_FAULTS)
def test_a_push_that_is_refused_at_any_step_says_so_and_commits_nothing(done, step, status):
    said = {404: "HTTP 404", 401: "wants a token", 403: "write rights to push"}
    words = {**said, 500: "the Hub itself failed", "drop": "the connection was lost"}[status]
    message = done["push_errors"][f"{step} {status}"]
    assert message.startswith("HubError: could not push to org/x")
    assert words in message
    assert all(not files for files in done["hub"].repos["org/x"].commits.values())


def test_a_pull_that_is_refused_writes_nothing(done):
    assert not done["errors"]["written"]


def test_a_card_that_the_hub_does_not_accept_stops_the_push(done):
    assert "is not valid" in done["bad_card"]["error"]
    assert "license" in done["bad_card"]["error"]
    assert done["bad_card"]["commits"] == []


def test_a_link_out_of_the_folder_is_not_published(done):
    assert "is a link out of" in done["link_out"]
    assert "org/linked" not in done["hub"].repos


def test_a_released_sae_is_published_by_one_command_and_comes_back_the_same(done):
    outcome = done["release_by_command"]
    assert re.fullmatch(r"[0-9a-f]{40}", outcome["push"])
    assert outcome["pull"] == outcome["push"]
    assert outcome["same"]
    assert "6144 features in 8 expert(s)" in outcome["inspect"]


def test_offline_the_cache_serves_and_nothing_is_asked(done):
    assert done["offline_load_all"] == [A, B]
    assert done["offline_foreign"] == done["hub"].repos["org/foreign"].refs["v1"]
    assert "24 features" in done["offline_inspect"]
    assert done["asked_offline"] == []


@pytest.mark.parametrize("case", ["pull", "push", "load"])
def test_offline_what_needs_the_hub_says_so(done, case):
    assert done["offline_errors"][case].startswith("HubError")
    assert "offline" in done["offline_errors"][case]

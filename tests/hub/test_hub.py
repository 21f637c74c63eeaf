"""Pull and push with the real huggingface_hub client, against a Hub on loopback."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers.hub_client import PLACE, REPO, digest
from helpers.hub_server import Hub
from helpers.saes import make

TESTS = pathlib.Path(__file__).parents[1]


def files_of(sae, folder) -> dict[str, bytes]:
    sae.config.hookpoint = PLACE
    sae.save_pretrained(folder / PLACE)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(hub, home, mode, commit):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if mode == "offline" else "0",
        "HF_HUB_DISABLE_XET": "1",  # that upload protocol needs a server of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    }
    start = len(hub.requests)
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "hub_client.py"), mode, commit],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), hub.requests[start:]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Every case online, then again offline with the same cache: one process each."""
    tmp = tmp_path_factory.mktemp("hub")
    first, second = make(), make("two_experts", scale=0.2)
    with Hub() as hub:
        v1 = hub.upload(REPO, files_of(first, tmp / "first"))
        hub.tag(REPO, "v1", v1)
        hub.upload(REPO, files_of(second, tmp / "second"))
        for name in ("private", "gated"):
            hub.create(f"org/{name}", **{name: True})
            hub.upload(f"org/{name}", files_of(first, tmp / "first"))
        online, asked = run(hub, tmp / "home", "online", v1)
        offline, asked_offline = run(hub, tmp / "home", "offline", v1)
        yield {
            **{"hub": hub, "v1": v1, "first": digest(first), "second": digest(second)},
            **{"online": online, "asked": asked},
            **{"offline": offline, "asked_offline": asked_offline},
        }


@pytest.mark.parametrize(
    "case", ["tag", "commit", "auto", "private_with_token", "gated_with_token"]
)
def test_a_place_at_a_revision_is_loaded_bit_for_bit(session, case):
    assert session["online"][case] == session["first"]


def test_another_revision_has_other_weights(session):
    assert session["online"]["main"] == session["second"]
    assert session["first"] != session["second"]


def test_the_config_alone_and_the_arguments_of_the_model_work_from_the_hub(session):
    assert session["online"]["config"] == PLACE
    assert session["online"]["groups"] == "2"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no_repo", ["OSError", "org/nothing", "not a valid model identifier", "token"]),
        ("private", ["OSError", "org/private", "private repository", "token"]),
        ("gated", ["OSError", "gated repo", "org/gated"]),
        ("no_revision", ["OSError", "v9", "org/saes"]),
        ("no_place", ["OSError", "org/saes", "model.safetensors"]),
        ("push_without_token", ["401"]),
    ],
)
def test_what_can_not_be_had_is_an_error_that_says_why(session, case, words):
    for word in words:
        assert word in session["online"][case]


def test_what_was_pushed_is_what_is_pulled(session):
    assert session["online"]["pushed"] == digest(make("jumprelu"))
    repo = session["hub"].repos["org/pushed"]
    assert repo.private
    assert {"config.json", "model.safetensors"} <= set(repo.commits[repo.refs["main"]])
    assert "org/other" not in session["hub"].repos


def test_weights_are_downloaded_once_for_each_revision(session):
    downloads = [line for line in session["asked"] if line.startswith("GET /cdn/")]
    assert len(downloads) == len(set(downloads)) + 2  # the private and the gated repo hold them too


@pytest.mark.parametrize("case", ["tag", "commit", "auto"])
def test_offline_the_cache_serves_and_nothing_is_asked(session, case):
    assert session["offline"][case] == session["first"]
    assert session["offline"]["main"] == session["second"]
    assert session["asked_offline"] == []


def test_offline_what_was_never_loaded_is_an_error_that_says_so(session):
    message = session["offline"]["never_loaded"]
    assert message.startswith("OSError")
    assert "couldn't find them in the cached files" in message

"""What test_releases.py does with the real client, whose HF_ENDPOINT is the loopback Hub.

    python release_client.py online|offline FOLDER     prints one JSON object: step -> outcome

Steps run in order. An outcome is what the step returned, or the error: its class and message.
"""

import hashlib
import json
import os
import pathlib
import re
import sys
import time
import urllib.request
from typing import Any

import torch
from transformers import AutoModel
from typer.testing import CliRunner

from helpers.hub_client import digest
from helpers.saes import make
from hf_switch_sae import (
    Recipe,
    Steer,
    SwitchSAE,
    SwitchSAEError,
    convert,
    inspect,
    load_all,
    pull,
    push,
)
from hf_switch_sae.cli.app import app
from hf_switch_sae.release.pull import pull_recipe
from hf_switch_sae.release.push import push_recipe, save_all

REPO, A, B = "org/release", "layers.3.resid_post", "layers.7.resid_pre"
TOKEN, READ = "hf_loopback", "hf_may_only_read"
CARDS = pathlib.Path(__file__).parents[2] / "model_cards"
WITH = {"token": TOKEN}
PUSH_FAULTS: list[tuple[str, int | str]] = [
    ("/api/repos/create", 401),
    ("/api/models/.*/preupload/main", 403),
    (r"/org/x\.git/info/lfs/objects/batch", 404),
    ("/api/models/.*/commit/main", 500),
    ("/api/models/.*/commit/main", "drop"),
]
BIG = bytes(range(256)) * 100_000  # over two of the client's chunks of 10 MiB
BIG_SHA = hashlib.sha256(BIG).hexdigest()


def faults(*what: tuple[str, int | str]) -> list[str]:
    """Set what fails next; returns what was asked since the last call."""
    url, body = f"{os.environ['HF_ENDPOINT']}/test/faults", json.dumps(what).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, method="POST")) as answer:
        return json.loads(answer.read())


def files(folder: pathlib.Path) -> dict[str, str]:
    """Name -> content, as the Hub would call it; without the client's own notes."""
    return {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    }


def saes() -> dict[str, SwitchSAE]:
    return {
        A: make("jumprelu", hookpoint=A, metrics={"fvu": 0.2, "l0": 3.0}),
        B: make("plain_topk", hookpoint=B),
    }


class Steps:
    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.commits = folder, {}

    # ------------------------------------------------------------ online, in this order

    def push_saes(self) -> Any:
        recipe = Recipe(REPO, (Steer(1, 0.5),), hookpoint=A)
        self.commits["first"] = push(saes(), REPO, private=True, recipes={"calm": recipe}, **WITH)
        (self.folder / "commit.txt").write_text(self.commits["first"])
        return self.commits["first"]

    def pull_again(self) -> Any:
        done = pull(REPO, self.folder / "pulled", **WITH)
        return {"revision": done.revision, "files": files(done.folder)}

    def push_folder(self) -> Any:
        folder = self.folder / "pulled"
        changed = make("switch", hookpoint=A)
        changed.save_pretrained(folder / A)
        (folder / "notes.txt").write_text("new in the second")
        readme = (folder / "README.md").read_text() + "\nA person's words.\n"
        (folder / "README.md").write_text(readme.replace("| 24 |", "| broken |"))
        self.commits["second"] = push(folder, REPO, message="second", **WITH)
        return {"revision": self.commits["second"], "files": files(folder)}

    def pull_second(self) -> Any:
        (self.folder / "mirror").mkdir()
        (self.folder / "mirror" / "mine.txt").write_text("of the user")
        done = pull(REPO, self.folder / "mirror", **WITH)
        return {"revision": done.revision, "files": files(done.folder)}

    def pull_older_over_it(self) -> Any:
        done = pull(REPO, self.folder / "mirror", revision=self.commits["first"], **WITH)
        return {"revision": done.revision, "files": files(done.folder)}

    def pull_over_changes(self) -> Any:
        folder = self.folder / "edited"
        pull(REPO, folder, **WITH)
        (folder / "notes.txt").write_text("changed by the user")
        pull(REPO, folder, revision=self.commits["first"], **WITH)
        return (folder / "notes.txt").read_text()

    def pull_one(self) -> Any:
        done = pull(REPO, self.folder / "one", subfolder=B, revision=self.commits["first"], **WITH)
        return sorted(files(done.folder))

    def load_all_older(self) -> Any:
        found = load_all(REPO, revision=self.commits["first"], **WITH)
        wanted = {place: digest(sae) for place, sae in saes().items()}
        return {place: digest(sae) for place, sae in found.items()} == wanted

    def auto_model(self) -> Any:
        at = {"subfolder": A, "revision": self.commits["first"], "token": TOKEN}
        return digest(AutoModel.from_pretrained(REPO, **at)) == digest(saes()[A])

    def pinned(self) -> Any:
        sae = SwitchSAE.from_pretrained(REPO, subfolder=A, **WITH)
        sae.save_pretrained(self.folder / "kept")
        recipe = Recipe.of(sae.config, Steer(2, 1.0))
        again = SwitchSAE.from_pretrained(self.folder / "kept").config.source
        return {"config": again, "recipe": recipe.to_dict()}

    def recipes(self) -> Any:
        recipe = Recipe(REPO, (Steer([3, 4], -0.5, positions="generated"),), revision="abc")
        push_recipe(recipe, REPO, "loud", **WITH)
        assert pull_recipe(REPO, "loud", **WITH) == recipe
        older = self.commits["first"]
        return {
            "calm": pull_recipe(REPO, "calm", revision=older, **WITH).to_dict(),
            "missing": outcome(lambda: pull_recipe(REPO, "none", **WITH)),
            "climbs": outcome(lambda: push_recipe(recipe, REPO, "../x", **WITH)),
        }

    def branch(self) -> Any:
        there = push({A: saes()[A]}, REPO, branch="trial", **WITH)
        return pull(REPO, self.folder / "trial", revision="trial", **WITH).revision == there

    def upload_is_cut_off(self) -> Any:
        faults(("PUT /lfs/.*", "drop"))
        commit = push({A: make("batch_topk")}, "org/cut", **WITH)
        asked = faults()
        loaded = SwitchSAE.from_pretrained("org/cut", subfolder=A, **WITH)
        return {
            "puts": sum(line.startswith("PUT") for line in asked),
            "same": digest(loaded) == digest(make("batch_topk")),
            "commit": commit,
        }

    def upload_goes_on(self) -> Any:
        release = {"a": make("relu"), "b": make("two_experts"), "c": make("three_experts")}
        folder = self.folder / "three"
        save_all(release, folder)
        second = hashlib.sha256((folder / "b" / "model.safetensors").read_bytes()).hexdigest()
        faults((f"PUT /lfs/{second}", 403))
        error = outcome(lambda: push(folder, "org/three", **WITH))
        asked = faults()
        push(folder, "org/three", **WITH)
        puts = [[line for line in lines if "PUT" in line] for lines in (asked, faults())]
        committed = any("/commit/" in line for line in asked)
        return {"error": error, "puts": puts, "committed": committed}

    def download_is_cut_off(self) -> Any:
        big = f"GET /cdn/{BIG_SHA}"
        faults((big, "drop"))
        done = pull("org/big", self.folder / "dropped")
        asked = [line for line in faults() if line.startswith("GET /cdn")]
        data = (done.folder / "big.bin").read_bytes()
        return {"asked": asked, "sha256": hashlib.sha256(data).hexdigest()}

    def download_goes_on(self) -> Any:
        big = f"GET /cdn/{BIG_SHA}"
        faults((big, "drop"), (big, 403))
        error = outcome(lambda: pull("org/big", self.folder / "resumed"))
        left = sorted(files(self.folder / "resumed"))
        faults()
        done = pull("org/big", self.folder / "resumed")
        asked = [line for line in faults() if line.startswith("GET /cdn")]
        data = (done.folder / "big.bin").read_bytes()
        return {
            **{"error": error, "left": left, "asked": asked},
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def inspect_remote(self) -> Any:
        faults()
        found = inspect(REPO, revision=self.commits["first"], **WITH)
        infos = [line for line in faults() if re.match(r"GET /api/models/[^/]+/[^/]+/rev", line)]
        wide = inspect("org/wide")
        asked = [line for line in faults() if "model.safetensors" in line or "/cdn/" in line]
        there = inspect(self.folder / "pulled_first")
        return {
            "text": str(found),
            "infos": infos,
            "wide": wide.saes[0].statistics,
            "asked": asked,
            "same": [s.tensors for s in found.saes] == [s.tensors for s in there.saes],
            "revision": found.revision,
        }

    def inspect_pickled(self) -> Any:
        faults()
        found = inspect("org/pickled")
        asked = [line for line in faults() if "cdn" in line or "ae.pt" in line]
        return {"formats": [(sae.path, sae.format) for sae in found.saes], "asked": asked}

    def keep_first(self) -> Any:
        pull(REPO, self.folder / "pulled_first", revision=self.commits["first"], **WITH)

    def foreign(self) -> Any:
        sae = SwitchSAE.from_pretrained("org/foreign", subfolder="layers.10", revision="v1")
        return {"source": sae.config.source, "hookpoint": sae.config.hookpoint}

    def foreign_with_an_argument(self) -> Any:
        lacks = outcome(
            lambda: SwitchSAE.from_pretrained("org/foreign", subfolder="layer12.sae.pt")
        )
        sae = SwitchSAE.from_pretrained("org/foreign", subfolder="layer12.sae.pt", k=5)
        return {"lacks": lacks, "k": sae.config.k, "hookpoint": sae.config.hookpoint}

    def foreign_nothing_there(self) -> Any:
        return outcome(lambda: SwitchSAE.from_pretrained("org/foreign", subfolder="layers.11"))

    def foreign_all(self) -> Any:
        found = convert("org/foreign", self.folder / "converted", subfolder="layers.10")
        return {"parity": found.parity.holds, "revision": found.sae.config.source["revision"]}

    def converted_and_published(self) -> Any:
        convert("org/foreign", self.folder / "ours", subfolder="layers.10", revision="v1")
        push(self.folder / "ours", "org/ours", **WITH)
        first = SwitchSAE.from_pretrained("org/ours", **WITH)
        push({"": first}, "org/copy", **WITH)
        copy = SwitchSAE.from_pretrained("org/copy", **WITH)
        return [first.config.source, copy.config.source]

    def climbs(self) -> Any:
        return {
            "pull": outcome(lambda: pull("org/evil", self.folder / "evil" / "in")),
            "convert": outcome(lambda: convert("org/evil")),
            "written": [str(p) for p in self.folder.glob("evil*")],
        }

    def errors(self) -> Any:
        into = self.folder / "never"
        one = {A: saes()[A]}

        def failing(status: int | str) -> str:
            faults(("GET /api/models/.*", status))
            return outcome(lambda: pull(REPO, into, **WITH))

        return {
            "no_repo": outcome(lambda: pull("org/nothing", into)),
            "private": outcome(lambda: pull(REPO, into)),
            "gated": outcome(lambda: pull("org/gated", into)),
            "no_revision": outcome(lambda: pull(REPO, into, revision="v9", **WITH)),
            "no_subfolder": outcome(lambda: pull(REPO, into, subfolder="layers.9", **WITH)),
            "no_name": outcome(lambda: pull("a/b/c", into)),
            "push_no_token": outcome(lambda: push(one, "org/x")),
            "push_read_token": outcome(lambda: push(one, "org/x", token=READ)),
            "nothing_to_push": outcome(lambda: push(self.folder / "mirror" / "recipes", REPO)),
            **{str(status): failing(status) for status in (401, 403, 404, 429, 500, "drop")},
            "load_429": self._while_loading(429),
            "written": into.exists() and files(into),
        }

    def push_errors(self) -> Any:
        """By step of a push and how it fails; nothing of it is committed."""
        outcomes = {}
        for step, status in PUSH_FAULTS:
            faults((f"POST {step}", status))
            outcomes[f"{step} {status}"] = outcome(lambda: push({A: saes()[A]}, "org/x", **WITH))
        faults()
        return outcomes

    def _while_loading(self, status: int) -> str:
        faults(("GET /api/models/.*", status))
        return outcome(lambda: load_all(REPO, **WITH))

    def bad_card(self) -> Any:
        folder = self.folder / "bad"
        save_all({A: saes()[A]}, folder)
        (folder / "README.md").write_text("---\nlicense: my own\n---\nhello\n")
        faults()
        error = outcome(lambda: push(folder, "org/bad", **WITH))
        return {"error": error, "commits": [line for line in faults() if "/commit/" in line]}

    def link_out(self) -> Any:
        folder = self.folder / "linked"
        save_all({A: saes()[A]}, folder)
        secret = self.folder / "secret.txt"
        secret.write_text("secret")
        (folder / "innocent.txt").symlink_to(secret)
        return outcome(lambda: push(folder, "org/linked", **WITH))

    def release_by_command(self) -> Any:
        os.environ["HF_TOKEN"] = TOKEN
        (released,) = [path for path in CARDS.iterdir() if path.is_dir()]
        done = CliRunner().invoke(app, ["push", str(released)])
        back = CliRunner().invoke(
            app, ["pull", f"me/{released.name}", str(self.folder / "released")]
        )
        looked = CliRunner().invoke(app, ["inspect", f"me/{released.name}"])
        found = {name: data for name, data in files(released).items() if "__pycache__" not in name}
        return {
            "push": done.output.strip(),
            "pull": back.output.strip(),
            "same": files(self.folder / "released") == found,
            "inspect": looked.output,
        }

    # ------------------------------------------------------------ offline, with the same cache

    def offline_load_all(self) -> Any:
        commit = (self.folder / "commit.txt").read_text()
        return sorted(load_all(REPO, revision=commit))

    def offline_foreign(self) -> Any:
        sae = SwitchSAE.from_pretrained("org/foreign", subfolder="layers.10", revision="v1")
        return sae.config.source["revision"]

    def offline_inspect(self) -> Any:
        return str(inspect(REPO, revision=(self.folder / "commit.txt").read_text()))

    def offline_errors(self) -> Any:
        return {
            "pull": outcome(lambda: pull(REPO, self.folder / "off")),
            "push": outcome(lambda: push({A: saes()[A]}, REPO)),
            "load": outcome(lambda: load_all("org/never")),
        }


ONLINE = [
    "push_saes",
    "pull_again",
    "push_folder",
    "pull_second",
    "pull_older_over_it",
    "pull_over_changes",
    "pull_one",
    "load_all_older",
    "auto_model",
    "pinned",
    "recipes",
    "branch",
    "upload_is_cut_off",
    "upload_goes_on",
    "download_is_cut_off",
    "download_goes_on",
    "keep_first",
    "inspect_remote",
    "inspect_pickled",
    "foreign",
    "foreign_with_an_argument",
    "foreign_nothing_there",
    "foreign_all",
    "converted_and_published",
    "climbs",
    "errors",
    "push_errors",
    "bad_card",
    "link_out",
    "release_by_command",
]
OFFLINE = ["offline_load_all", "offline_foreign", "offline_inspect", "offline_errors"]


def outcome(call: Any) -> str:
    try:
        return str(call())
    except (SwitchSAEError, OSError) as err:
        return f"{type(err).__name__}: {err}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps, done = Steps(pathlib.Path(sys.argv[2])), {}
    for name in {"online": ONLINE, "offline": OFFLINE}[sys.argv[1]]:
        start = time.monotonic()
        try:
            done[name] = getattr(steps, name)()
        except Exception as err:
            done[name] = f"{type(err).__name__}: {err}"
        sys.stderr.write(f"{name}: {time.monotonic() - start:.1f} s\n")
    sys.stdout.write(json.dumps(done) + "\n")

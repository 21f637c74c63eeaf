"""What test_hub.py does with the real client, in a process whose HF_ENDPOINT is the loopback Hub.

    python hub_client.py online|offline <commit of v1>     prints one JSON object: case -> outcome

An outcome is the digest of the SAE that was loaded, or the error: its class and message.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from helpers.saes import make
from hf_switch_sae import SwitchSAE

REPO, PLACE = "org/saes", "layers.3.resid_post"


def digest(sae: SwitchSAE) -> str:
    """Of all weights and buffers."""
    total = hashlib.sha256()
    for _, value in sorted(sae.state_dict().items()):
        total.update(value.detach().double().numpy().tobytes())
    return f"{type(sae).__name__} {total.hexdigest()}"


def outcome(call: Callable[[], Any]) -> str:
    try:
        value = call()
    except Exception as err:
        return f"{type(err).__name__}: {err}"
    return digest(value) if isinstance(value, SwitchSAE) else str(value)


def pushed() -> SwitchSAE:
    sae = make("jumprelu")
    sae.push_to_hub("org/pushed", token="hf_loopback", private=True, commit_message="first")
    return SwitchSAE.from_pretrained("org/pushed", token="hf_loopback")


def online(commit: str) -> dict[str, Callable[[], Any]]:
    load, place = SwitchSAE.from_pretrained, {"subfolder": PLACE}
    return {
        "tag": lambda: load(REPO, **place, revision="v1"),
        "commit": lambda: load(REPO, **place, revision=commit),
        "main": lambda: load(REPO, **place),
        "groups": lambda: len(load(REPO, **place, expert_groups=2).experts),
        "auto": lambda: AutoModel.from_pretrained(REPO, **place, revision="v1"),
        "config": lambda: AutoConfig.from_pretrained(REPO, **place, revision="v1").hookpoint,
        "no_repo": lambda: load("org/nothing", **place),
        "no_revision": lambda: load(REPO, **place, revision="v9"),
        "no_place": lambda: load(REPO, subfolder="layers.9.resid_post"),
        "private": lambda: load("org/private", **place),
        "private_with_token": lambda: load("org/private", **place, token="hf_loopback"),
        "gated": lambda: load("org/gated", **place),
        "gated_with_token": lambda: load("org/gated", **place, token="hf_loopback"),
        "pushed": pushed,
        "push_without_token": lambda: make().push_to_hub("org/other"),
    }


def offline(commit: str) -> dict[str, Callable[[], Any]]:
    load, place = SwitchSAE.from_pretrained, {"subfolder": PLACE}
    return {
        "tag": lambda: load(REPO, **place, revision="v1"),
        "commit": lambda: load(REPO, **place, revision=commit),
        "main": lambda: load(REPO, **place),
        "auto": lambda: AutoModel.from_pretrained(REPO, **place, revision="v1"),
        "never_loaded": lambda: load("org/unseen", **place),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = {"online": online, "offline": offline}[sys.argv[1]](sys.argv[2])
    sys.stdout.write(json.dumps({name: outcome(call) for name, call in cases.items()}) + "\n")

"""The packages of other projects themselves: their checkpoints load here, and ours load there.

They run in a subprocess, by the Python in PEERS_PYTHON or else by this one; what is not installed
there is skipped with a word.
"""

import functools
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers.saes import make

from hf_switch_sae import SwitchSAE, export

PYTHON = os.environ.get("PEERS_PYTHON", sys.executable)
SCRIPT = pathlib.Path(__file__).parents[1] / "helpers" / "peer_checkpoints.py"
INSTALL = {"sparsify": "eai-sparsify", "sae_lens": "sae-lens"}
NAMES = {"sae_lens": "saelens"}
EACH_PACKAGE = pytest.mark.parametrize("package", ["sparsify", "sae_lens", "dictionary_learning"])


@functools.cache
def peer(action: str, package: str, folder: pathlib.Path) -> None:
    """Run the package, or skip the test where it is not installed."""
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    if subprocess.run([PYTHON, "-c", look], check=False).returncode:
        pytest.skip(
            f"{package} is not installed (pip install {INSTALL.get(package, package)} somewhere, "
            "and name its Python in PEERS_PYTHON)"
        )
    done = subprocess.run(
        [PYTHON, str(SCRIPT), action, package, str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def reconstruct(sae: SwitchSAE, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return sae.decode(sae.encode(x), x)


@EACH_PACKAGE
def test_a_checkpoint_made_by_the_package_gives_its_outputs_here(tmp_path, package):
    peer("make", package, tmp_path)
    kinds = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert kinds
    for folder in kinds:
        io = torch.load(tmp_path / f"{folder.name}.pt", weights_only=True)
        sae = SwitchSAE.from_pretrained(folder)
        torch.testing.assert_close(
            reconstruct(sae, io["x"]), io["out"], atol=1e-5, rtol=1e-5, msg=folder.name
        )


@EACH_PACKAGE
def test_what_is_exported_loads_in_the_package_and_agrees(tmp_path, package):
    kinds = ["plain_topk"]
    if package != "sparsify":
        kinds += ["plain_relu", "plain_jumprelu", "plain_batch_topk"]
    if package == "sae_lens":
        kinds.append("plain_layer_norm")
    x, saes = 2.0 * torch.randn(64, 16), {}
    for kind in kinds:
        saes[kind] = sae = make(kind)
        if "batch" in kind:
            sae.threshold.fill_(0.3)
        export(sae, tmp_path / kind, NAMES.get(package, package))
        torch.save({"x": x}, tmp_path / f"{kind}.pt")

    peer("load", package, tmp_path)

    for kind, sae in saes.items():
        out = torch.load(tmp_path / f"{kind}.loaded", weights_only=True)["out"]
        torch.testing.assert_close(out, reconstruct(sae, x), atol=1e-5, rtol=1e-5, msg=kind)

"""What test_peers.py does with the packages of other projects, in a Python that has them.

    python peer_checkpoints.py make PACKAGE FOLDER    writes FOLDER/<kind>/..., and io.pt beside it
    python peer_checkpoints.py load PACKAGE FOLDER    reads each kind back, writes loaded.pt

io.pt holds `x` [n, d] and `out` [n, d], what the package itself reconstructs; in `load`, `x` is
given and `out` is written. Nothing of this repository is imported.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

D, F, K = 16, 48, 5


def randomize(module: torch.nn.Module) -> None:
    torch.manual_seed(7)
    for name, value in module.named_parameters():
        value.data.copy_(torch.randn(value.shape) / (4.0 if value.ndim == 2 else 5.0))
        if name == "threshold":
            value.data.copy_(0.1 + 0.5 * torch.rand(value.shape))


def sparsify_coders() -> dict[str, Any]:
    from sparsify import SparseCoder, SparseCoderConfig

    kinds = {"layers.10": {}, "h.3": {"normalize_decoder": False}}
    return {
        name: SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **more))
        for name, more in kinds.items()
    }


def saelens_saes() -> dict[str, Any]:
    import sae_lens as sl

    def settings(cls: Any, **more: Any) -> Any:
        meta = {"model_name": "gpt2-small", "hook_name": "blocks.7.hook_resid_post"}
        base = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
        return cls(**base, **more, metadata=sl.saes.sae.SAEMetadata(**meta))

    def batch_topk() -> Any:
        made = sl.BatchTopKTrainingSAE(settings(sl.BatchTopKTrainingSAEConfig, k=K))
        made.topk_threshold.fill_(0.4)
        return made

    return {
        "standard": sl.StandardSAE(settings(sl.StandardSAEConfig)),
        "topk": sl.TopKSAE(settings(sl.TopKSAEConfig, k=K)),
        "topk_by_norm": sl.TopKSAE(
            settings(sl.TopKSAEConfig, k=K, rescale_acts_by_decoder_norm=True)
        ),
        "jumprelu": sl.JumpReLUSAE(settings(sl.JumpReLUSAEConfig, apply_b_dec_to_input=False)),
        "topk_layer_norm": sl.TopKSAE(
            settings(sl.TopKSAEConfig, k=K, normalize_activations="layer_norm")
        ),
        "jumprelu_constant_norm": sl.JumpReLUSAE(
            settings(sl.JumpReLUSAEConfig, normalize_activations="constant_norm_rescale")
        ),
        "gated": sl.GatedSAE(settings(sl.GatedSAEConfig)),
        "batchtopk_as_trained": batch_topk(),
        "batchtopk_for_inference": batch_topk(),
    }


def as_used(trained: Any) -> Any:
    """A SAELens SAE of a training class as it computes once trained: over a whole batch no more."""
    import sae_lens as sl

    with tempfile.TemporaryDirectory() as folder:
        trained.save_inference_model(folder)
        return sl.SAE.load_from_disk(folder)


def dictionaries() -> dict[str, Any]:
    from dictionary_learning.dictionary import (
        AutoEncoder,
        AutoEncoderNew,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
    )
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {
        "AutoEncoder": AutoEncoder(D, F),
        "AutoEncoderNew": AutoEncoderNew(D, F),
        "GatedAutoEncoder": GatedAutoEncoder(D, F),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(D, F),
        "AutoEncoderTopK": AutoEncoderTopK(D, F, K),
        "BatchTopKSAE": BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, K, [8, F - 8]),
    }
    for name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        made[name].threshold.fill_(0.4)
    return made


def save(package: str, made: Any, folder: Path, kind: str) -> None:
    folder.mkdir(parents=True)
    if package == "sparsify":
        made.save_to_disk(folder)
    elif kind.endswith("for_inference"):
        made.save_inference_model(folder)
    elif package == "sae_lens":
        made.save_model(folder)
    else:
        import json

        torch.save(made.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "lm_name": "org/lm"}
        trainer |= {"submodule_name": "resid_post_layer_7", "layer": 7}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


def load(package: str, folder: Path) -> Any:
    if package == "sparsify":
        from sparsify import SparseCoder

        return SparseCoder.load_from_disk(folder)
    if package == "sae_lens":
        from sae_lens import SAE

        return SAE.load_from_disk(folder)
    import json

    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    return type(dictionaries()[kind]).from_pretrained(folder / "ae.pt")


@torch.no_grad()
def reconstruct(package: str, coder: Any, x: torch.Tensor) -> torch.Tensor:
    if package == "sparsify":
        encoded = coder.encode(x)
        return coder.decode(encoded.top_acts, encoded.top_indices)
    return coder.decode(coder.encode(x))


MAKE = {
    "sparsify": sparsify_coders,
    "sae_lens": saelens_saes,
    "dictionary_learning": dictionaries,
}

if __name__ == "__main__":
    action, package, where = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    if action == "make":
        for kind, made in MAKE[package]().items():
            randomize(made)
            x = 2.0 * torch.randn(64, D)
            save(package, made, where / kind, kind)
            if kind.startswith("batchtopk"):
                made = as_used(made)
            torch.save({"x": x, "out": reconstruct(package, made, x)}, where / f"{kind}.pt")
    else:
        for io in sorted(where.glob("*.pt")):
            x = torch.load(io)["x"]
            out = reconstruct(package, load(package, where / io.stem), x)
            torch.save({"x": x, "out": out}, where / f"{io.stem}.loaded")

"""Checkpoints of other projects as their documentation lays them out, with what they compute.

    folder, expected, options = LAYOUTS["sparsify"](tmp_path)

`expected(x)` is the reconstruction, written out here anew, on the tensors as they were stored;
`options` are what the files do not tell.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 16, 48, 5
Layout = tuple[Path, Callable[[Tensor], Tensor], dict[str, Any]]


def numbers(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors; weights of rows about as long as 1, biases small."""
    torch.manual_seed(3)
    return {
        name: torch.randn(shape) / (math.sqrt(D) if len(shape) == 2 else 4.0)
        for name, shape in shapes.items()
    }


def write(folder: Path, **files: Any) -> Path:
    """Files by name, `__` for a dot: dicts of tensors or of JSON, by the name's end."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_SLASH_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({n: v.contiguous() for n, v in content.items()}, path)
        elif path.suffix in (".pt", ".pth"):
            torch.save(content, path)
        elif path.suffix == ".npz":
            np.savez(path, **{n: v.numpy() for n, v in content.items()})
        else:
            path.write_text(json.dumps(content))
    return folder


def topk(pre: Tensor, k: int = K) -> Tensor:
    acts = pre.clamp(min=0)
    return acts * (acts >= acts.sort(-1, descending=True).values[:, k - 1 : k])


def jump(pre: Tensor, threshold: Any) -> Tensor:
    return torch.where(pre > threshold, pre.clamp(min=0), torch.zeros(()))


def layer_normed(x: Tensor, computed: Callable[[Tensor], Tensor]) -> Tensor:
    mean = x.mean(1, keepdim=True)
    std = (x - mean).std(1, keepdim=True)
    return computed((x - mean) / (std + 1e-5)) * std + mean


def sparsify(tmp: Path) -> Layout:
    t = numbers(W_enc=(F, D), b_enc=(F,), W_dec=(F, D), b_dec=(D,))
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    cfg = {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D}
    stored = {names.get(n, n): v for n, v in t.items()}
    folder = write(tmp / "layers.10", cfg__json=cfg, sae__safetensors=stored)

    def expected(x: Tensor) -> Tensor:
        return topk((x - t["b_dec"]) @ t["W_enc"].T + t["b_enc"]) @ t["W_dec"] + t["b_dec"]

    return folder, expected, {}


SAELENS = {
    "standard": {},
    "topk": {"k": K},
    "topk_by_norm": {"k": K, "rescale_acts_by_decoder_norm": True},
    "batchtopk": {"k": float(K)},
    "batchtopk_by_norm": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "jumprelu_scaled": {"normalize_activations": "expected_average_only_in"},
    "topk_layer_norm": {"k": K, "normalize_activations": "layer_norm"},
    "batchtopk_constant_norm": {"k": K, "normalize_activations": "constant_norm_rescale"},
    "gated": {},
}


def saelens(kind: str) -> Callable[[Path], Layout]:
    def layout(tmp: Path) -> Layout:
        t = numbers(W_enc=(D, F), b_enc=(F,), W_dec=(F, D), b_dec=(D,), b_gate=(F,), r_mag=(F,))
        t["threshold"] = 0.1 + torch.rand(F)
        architecture, sub = kind.split("_")[0], kind != "jumprelu"
        extra = {
            "jumprelu": ("threshold",),
            "gated": ("b_gate", "r_mag"),
        }.get(architecture, ())
        stored = {n: t[n] for n in ("W_enc", "W_dec", "b_dec", "b_enc", *extra)}
        if architecture == "gated":
            stored["b_mag"] = stored.pop("b_enc")
        if architecture == "batchtopk":
            stored["topk_threshold"] = torch.tensor(0.4, dtype=torch.float64)
        cfg = {
            **{"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32"},
            **{"apply_b_dec_to_input": sub, "normalize_activations": "none", **SAELENS[kind]},
            "metadata": {"model_name": "gpt2-small", "hook_name": "blocks.7.hook_resid_pre"},
        }
        folder = write(tmp / kind, cfg__json=cfg, sae_weights__safetensors=stored)
        s = 0.25 if "scaled" in kind else 1.0
        norm = t["W_dec"].norm(dim=1) if "by_norm" in kind else torch.ones(F)

        def expected(x: Tensor) -> Tensor:
            if "layer_norm" in kind:
                return layer_normed(x, computed)
            if "constant_norm" in kind:
                factor = math.sqrt(D) / x.norm(dim=1, keepdim=True)
                return computed(x * factor) / factor
            return computed(x)

        def computed(x: Tensor) -> Tensor:
            linear = (s * x - t["b_dec"] * sub) @ t["W_enc"]
            pre = (linear + t["b_enc"]) * norm
            if architecture == "gated":
                on = linear + t["b_gate"] > 0
                acts = on * (t["r_mag"].exp() * linear + t["b_enc"]).clamp(min=0)
            else:
                acts = {
                    "standard": lambda: pre.clamp(min=0),
                    "topk": lambda: topk(pre),
                    "batchtopk": lambda: jump(pre, 0.4),
                    "jumprelu": lambda: jump(pre, t["threshold"]),
                }[architecture]()
            return ((acts / norm) @ t["W_dec"] + t["b_dec"]) / s

        return folder, expected, {"input_scale": s} if "scaled" in kind else {}

    return layout


def saelens_before_6(tmp: Path) -> Layout:
    t = numbers(W_enc=(D, F), b_enc=(F,), W_dec=(F, D), b_dec=(D,))
    cfg = {
        **{"hook_point": "blocks.3.hook_resid_post", "d_in": D, "d_sae": F},
        **{"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "model_name": "gpt2"},
    }
    folder = write(tmp / "old", cfg__json=cfg, sae_weights__safetensors=t)

    def expected(x: Tensor) -> Tensor:
        return topk((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) @ t["W_dec"] + t["b_dec"]

    return folder, expected, {}


def dictionary_learning(kind: str) -> Callable[[Path], Layout]:
    def layout(tmp: Path) -> Layout:
        t = numbers(W_enc=(F, D), b_enc=(F,), W_dec=(D, F), b_dec=(D,), gate=(F,), r=(F,))
        t["threshold"] = 0.1 + torch.rand(F)
        linear = {"encoder.weight": t["W_enc"], "decoder.weight": t["W_dec"]}
        biased = {**linear, "encoder.bias": t["b_enc"]}
        rows = {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T, "b_enc": t["b_enc"]}
        rows = {n: v.contiguous() for n, v in rows.items()}
        one = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4)}
        unset = {**one, "threshold": torch.tensor(-1.0)}
        stored = {
            "AutoEncoder": {**biased, "bias": t["b_dec"]},
            "AutoEncoderNew": {**biased, "decoder.bias": t["b_dec"]},
            "GatedAutoEncoder": {
                **linear,
                **{"decoder_bias": t["b_dec"], "r_mag": t["r"]},
                **{"gate_bias": t["gate"], "mag_bias": t["b_enc"]},
            },
            "JumpReluAutoEncoder": {**rows, "b_dec": t["b_dec"], "threshold": t["threshold"]},
            "AutoEncoderTopK": {**biased, "b_dec": t["b_dec"], **unset},
            "BatchTopKSAE": {**biased, "b_dec": t["b_dec"], **one},
            "MatryoshkaBatchTopKSAE": {
                **{**rows, "b_dec": t["b_dec"], **one},
                "group_sizes": torch.tensor([8, F - 8]),
            },
        }[kind]
        trainer = {
            **{"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3},
            **{"lm_name": "org/lm", "submodule_name": "resid_post_layer_3"},
            **({"k": K} if "TopK" in kind else {}),
        }
        folder = write(tmp / kind, ae__pt=stored, config__json={"trainer": trainer})
        sub = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")

        def expected(x: Tensor) -> Tensor:
            linear = (x - t["b_dec"] * sub) @ t["W_enc"].T
            pre = linear + t["b_enc"]
            if kind == "GatedAutoEncoder":
                on = linear + t["gate"] > 0
                acts = on * (t["r"].exp() * linear + t["b_enc"]).clamp(min=0)
            elif kind == "AutoEncoderTopK":
                acts = topk(pre)
            else:
                border = {"JumpReluAutoEncoder": t["threshold"]}.get(kind, 0.4)
                acts = jump(pre, 0.0 if "AutoEncoder" in kind and "Jump" not in kind else border)
            return acts @ t["W_dec"].T + t["b_dec"]

        return folder, expected, {}

    return layout


def switch_sae(heaviside: bool) -> Callable[[Path], Layout]:
    def layout(tmp: Path) -> Layout:
        E, m = 4, F // 4
        t = numbers(W_enc=(F, D), W_dec=(F, D), router=(E, D), b_dec=(D,), b_router=(D,))
        names = {"W_enc": "encoder.weight", "W_dec": "decoder", "router": "router.weight"}
        trainer = {
            **{"dict_class": "SwitchAutoEncoder", "activation_dim": D, "dict_size": F, "k": K},
            **{
                "experts": E,
                "heaviside": heaviside,
                "layer": 8,
                "lm_name": "openai-community/gpt2",
            },
        }
        stored = {names.get(n, n): v for n, v in t.items()}
        folder = write(tmp / "switch", ae__pt=stored, config__json={"trainer": trainer})

        def expected(x: Tensor) -> Tensor:
            p = ((x - t["b_router"]) @ t["router"].T).softmax(-1)
            z = ((x - t["b_dec"]) @ t["W_enc"].T).clamp(min=0)
            acts = torch.zeros(len(x), F)
            for row, e in enumerate(p.argmax(-1).tolist()):
                own = slice(e * m, (e + 1) * m)
                acts[row, own] = z[row, own] * (1.0 if heaviside else p[row, e])
            return topk(acts) @ t["W_dec"] + t["b_dec"]

        return folder, expected, {}

    return layout


def scale_sae(tmp: Path) -> Layout:
    E, m = 3, F // 3
    t = numbers(gate=(E, D), bias=(E,), b_gate=(D,), b_dec=(D,), omega=(E,), low=(D, D))
    torch.manual_seed(4)
    W, b = torch.randn(E, m, D) / math.sqrt(D), torch.randn(E, m) / 4
    W_dec = torch.randn(E, m, D) / math.sqrt(D)
    stored = {
        **{"gate.weight": t["gate"], "gate.bias": t["bias"], "b_gate": t["b_gate"]},
        **{"b_dec": t["b_dec"], "omega": t["omega"], "lp_transform_encoder.weight": t["low"]},
        **{"beta": torch.ones(1), "lp_transform_decoder.weight": torch.eye(D)},
    }
    for e in range(E):
        stored[f"expert_modules.{e}.encoder.weight"] = W[e].clone()
        stored[f"expert_modules.{e}.encoder.bias"] = b[e].clone()
        stored[f"expert_modules.{e}.decoder"] = W_dec[e].clone()
    trainer = {"k": K, "e": 1, "layer": 8, "lm_name": "openai-community/gpt2"}
    folder = write(tmp / "scale", ae__pt=stored, config__json={"trainer": trainer})

    def expected(x: Tensor) -> Tensor:
        p = ((x - t["b_gate"]) @ t["gate"].T + t["bias"]).softmax(-1)
        acts = torch.zeros(len(x), E, m)
        for row, e in enumerate(p.argmax(-1).tolist()):
            mean = W[e].mean(0)
            rows = t["low"] @ mean + (1 + t["omega"][e]) * (W[e] - mean)
            acts[row, e] = (rows @ (x[row] - t["b_dec"]) + b[e]).clamp(min=0)
        return topk(acts.reshape(-1, F)) @ W_dec.reshape(F, D) + t["b_dec"]

    return folder, expected, {}


def gemma_scope(address: str, file: str, config: dict | None = None) -> Callable[[Path], Layout]:
    def layout(tmp: Path) -> Layout:
        t = numbers(W_enc=(D, F), W_dec=(F, D), b_enc=(F,), b_dec=(D,))
        t["threshold"] = 0.1 + torch.rand(F)
        stored = {n.lower() if file.startswith("params__s") else n: v for n, v in t.items()}
        files = {file: stored, **({"config__json": config} if config else {})}
        folder = write(tmp / address, **files)
        s = math.sqrt(D) if "embedding" in address else 1.0

        def expected(x: Tensor) -> Tensor:
            acts = jump(x / s @ t["W_enc"] + t["b_enc"], t["threshold"])
            return s * (acts @ t["W_dec"] + t["b_dec"])

        return folder, expected, {}

    return layout


def llama_scope(tmp: Path) -> Layout:
    t = numbers(W_enc=(F, D), W_dec=(D, F), b_enc=(F,), b_dec=(D,))
    t["W_dec"] *= 1.5  # columns of other lengths than 1, where the approximation goes wrong
    config = {
        **{"hook_point_in": "blocks.15.hook_resid_post", "d_model": D, "act_fn": "jumprelu"},
        **{"hook_point_out": "blocks.15.hook_resid_post", "jump_relu_threshold": 0.5},
        **{"norm_activation": "dataset-wise", "apply_decoder_bias_to_pre_encoder": False},
        "dataset_average_activation_norm": {"in": 5.0, "out": 8.0},
    }
    stored = {
        **{"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"]},
        **{"decoder.weight": t["W_dec"], "decoder.bias": t["b_dec"]},
    }
    folder = write(
        tmp / "Llama3_1-8B-Base-L15R-8x",
        hyperparams__json=config,
        checkpoints_SLASH_final__safetensors=stored,
    )

    def expected(x: Tensor) -> Tensor:
        s_in, s_out = math.sqrt(D) / 5.0, math.sqrt(D) / 8.0
        decoder = t["W_dec"] * s_in / s_out  # the authors' two steps, one after the other
        encoder, bias, b_dec = t["W_enc"], t["b_enc"] / s_in, t["b_dec"] / s_out
        norm = decoder.norm(dim=0)
        decoder, encoder, bias = decoder / norm, encoder * norm[:, None], bias * norm
        return jump(x @ encoder.T + bias, 0.5) @ decoder.T + b_dec

    return folder, expected, {}


def llama_scope_r1(tmp: Path) -> Layout:
    t = numbers(W_enc=(F, D), W_dec=(D, F), b_enc=(F,), b_dec=(D,), log=(F,))
    hook = "blocks.15.hook_resid_post"
    config = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D, "act_fn": "jumprelu"}
    stored = {
        **{"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"]},
        **{"decoder.weight": t["W_dec"], "decoder.bias": t["b_dec"]},
        "log_jumprelu_threshold": t["log"] - 1,
    }
    folder = write(tmp / "L15R", config__json=config, sae_weights__safetensors=stored)

    def expected(x: Tensor) -> Tensor:
        acts = jump(0.5 * x @ t["W_enc"].T + t["b_enc"], (t["log"] - 1).exp())
        return (acts @ t["W_dec"].T + t["b_dec"]) / 0.5

    return folder, expected, {"input_scale": 0.5}


def openai_topk(tmp: Path) -> Layout:
    folder, _, _ = openai(tmp, "v5_32k")
    t = torch.load(folder / "8.pt", weights_only=True)
    state = {"k": K, "postact_fn": "ReLU"}
    torch.save({**t, "activation": "TopK", "activation_state_dict": state}, folder / "8.pt")

    def computed(h: Tensor) -> Tensor:
        acts = topk((h - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"])
        return acts @ t["decoder.weight"].T + t["pre_bias"]

    return folder, lambda x: layer_normed(x, computed), {}


def openai(tmp: Path, version: str = "v4") -> Layout:
    t = numbers(W_enc=(F, D), W_dec=(D, F), b_enc=(F,), b_dec=(D,))
    stored = {
        **{"pre_bias": t["b_dec"], "latent_bias": t["b_enc"], "activation": "ReLU"},
        **{"encoder.weight": t["W_enc"], "decoder.weight": t["W_dec"]},
        "stats_last_nonzero": torch.zeros(F, dtype=torch.int64),
        **{"latents_activation_frequency": torch.zeros(F), "latents_mean_square": torch.zeros(F)},
    }
    folder = tmp / f"gpt2-small/resid_post_mlp_{version}/autoencoders"
    torch.save(stored, write(folder) / "8.pt")

    def expected(x: Tensor) -> Tensor:
        acts = ((x - t["b_dec"]) @ t["W_enc"].T + t["b_enc"]).clamp(min=0)
        return acts @ t["W_dec"].T + t["b_dec"]

    return folder, expected, {}


def goodfire(tmp: Path) -> Layout:
    t = numbers(W_enc=(F, D), W_dec=(D, F), b_enc=(F,), b_dec=(D,))
    stored = {
        **{"encoder_linear.weight": t["W_enc"], "encoder_linear.bias": t["b_enc"]},
        **{"decoder_linear.weight": t["W_dec"], "decoder_linear.bias": t["b_dec"]},
    }
    folder = tmp / "Llama-3.1-8B-Instruct-SAE-l19"
    torch.save(stored, write(folder) / "Llama-3.1-8B-Instruct-SAE-l19.pth")

    def expected(x: Tensor) -> Tensor:
        return (x @ t["W_enc"].T + t["b_enc"]).clamp(min=0) @ t["W_dec"].T + t["b_dec"]

    return folder, expected, {}


def qwen_scope(tmp: Path) -> Layout:
    t = numbers(W_enc=(F, D), W_dec=(D, F), b_enc=(F,), b_dec=(D,))
    folder = tmp / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    for layer in (2, 12):
        torch.save(t, write(folder) / f"layer{layer}.sae.pt")

    def expected(x: Tensor) -> Tensor:
        return topk(x @ t["W_enc"].T + t["b_enc"]) @ t["W_dec"].T + t["b_dec"]

    return folder, expected, {"layer": 12}


_GEMMA_2 = {
    **{"architecture": "jump_relu", "model_name": "gemma-3-1b-pt"},
    **{
        "hf_hook_point_in": "model.layers.13.output",
        "hf_hook_point_out": "model.layers.13.output",
    },
}
LAYOUTS: dict[str, Callable[[Path], Layout]] = {
    "sparsify": sparsify,
    **{f"saelens_{kind}": saelens(kind) for kind in SAELENS},
    "saelens_before_6": saelens_before_6,
    **{
        f"dictionary_learning_{kind}": dictionary_learning(kind)
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "GatedAutoEncoder",
            "JumpReluAutoEncoder",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
        )
    },
    "switch_sae": switch_sae(False),
    "switch_sae_heaviside": switch_sae(True),
    "scale_sae": scale_sae,
    "gemma_scope": gemma_scope(
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "params__npz"
    ),
    "gemma_scope_att": gemma_scope(
        "gemma-scope-9b-pt-att/layer_20/width_16k/average_l0_71", "params__npz"
    ),
    "gemma_scope_embedding": gemma_scope(
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "params__npz"
    ),
    "gemma_scope_2": gemma_scope(
        "resid_post/layer_13_width_16k_l0_medium", "params__safetensors", _GEMMA_2
    ),
    "llama_scope": llama_scope,
    "llama_scope_r1": llama_scope_r1,
    "openai": openai,
    "openai_topk": openai_topk,
    "goodfire": goodfire,
    "qwen_scope": qwen_scope,
}
PLACES = {
    "sparsify": "layers.10.resid_post",
    "saelens": "layers.7.resid_pre",
    "saelens_before_6": "layers.3.resid_post",
    "dictionary_learning": "layers.3.resid_post",
    "switch_sae": "layers.8.resid_post",
    "scale_sae": "layers.8.resid_post",
    "gemma_scope": "layers.20.resid_post",
    "gemma_scope_att": "model.layers.20.self_attn.o_proj.resid_pre",
    "gemma_scope_embedding": "layers.0.resid_pre",
    "gemma_scope_2": "layers.13.resid_post",
    "llama_scope": "layers.15.resid_post",
    "openai": "layers.8.resid_post",
    "goodfire": "layers.19.resid_post",
    "qwen_scope": "layers.12.resid_post",
}
"""By the longest beginning of a layout's name."""


def place_of(name: str) -> str:
    return PLACES[max((known for known in PLACES if name.startswith(known)), key=len)]
